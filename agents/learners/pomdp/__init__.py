"""TRIM-POMDP's parameters, measured from labelled trees or found by EM."""
