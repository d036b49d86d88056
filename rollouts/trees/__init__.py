"""How rollouts branch: trees while they grow, and the arrays that they are compiled to."""
