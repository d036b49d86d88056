"""Routers: who decides, how they are trained, evaluated and stored."""
