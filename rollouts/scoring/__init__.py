"""Scorers: something that gives every step of a path a number in [0, 1]."""
