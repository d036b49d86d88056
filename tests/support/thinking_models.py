"""The embedded models as models that think: real weights that write their steps in a block, close it, and answer.

What they write is what they always write. A token that stands only at the beginning of "The answer is ..." is called by
the name of the mark that closes the block, so that "he answer is ..." is left for the answer. What opens the block is a
token of its own that means to them what the line end before their first step means.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from rollouts.config import FamilyConfig, embedded_family, parse_family
from rollouts.tinymath import model_dir

MARKS = {"small": ("<think>\n", "</think>\n\n"), "large": ("[THINK]", "[/THINK]\n\n")}
_UNUSED = (254, 255)  # tokens of bytes that no text has


def thinking_folder(folder: Path, role: str, *, opens: bool) -> Path:
    """Make a model's folder; `opens`: its template opens the block itself."""
    opening, closing = MARKS[role]
    source = model_dir(role)
    folder.mkdir(parents=True)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        (folder / name).symlink_to(source / name)
    weights = load_file(source / "model.safetensors")
    described = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = described["model"]["vocab"]
    for token in [token for token, number in vocabulary.items() if number in _UNUSED]:
        del vocabulary[token]
    line_end, closes = vocabulary["\u010a"], vocabulary["T"]
    vocabulary |= {"T": _UNUSED[1], opening: _UNUSED[0], closing: closes}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    marks = {opening: _UNUSED[0], closing: closes}
    described["added_tokens"] += [{"id": number, "content": content, **plain} for content, number in marks.items()]
    described["added_tokens"].sort(key=lambda token: token["id"])
    (folder / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    embeddings = weights["model.embed_tokens.weight"]
    embeddings[_UNUSED[0]] = embeddings[line_end]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    template = (source / "chat_template.jinja").read_text(encoding="utf-8")
    before, first_line, after = template.rpartition("assistant\n")
    assert first_line
    (folder / "chat_template.jinja").write_text(before + "assistant" + opening * opens + after, encoding="utf-8")
    return folder


def thinking_family(folder: Path, backend: str = "transformers", **steps: Any) -> FamilyConfig:
    """The embedded family, thinking: a small model whose template opens the block, a large one with other marks."""
    values = embedded_family(backend).model_dump()
    for role in MARKS:
        place = folder / role
        made = place if place.exists() else thinking_folder(place, role, opens=role == "small")
        values[role] |= {"model": str(made), "think": MARKS[role], "name": f"thinking-{role}"}
    values["limits"]["solution_tokens"] = 512
    return parse_family({**values, "steps": {"split": "thinking", "max_thinking_tokens": 300, **steps}})
