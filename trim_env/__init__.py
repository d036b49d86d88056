"""The decision process over rollout trees: a Gymnasium environment, single, vectorised and live.

``Trim-v0`` is registered where Gymnasium is installed. Features and schemas do without it: a router in use needs
NumPy alone.
"""

try:
    import gymnasium
except ModuleNotFoundError as error:
    if error.name != "gymnasium":
        raise
else:
    gymnasium.register(
        id="Trim-v0",
        entry_point="trim_env.env:TrimEnv",
        vector_entry_point="trim_env.vector:TrimVectorEnv",
    )
