"""The decision process over rollout trees: a Gymnasium environment, single, vectorised and live."""

import gymnasium

gymnasium.register(
    id="Trim-v0",
    entry_point="trim_env.env:TrimEnv",
    vector_entry_point="trim_env.vector:TrimVectorEnv",
)
