"""Honest evaluation of routers: outcomes, curves, intervals, comparisons (docs/design.md, section 7)."""
