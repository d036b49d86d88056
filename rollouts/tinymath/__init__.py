"""The embedded model family: an arithmetic problem set and three tiny models trained on it.

The family runs with no GPU, no download and no account. `generate_problems` gives the problems,
`model_dir` the Hugging Face folder of the ``small`` or ``large`` language model or the process reward model
``prm``, `label_steps` the exact labels of a solution's steps. Importing this package imports neither
torch nor transformers. ``python -m rollouts.tinymath.training.train`` trains the models anew; ``RESULTS.md`` says
how well they do.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from rollouts.errors import ConfigError
from rollouts.files.sealed import check, read_sealed, refusing_damage
from rollouts.tinymath.labels import label_steps
from rollouts.tinymath.problems import FRESH, SPLITS, STEP_DELIMITER, TinyProblem, generate_problems, solution_steps

__all__ = [
    "FRESH",
    "ROLES",
    "SPLITS",
    "STEP_DELIMITER",
    "STEP_TAG",
    "TinyProblem",
    "generate_problems",
    "label_steps",
    "model_dir",
    "solution_steps",
]

#: The models of the family.
ROLES = ("small", "large", "prm")
#: Checksums of the models' files, beside their folders.
CHECKSUMS = "checksums.json"
#: The token after each step at which the process reward model is read.
STEP_TAG = "<extra_0>"


def model_dir(role: str) -> Path:
    """The folder of ``small``, ``large`` or ``prm`` with its weights and tokenizer, in Hugging Face format.

    Raises:
        ConfigError: The role does not exist, or its weights are not installed or damaged.
    """
    if role not in ROLES:
        raise ConfigError(f"unknown tinymath model {role!r}; expected one of {', '.join(ROLES)}")
    folder = Path(str(resources.files(__name__))) / "weights" / role
    if not (folder / "model.safetensors").is_file():
        raise ConfigError(f"no weights in {folder}; train them with 'python -m rollouts.tinymath.training.train'")
    with refusing_damage(folder, ConfigError, "model", "Install trim-routing again."):
        check(folder, read_sealed(folder.parent / CHECKSUMS)[role])
    return folder
