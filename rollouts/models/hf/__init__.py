"""Models that run on transformers in a process of ours."""
