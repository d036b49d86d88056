"""Honest evaluation of routers: outcomes per problem, cost-accuracy curves, intervals, comparisons (design §7)."""
