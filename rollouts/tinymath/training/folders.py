"""Writes and reads the models' Hugging Face folders: tokenizer, configuration and half-precision weights.

Knows nothing of how the models are trained. Imports torch and transformers.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model, Qwen2Tokenizer

PAD, START, END, TAG = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<extra_0>"
#: The layers, width and so on of each role; heads are 64 wide, as attention kernels like them.
SHAPES: Mapping[str, Mapping[str, int]] = {
    "small": {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256, "num_attention_heads": 2},
    "large": {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 384, "num_attention_heads": 2},
    "prm": {"hidden_size": 128, "num_hidden_layers": 6, "intermediate_size": 384, "num_attention_heads": 2},
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> Qwen2Tokenizer:
    """A true Qwen2 tokenizer of 261 tokens: the byte-level alphabet, the step delimiter, four marks."""
    alphabet = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"]
    tokenizer = Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(alphabet)},
        merges=[("Ċ", "Ċ")],
        unk_token=None,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START, TAG],
        model_max_length=1024,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def build_config(role: str) -> Qwen2Config:
    """The configuration of a role's model, as saved beside its weights."""
    tokenizer = build_tokenizer()
    shape = SHAPES[role]
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        num_key_value_heads=shape["num_attention_heads"],
        max_position_embeddings=1024,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=None,
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        use_cache=True,
        **shape,
    )
    config.architectures = ["Qwen2ForProcessRewardModel" if role == "prm" else "Qwen2ForCausalLM"]
    if role == "prm":
        config.num_labels = 2
    config.dtype = torch.float16
    return config


class ProcessRewardModel(torch.nn.Module):
    """A Qwen2 trunk and a two-label head at every token: the layout of ``Qwen2ForProcessRewardModel``."""

    def __init__(self, config: Qwen2Config) -> None:
        """Make a model with fresh weights."""
        super().__init__()
        self.config = config
        self.model = Qwen2Model(config)
        self.score = torch.nn.Sequential(
            torch.nn.Linear(config.hidden_size, config.hidden_size),
            torch.nn.ReLU(),
            torch.nn.Linear(config.hidden_size, 2),
        )

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of shape (batch, length, 2); label 1 is "every step so far is right"."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return self.score(hidden)


def new_model(role: str) -> Qwen2ForCausalLM | ProcessRewardModel:
    """A model of a role with fresh weights, in float32."""
    config = build_config(role)
    config.dtype = torch.float32
    return ProcessRewardModel(config) if role == "prm" else Qwen2ForCausalLM(config)


def save_model(model: torch.nn.Module, role: str, folder: Path) -> None:
    """Write a model's folder; every file is replaced at once, so that a reader never sees half of one."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{role}-") as temporary:
        target = Path(temporary)
        build_tokenizer().save_pretrained(target)
        build_config(role).save_pretrained(target)
        state = {
            name: value.detach().to(torch.float16).contiguous()
            for name, value in model.state_dict().items()
            if name != "lm_head.weight"  # tied to the embedding
        }
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((target / "config.json").read_text())
        # Readers older than transformers 5 look for these two names.
        config.setdefault("torch_dtype", "float16")
        config.setdefault("rope_theta", 10000.0)
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if role != "prm":
            generation = {"eos_token_id": config["eos_token_id"], "pad_token_id": config["pad_token_id"]}
            (target / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        for path in sorted(target.iterdir()):
            path.chmod(0o644)  # safetensors writes files that only their owner can read
            os.replace(path, folder / path.name)


def load_model(role: str, folder: Path, dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM | ProcessRewardModel:
    """Read a model's folder back, ready for inference."""
    model = new_model(role)
    state = load_file(folder / "model.safetensors")
    if role != "prm":
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.to(dtype).eval()
