"""Encoding by pieces gives the ids of the whole text, or is not done."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rollouts.text.tokenizer import load_tokenizer
from rollouts.text.tokens import Encoder, Remembered, encoder_of
from rollouts.tinymath import model_dir

SPECIAL = ["<|im_start|>", "<|im_end|>", "<extra_0>", "<|im", "_start|>"]
TEXTS = st.lists(st.sampled_from([*SPECIAL, " ", "\n", "\n\n", "a", "é", "12 + 3", "User", "\u2581"]), max_size=12)


def made(pre: Any, normalizer: Any = None, *, special: list[Any] | None = None) -> Any:
    """A tokenizer of single characters and a few merges."""
    characters = sorted({*pre_tokenizers.ByteLevel.alphabet(), "\u2581", " ", "\n", *"éàb"})
    vocabulary = {each: number for number, each in enumerate(["<unk>", *characters, "12", "er", "\u2581a", "Ġ+"])}
    merges = [("1", "2"), ("e", "r"), ("\u2581", "a"), ("Ġ", "+")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens(special or [AddedToken(each, normalized=False) for each in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUT = {
    "tinymath": load_tokenizer(str(model_dir("prm"))),
    "bytes": made(BYTES),
    "accents": made(BYTES, normalizers.NFD()),
    "always a space": made(pre_tokenizers.Metaspace(prepend_scheme="always")),
}
WHOLE = {
    "a space at the beginning only": made(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "a token that takes the space before it": made(BYTES, special=[AddedToken("<extra_0>", lstrip=True)]),
}


@pytest.mark.parametrize("name", [*CUT, *WHOLE])
@settings(deadline=None)
@given(parts=TEXTS)
def test_every_text_gets_the_ids_of_the_tokenizer_itself(name: str, parts: list[str]) -> None:
    tokenizer, text = (CUT | WHOLE)[name], "".join(parts)
    assert encoder_of(tokenizer)(text) == tuple(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("name", CUT)
def test_known_pieces_are_not_encoded_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    whole = Encoder.whole
    monkeypatch.setattr(Encoder, "whole", lambda self, text: asked.append(text) or whole(self, text))
    encoder = Encoder(CUT[name])
    asked.clear()
    for steps in (["one"], ["one", "two"], ["one", "two", "three"]):
        encoder("<|im_end|>question<|im_end|>" + "".join(step + "<extra_0>" for step in steps))
    assert asked == ["question", "one", "two", "three"]


@pytest.mark.parametrize("name", WHOLE)
def test_where_pieces_depend_on_their_neighbours_texts_are_encoded_whole(name: str) -> None:
    encoder = Encoder(WHOLE[name])
    assert encoder._cut is None


def test_models_with_the_same_vocabulary_share_their_pieces() -> None:
    small, large = (load_tokenizer(str(model_dir(role))) for role in ("small", "large"))
    assert small is not large and encoder_of(small) is encoder_of(large)
    assert encoder_of(CUT["bytes"]) is not encoder_of(CUT["accents"])


def test_what_is_remembered_is_weighed() -> None:
    asked: list[str] = []
    remembered = Remembered(lambda text: asked.append(text) or tuple(range(len(text))), 100_000)  # type: ignore[func-returns-value]
    for number in range(300):
        remembered(f"{number} " + "a" * 50)
        remembered(f"{number} " + "a" * 5000)  # too long to be kept
        assert remembered.bytes <= 100_000
    asked.clear()
    assert len(remembered("299 " + "a" * 50)) == 54 and remembered("299 " + "a" * 5000) and remembered("0 " + "a" * 50)
    assert asked == ["299 " + "a" * 5000, "0 " + "a" * 50]
