"""What others route with: fitted on the same trees, for comparison. Training needs the extra ``[baselines]``."""
