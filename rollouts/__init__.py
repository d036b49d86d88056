"""Where trees come from: problems, models, scores, and the rollout store that keeps what they produced."""
