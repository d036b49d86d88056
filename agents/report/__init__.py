"""The page of an evaluation: what was measured, gathered as plain values and drawn into one self-contained file."""
