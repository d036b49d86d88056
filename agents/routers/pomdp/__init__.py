"""TRIM-POMDP's router: a filter over latent classes and a planner."""
