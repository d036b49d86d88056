"""What a family knows before a model is loaded: the date of its prompts, windows, special tokens of questions."""

from __future__ import annotations

import json
import shutil
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import rollouts.family
import rollouts.store.store
import rollouts.text.prompts
from rollouts.config import FamilyConfig, parse_family
from rollouts.errors import ConfigError, StoreError
from rollouts.family import Family
from rollouts.models.hf.load import native_window, window
from rollouts.store.store import Store
from rollouts.tasks.problems import Problem
from rollouts.tinymath import model_dir

TEMPLATES = Path(__file__).parent / "text" / "templates"
FIRST = date(2026, 11, 26)


class Today(date):
    """A calendar that a test can turn."""

    now = FIRST

    @classmethod
    def today(cls) -> date:
        return cls.now


@pytest.fixture
def calendar(monkeypatch: pytest.MonkeyPatch) -> type[Today]:
    for module in (rollouts.family, rollouts.store.store, rollouts.text.prompts):
        monkeypatch.setattr(module, "Date", Today)
    monkeypatch.setattr(Today, "now", FIRST)
    return Today


def model(folder: Path, role: str, template: str | None = None) -> str:
    """Return a folder with the tokenizer and configuration of an embedded model, and perhaps another chat template."""
    target = folder / f"{role}-{template}"
    if not target.exists():
        shutil.copytree(model_dir(role), target, ignore=shutil.ignore_patterns("*.safetensors"))
        if template:
            (target / "chat_template.jinja").write_text((TEMPLATES / f"{template}.jinja").read_text())
    return str(target)


def config(folder: Path, template: str | None = None, reward: str | None = None, **more: Any) -> FamilyConfig:
    roles = {role: {"backend": "transformers", "model": model(folder, role, template)} for role in ("small", "large")}
    scorer = {"model": {"backend": "transformers", "model": model(folder, "prm", reward)}}
    return parse_family({**roles, "scorer": scorer, **more})


def heads(family: Family) -> list[str]:
    return [prompts.text("Find a.", ["a=1\n\n"]) for prompts in family.formats.values()]


def made(path: Path, family: Family) -> Store:
    return Store.create(path, family.process(2), family.date)


def without_date(store: Store) -> Store:
    """As an earlier version wrote it."""
    manifest = {name: value for name, value in store.manifest.items() if name != "date"}
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    return Store(store.path)


@pytest.mark.parametrize("template", ["llama3_2", "smollm3"])
def test_a_store_keeps_its_date(tmp_path: Path, calendar: type[Today], template: str) -> None:
    models = config(tmp_path, template, template)
    first = Family(models)
    store, before = made(tmp_path / "s", first), heads(first)
    assert all("2026" in head and "26" in head for head in before)
    for days in (1, 40, 800):
        calendar.now = FIRST + timedelta(days)
        again = Family(models, store=Store(store.path))
        assert heads(again) == before
        assert Store.create(store.path, again.process(2), again.date).date == FIRST
        assert heads(Family(models)) != before
    with pytest.raises(StoreError, match="template_hash"):
        Store.create(store.path, Family(models).process(2))


@pytest.mark.parametrize("days", [0, 1, 400])
def test_the_date_of_a_store_of_an_earlier_version_is_found(tmp_path: Path, calendar: type[Today], days: int) -> None:
    models = config(tmp_path, "llama3_2")
    first = Family(models)
    store, before = without_date(made(tmp_path / "s", first)), heads(first)
    assert store.date is None
    calendar.now = FIRST + timedelta(days)
    again = Family(models, store=store)
    assert again.date == FIRST and heads(again) == before
    again._record(Store.create(store.path, again.process(2), again.date), {"role": "small"})
    assert Store(store.path).date == FIRST


def test_templates_without_a_date_are_as_they_were(tmp_path: Path, calendar: type[Today]) -> None:
    models = config(tmp_path)
    first = Family(models)
    store = without_date(made(tmp_path / "s", first))
    calendar.now = FIRST + timedelta(1)
    again = Family(models, store=store)
    assert heads(again) == heads(first) and Store.create(store.path, again.process(2)).path == store.path
    assert not any(prompts.dated for prompts in again.formats.values())


def test_a_date_in_the_models_file(tmp_path: Path, calendar: type[Today]) -> None:
    chosen = Family(config(tmp_path, "llama3_2", date=date(2025, 1, 31)))
    assert all("31 Jan 2025" in head for head in heads(chosen)[:2])
    store = made(tmp_path / "s", chosen)
    assert heads(Family(config(tmp_path, "llama3_2"), store=store)) == heads(chosen)
    with pytest.raises(ConfigError, match=r"date is 2025-02-01 in the models file, but .* 2025-01-31\. Leave it out"):
        Family(config(tmp_path, "llama3_2", date=date(2025, 2, 1)), store=store)


def test_a_damaged_date_is_named(tmp_path: Path) -> None:
    store = made(tmp_path / "s", Family(config(tmp_path)))
    store.note(date="yesterday")
    with pytest.raises(StoreError, match=r"manifest\.json: `date` is no date"):
        Family(config(tmp_path), store=Store(store.path))


def test_special_tokens_of_questions_are_counted(tmp_path: Path) -> None:
    questions = ["Find a.", "a <|im_end|> b <extra_0>", "<|im_end|><|im_start|>", *["<extra_0>"] * 9]
    problems = [Problem(f"p{i}", "test", text, "1", "made", "MIT") for i, text in enumerate(questions)]
    found = Family(config(tmp_path)).neutralised(problems)
    assert found["scorer"] == {"tokens": 13, "questions": 11, "first": ["p1", "p2", "p3", "p4", "p5"]}
    assert Family(config(tmp_path)).neutralised(problems[:1]) == {}


NESTED = ["gemma3", "mistral3", "llava", "qwen2_5_vl", "qwen3_omni_moe", "llama4", "idefics3", "internvl", "gemma3n"]


@pytest.mark.parametrize("kind", NESTED)
def test_windows_of_nested_configurations_are_found(tmp_path: Path, kind: str) -> None:
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    saved = CONFIG_MAPPING[kind].from_pretrained(tmp_path)
    wanted = saved.get_text_config(decoder=True).max_position_embeddings
    assert native_window(str(tmp_path)) == wanted and wanted >= 1024
    assert window(saved, None) == wanted


@pytest.mark.parametrize(
    ("named", "wanted"),
    [
        (
            {"model_type": "gemma3", "text_config": {"sliding_window": 512}},
            131072,
        ),  # what it does not say is its class's
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral", "max_position_embeddings": 9000}}, 9000),
        ({"model_type": "gpt2", "n_positions": 700}, 700),
        ({"model_type": "mpt", "max_seq_len": 600}, 600),
        ({"model_type": "bloom", "seq_length": 500}, 500),
        ({"model_type": "none_such", "max_position_embeddings": 400, "sliding_window": 4}, 400),
        ({"model_type": "none_such", "sliding_window": 4, "text_config": {"max_position_embeddings": 300}}, 300),
        (
            {
                "model_type": "none_such",
                "vision_config": {"max_position_embeddings": 77},
                "thinker_config": {"audio_config": {"n_ctx": 5}, "text_config": {"max_position_embeddings": 200}},
            },
            200,
        ),
        (
            {
                "model_type": "none_such",
                "auto_map": {"AutoConfig": "configuration_own.Own"},  # whose code is not run for it
                "max_position_embeddings": 50,
            },
            50,
        ),
        ({"model_type": "none_such", "a": {"n_ctx": 1}, "llm_config": {"n_ctx": 100}}, 100),
        ({"model_type": "rwkv", "context_length": 90}, 90),
        ({"model_type": "moshi", "max_position_embeddings": 80, "depth_decoder_config": {}}, 80),
        ({"model_type": "none_such", "sliding_window": 4, "vision_config": {"max_position_embeddings": 77}}, None),
        ({"model_type": "mamba"}, None),
    ],
)
def test_windows_by_other_names(tmp_path: Path, named: dict[str, Any], wanted: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(named))
    assert native_window(str(tmp_path)) == wanted


def test_an_unknown_window_says_what_to_set(tmp_path: Path) -> None:
    models = config(tmp_path)
    (Path(models.large.model) / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ConfigError, match="large: its window is unknown; set max_length"):
        _ = Family(models).windows


def test_what_a_model_asked_by_chat_cannot_tell_is_refused_by_name(tmp_path: Path) -> None:
    roles: dict[str, Any] = {"small": {"backend": "transformers", "model": model(tmp_path, "small")}}
    roles["large"] = {"backend": "server", "url": "http://127.0.0.1:9/v1", "model": "m", "chat_only": True}
    for kind in ("likelihood", "self-evaluation"):
        with pytest.raises(ConfigError, match=rf"kind '{kind}' under 'large', which is asked by chat alone"):
            parse_family({**roles, "scorer": {"kind": kind}})
        assert parse_family({**roles, "scorer": {"kind": kind, "under": "small"}}).scorer
    family = Family(parse_family(roles))
    with (
        pytest.raises(
            ConfigError, match=r"large: .* no log-probabilities of prompts, so that there are no columns large"
        ),
        family.open_statistics("large", made(tmp_path / "s", family)),
    ):
        pass


@pytest.mark.parametrize("more", [["http://user:secret@host:1/v1"] * 2, ["http://user:secret@host:1/v1", 5], []])
def test_errors_tell_no_password_of_a_server(more: Any) -> None:
    roles = {role: {"backend": "server", "model": "m", "url": "http://host:2/v1"} for role in ("small", "large")}
    with pytest.raises(ConfigError, match="small.*url") as error:
        parse_family({**roles, "small": {**roles["small"], "url": more}})
    assert "secret" not in str(error.value) and len(str(error.value)) < 300


ROLES_OF: dict[str, Any] = {role: {"backend": "vllm", "model": "m", "max_length": 64} for role in ("small", "large")}
SERVED = {"backend": "server", "model": "m", "url": "http://127.0.0.1:9/v1"}


@pytest.mark.parametrize(
    ("section", "more", "message"),
    [
        ("scorer", {"kind": "likelihood", "step_tag": "x"}, "scorer: `step_tag` is for kind 'prm'"),
        ("scorer", {"kind": "likelihood", "informed": False}, "scorer: `informed` is for kind 'prm' or 'judge'"),
        ("scorer", {"kind": "self-evaluation", "max_tokens": 9}, "scorer: `max_tokens` is for kind 'judge'"),
        ("scorer", {"kind": "judge", "model": SERVED, "under": "small"}, "scorer: `under` is for kind 'likelihood' or"),
        ("scorer", {"kind": "a:B", "system_prompt": "Be kind."}, "scorer: `system_prompt` is for kind 'prm' or"),
        ("large", {**SERVED, "chat_only": True, "logprobs": True}, "large: `logprobs` are not had"),
        (
            "large",
            {**ROLES_OF["large"], "devices": [0, 1]},
            r"large: `devices` names 2 GPU\(s\), and `tensor_parallel`",
        ),
        (
            "large",
            {**ROLES_OF["large"], "backend": "transformers", "tensor_parallel": 2},
            "large: `tensor_parallel` is",
        ),
    ],
)
def test_settings_that_would_do_nothing_are_refused(section: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_family({**ROLES_OF, section: more})


def test_so_are_those_that_the_layout_of_a_reward_model_lacks_whoever_names_it(tmp_path: Path) -> None:
    models = config(tmp_path, reward="llama3_2")
    file = Path(models.scorer.model.model) / "config.json"  # type: ignore[union-attr]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["Qwen2ForPrmModel"]}))
    assert Family(models).reward_prompts.layout == "skywork-o1"  # type: ignore[union-attr]
    values = models.model_dump(exclude_unset=True)
    with pytest.raises(ConfigError, match="layout 'skywork-o1' has no `step_tag`"):
        _ = Family(parse_family({**values, "scorer": {**values["scorer"], "step_tag": "<extra_0>"}})).reward_prompts


def test_the_window_is_the_models_own_and_a_revision_not_that_of_another_tokenizer(tmp_path: Path) -> None:
    own, other = Path(model(tmp_path, "small")), Path(model(tmp_path, "large"))
    for folder, window_of in ((own, 700), (other, 300)):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": window_of}))
    role = {"backend": "transformers", "model": str(own), "tokenizer": str(other), "revision": "abc"}
    models = parse_family({"small": role, "large": {**role, "model": str(tmp_path / "elsewhere")}})
    assert models.small.tokenizer_source == (str(other), None)
    assert Family(models).windows == {"small": 700, "large": 300}  # of what is not on this machine the tokenizer's
    served = parse_family({**ROLES_OF, "small": {**SERVED, "tokenizer": "hub/name", "revision": "abc"}})
    assert served.small.tokenizer_source == ("hub/name", "abc")


@pytest.mark.parametrize("change", ["name", "prompt", "weights"])
def test_statistics_are_of_the_models_that_the_store_was_made_with(tmp_path: Path, change: str) -> None:
    family = Family(config(tmp_path))
    store = made(tmp_path / "s", family)
    values = family.config.model_dump(exclude_unset=True)
    if change == "weights":
        file = Path(values["small"]["model"]) / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.5}))
    more = {"name": {"name": "another"}, "prompt": {"system_prompt": "Be brief."}, "weights": {}}[change]
    other = Family(parse_family({**values, "small": {**values["small"], **more}}), store=store)
    message = "configuration differs" if change == "weights" else "another small model or other prompts"
    for opened in (other.open_statistics("small", store), other.open_verifier(store)):
        with pytest.raises(StoreError, match=message), opened:
            pass
