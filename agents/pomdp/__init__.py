"""TRIM-POMDP: noisy scores, a hidden class of the trajectory, a Bayes filter and planning by backward induction."""
