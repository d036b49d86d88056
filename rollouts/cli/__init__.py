"""The subcommands of `python -m rollouts`."""
