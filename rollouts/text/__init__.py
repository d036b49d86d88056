"""How a solution is written down: steps, prompts, tokens."""
