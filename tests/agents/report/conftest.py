"""Helper modules of these tests and of their neighbours are imported by name."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "rollouts"), str(HERE.parents[1] / "trim_env")]
