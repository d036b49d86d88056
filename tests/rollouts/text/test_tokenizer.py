"""Tokenizers and chat templates out of a folder are those of transformers, which serving does without."""

from __future__ import annotations

import json
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_templates import SHAPES, TEMPLATES
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rollouts.errors import ConfigError
from rollouts.text.prompts import Chat, PromptFormat, RewardFormat
from rollouts.text.tokenizer import load_tokenizer, model_file
from rollouts.tinymath import STEP_TAG, model_dir

DAY = date(2026, 7, 4)
WORDS = [
    "a",
    "é",
    "e\u0301",
    " ",
    "\n",
    "\n\n",
    "12 + 3",
    "<|im_end|>",
    "<s>",
    "[INST]",
    "<think>",
    "\u2028",
    "/no_think",
]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=8).map("".join)
MESSAGES = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), TEXTS), min_size=1, max_size=4)


@pytest.fixture(scope="module", params=list(SHAPES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a family: its template and special tokens, tinymath's vocabulary."""
    shape, made = SHAPES[request.param], tmp_path_factory.mktemp(request.param)
    backend = Tokenizer.from_file(str(model_dir("prm") / "tokenizer.json"))
    tokens = [AddedToken(each, special=True) for each in shape.special]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=shape.bos,
        eos_token=shape.special[-1],
        pad_token=AddedToken("<pad>", lstrip=True, special=True),
        extra_special_tokens=tokens[:-1],
        chat_template=(TEMPLATES / f"{request.param}.jinja").read_text(encoding="utf-8"),
    )
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    tokenizer.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Any, Any]:
    return load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(str(folder))


def rendered(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    """What a template makes of a conversation; its own errors are part of that."""
    strftime_now = datetime(DAY.year, DAY.month, DAY.day).strftime
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=strftime_now, **options))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@settings(max_examples=30)
@given(turns=MESSAGES, system=st.none() | TEXTS, ask=st.booleans(), think=st.booleans())
def test_conversations_are_rendered_alike(
    both: tuple[Any, Any], turns: list[tuple[str, str]], system: str | None, ask: bool, think: bool
) -> None:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": role, "content": text} for role, text in turns]
    own, theirs = (rendered(each, messages, add_generation_prompt=ask, enable_thinking=think) for each in both)
    assert own == theirs


@settings(max_examples=60)
@given(text=TEXTS)
def test_texts_have_the_same_ids(both: tuple[Any, Any], text: str) -> None:
    own, theirs = both
    encoded = own.backend_tokenizer.encode(text, add_special_tokens=False)
    expected = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded.ids == expected["input_ids"] and encoded.offsets == expected["offset_mapping"]
    assert own.decode(encoded.ids) == theirs.decode(encoded.ids)


def test_what_templates_take_from_a_caller_is_not_what_others_give_them(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_dir("small") / name).read_bytes())
    template = "{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ messages }}{{ eos_token }}{{ effort }}"
    (tmp_path / "chat_template.jinja").write_text(template)
    for each in (load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(str(tmp_path))):
        assert Chat(each, None, "model", DAY).takes == {"effort"}


def test_special_tokens_are_the_same(both: tuple[Any, Any]) -> None:
    own, theirs = both
    assert own.special_tokens_map == theirs.special_tokens_map and own.chat_template == theirs.chat_template
    known = [{number: repr(token) for number, token in each.added_tokens_decoder.items()} for each in both]
    assert known[0] == known[1]
    assert (own.eos_token_id, own.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_formats_have_the_same_hashes(both: tuple[Any, Any], system: str | None) -> None:
    def found(make: Any, *more: Any) -> str:
        try:
            made = make(*more, date=DAY)
        except ConfigError as error:
            return str(error)
        return f"{made.template_hash} {made.dated} {made.ids('What is 6 < 7?', ['One.'])}"

    own, theirs = ((found(PromptFormat, one, system), found(RewardFormat, one, system, STEP_TAG)) for one in both)
    assert own == theirs


@pytest.mark.parametrize("shape", ["list", "inside", "file wins", "old files", "generation", "mapping"])
def test_templates_and_tokens_are_found_where_they_may_be(tmp_path: Path, shape: str) -> None:
    source = model_dir("small")
    config = json.loads((source / "tokenizer_config.json").read_text())
    template = (
        "{% for m in messages %}{{ bos_token }}{{ m.role }}:{{ m.content | tojson }}{{ tools is none }}{% endfor %}"
    )
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    if shape == "list":
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
        config["chat_template"] = named
    else:
        config["chat_template"] = template
    if shape == "file wins":
        (tmp_path / "chat_template.jinja").write_text(template + "!")
    if shape == "generation":
        config["chat_template"] = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    if shape == "mapping":
        config |= {
            "extra_special_tokens": {"image_token": "<image>"},
            "chat_template": "{{ image_token }}{{ eos_token }}",
        }
    if shape == "old files":
        config.pop("added_tokens_decoder", None)
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<old>", "lstrip": True,
            "rstrip": False, "normalized": False, "single_word": False}}))  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    own, theirs = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(str(tmp_path))
    messages = [{"role": "user", "content": 'a "quoted" <é>'}]
    assert rendered(own, messages) == rendered(theirs, messages) != ""
    text = "x <old> y <image>z"
    assert own.backend_tokenizer.encode(text).ids == theirs.backend_tokenizer.encode(text).ids


def test_a_qwen_is_normalised_as_transformers_does(tmp_path: Path) -> None:
    for file in model_dir("small").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    plain = json.loads((tmp_path / "tokenizer.json").read_text()) | {"normalizer": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    own, theirs = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(str(tmp_path))
    for text in ("e\u0301", "\u2126 \ufb01", "12 + 3"):
        assert own.backend_tokenizer.encode(text).ids == theirs.backend_tokenizer.encode(text).ids


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path: Path) -> None:
    backend = Tokenizer.from_file(str(model_dir("small") / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.pre_tokenizer = backend.pre_tokenizer or pre_tokenizers.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(str(tmp_path)).backend_tokenizer.encode("12 + 34").ids) not in (2, 9)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_are_named(tmp_path: Path, file: str) -> None:
    for each in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / each).write_bytes((model_dir("small") / each).read_bytes())
    (tmp_path / file).write_text("{")
    with pytest.raises(ConfigError, match="is damaged") as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_a_name_that_is_nowhere_has_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert model_file("not a/name/at all", "config.json") is None
