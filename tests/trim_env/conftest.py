"""Helper modules of these tests, and the scripted models of the rollout tests, are imported by name."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "rollouts")]
