"""Makes the family's models, and reads and writes their Hugging Face folders; knows nothing of training.

Shapes and tokenizer are what ``config.json`` and ``tokenizer.json`` of the bundled folders say: true Qwen2 ones, with a
vocabulary of 261 tokens (the byte-level alphabet, the step delimiter, four marks).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from rollouts.files.sealed import checksums, write_sealed
from rollouts.models.hf.reward_model import ProcessRewardModel
from rollouts.tinymath import CHECKSUMS, ROLES

WEIGHTS = Path(__file__).parents[1] / "weights"


def new_model(role: str) -> Qwen2ForCausalLM | ProcessRewardModel:
    """A model of a role with fresh weights, in float32."""
    config = Qwen2Config.from_pretrained(WEIGHTS / role)
    config.dtype = torch.float32
    return ProcessRewardModel(config) if role == "prm" else Qwen2ForCausalLM(config)


def save_model(model: torch.nn.Module, role: str, folder: Path) -> None:
    """Write a model's folder, in half precision; the weights are replaced at once."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (WEIGHTS / role).iterdir():
        if path.suffix != ".safetensors" and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    state = {
        name: value.detach().to(torch.float16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    written = folder / ".model.safetensors"
    save_file(state, written, metadata={"format": "pt"})
    written.chmod(0o644)  # safetensors writes files that only their owner can read
    os.replace(written, folder / "model.safetensors")


def note_checksums(folder: Path) -> None:
    """Write down, beside the models' folders, what tells whether a file was damaged since."""
    write_sealed(folder / CHECKSUMS, {role: checksums(folder / role) for role in ROLES})


def load_model(role: str, folder: Path) -> Qwen2ForCausalLM | ProcessRewardModel:
    """Read a model's folder back, in float32, ready for inference."""
    model = new_model(role)
    state = load_file(folder / "model.safetensors")
    if role != "prm":
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()
