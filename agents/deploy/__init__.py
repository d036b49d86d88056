"""A router in use: loaded policies, sessions, exports."""
