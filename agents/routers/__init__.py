"""Who decides: routers, the artefacts that they are kept in, and others' models as routers. NumPy only."""

from agents.routers.sb3 import from_sb3

__all__ = ["from_sb3"]
