"""Layouts of reward models: where scores are read, what questions and steps cannot say, and which is whose."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tiny_rewards import QUESTION, STEPS, llama2_tokenizer, make_reward_folder, scorer_config

from rollouts.config import LAYOUTS, StepsConfig, parse_family
from rollouts.errors import ConfigError
from rollouts.text import layouts
from rollouts.text.layouts import layout_of, reward_layout
from rollouts.text.prompts import RewardLayout
from rollouts.text.splitting import Splitting
from rollouts.text.steps import CLOSE
from rollouts.text.tokenizer import transformers_tokenizer
from rollouts.tinymath import model_dir

NEW = [name for name in LAYOUTS if name != "qwen2.5-math-prm"]
DAY = date(2026, 7, 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """What reads paths in a layout, over the tokenizer of a tiny folder."""

    @cache
    def layout(name: str) -> RewardLayout:
        folder = make_reward_folder(name, tmp_path_factory.mktemp(name)) if name in NEW else model_dir("prm")
        config = scorer_config(name, folder, **({} if name in NEW else {"system_prompt": ""}))
        return reward_layout(config, transformers_tokenizer(str(folder)), date=DAY)

    yield layout


@pytest.mark.parametrize("name", LAYOUTS)
class TestEveryLayout:
    def test_it_has_one_place_after_each_step(self, made: Any, name: str) -> None:
        layout = made(name)
        ids, places = layout.marked(QUESTION, STEPS)
        assert len(places) == len(STEPS) and list(places) == sorted(set(places)) and places[-1] < len(ids)
        assert layout.ids(QUESTION, STEPS) == ids
        for count in range(1, len(STEPS)):
            shorter, fewer = layout.marked(QUESTION, STEPS[:count])
            assert fewer == places[:count]
            assert shorter[: fewer[-1] + 1] == ids[: fewer[-1] + 1]  # what is read knows nothing of later steps
            between = layout.tokenizer.decode(ids[places[count - 1] + 1 : places[count] + 1])
            assert "".join(STEPS[count].split()) in "".join(between.replace("\u2581", "").split())

    @pytest.mark.parametrize("shape", ["{0}", "a {0}b", "{0}{0}", "x\n {0}\n", "\u241e{0}\u241e\u241e"])
    def test_nothing_that_is_said_is_a_special_token_or_a_step_tag(self, made: Any, name: str, shape: str) -> None:
        layout = made(name)
        special = {number for token, number in layout.tokenizer.added_tokens_encoder.items() if token.strip()}
        special |= {layout.reading.tag} - {None}
        plain = [token for token in layout.ids(QUESTION, ["One.\n\n", "Two."]) if token in special]
        for token in (*layout.tokenizer.all_special_tokens, *({getattr(layout, "step_tag", "")} - {""})):
            poison = shape.format(token)
            ids, places = layout.marked(QUESTION + poison, [f"One {poison}.\n\n", "Two."])
            assert [each for each in ids if each in special] == plain and len(places) == 2
            assert layout.special.count(QUESTION) == 0 < layout.special.count(QUESTION + poison)

    def test_its_hash_tells_it_from_others_and_is_the_same_each_day_unless_it_prints_it(
        self, made: Any, name: str
    ) -> None:
        layout = made(name)
        assert layout.template_hash not in [made(other).template_hash for other in LAYOUTS if other != name]
        assert layout.hash_on(DAY) == layout.template_hash
        assert layout.dated == (layout.hash_on(DAY + timedelta(1)) != layout.template_hash) == (name == "rlhflow")

    def test_what_closes_a_thinking_block_is_left_out(self, made: Any, name: str) -> None:
        layout, thought = made(name), [STEPS[0], STEPS[1].strip() + CLOSE + "\n\n", STEPS[2]]
        config = scorer_config(
            name, Path(layout.tokenizer.name_or_path), **({} if name in NEW else {"system_prompt": ""})
        )
        thinks = Splitting(StepsConfig(split="thinking"))
        assert reward_layout(config, layout.tokenizer, date=DAY, splitting=thinks).ids(QUESTION, thought) == layout.ids(
            QUESTION, STEPS
        )
        assert CLOSE in layout.text(QUESTION, thought)  # where nobody thinks it is text

    def test_without_steps_there_is_the_question(self, made: Any, name: str) -> None:
        assert QUESTION in made(name).text(QUESTION, []) and made(name).marked(QUESTION, [])[1] == ()


def test_skywork_reads_the_line_break_after_each_step(made: Any) -> None:
    layout = made("skywork-o1")
    bos, encode = layout.tokenizer.bos_token, layout.encode
    [line] = encode("\n")
    head = encode(f"{bos}{QUESTION}\n")
    lines = [encode(text) for text in ("a=70+33=103", "b=a+49=103+49=151", "which is odd", STEPS[2])]
    expected = (*head, *(token for each in lines for token in (*each, line)))
    ids, places = layout.marked(QUESTION, STEPS)
    assert ids == expected and [ids[place] for place in places] == [line] * 3
    assert places[0] == len(head) + len(lines[0]) and layout.reading.labels == 1


def test_math_shepherd_is_what_its_tokenizer_makes_of_the_text(made: Any) -> None:
    layout = made("math-shepherd")
    written = (
        f"{QUESTION} Step 1: a=70+33=103 \u043a\u0438\nStep 2: b=a+49=103+49=151\nwhich is odd \u043a\u0438\nStep 3: "
    )
    written += f"{STEPS[2]} \u043a\u0438"
    ids, places = layout.marked(QUESTION, STEPS)
    assert list(ids) == layout.tokenizer(written).input_ids and ids[0] == layout.tokenizer.bos_token_id
    assert {layout.tokenizer.convert_ids_to_tokens(ids[place]) for place in places} == {"\u2581\u043a\u0438"}
    wrong, right = layout.reading.verdicts
    assert layout.tokenizer.convert_ids_to_tokens([wrong, right]) == ["\u2581-", "\u2581+"]
    assert layout.text(QUESTION, ["Step 1: a=1"]).count("Step 1") == 1
    tagged = scorer_config("math-shepherd", Path("."), step_tag=" \u043a\u0438")
    assert reward_layout(tagged, layout.tokenizer).ids(QUESTION, STEPS) == ids


@pytest.mark.parametrize("empty", ["", "\n", f"\n{CLOSE}\n\n"])
def test_math_shepherd_reads_steps_without_text(empty: str) -> None:
    """Models end at once, or with nothing but what closes the block; two blanks would be a token of their own."""
    layout = layouts.ShepherdFormat(llama2_tokenizer(), splitting=Splitting(StepsConfig(split="thinking")))
    ids, places = layout.marked(QUESTION, [STEPS[0], empty, STEPS[2]])
    assert [ids[place] for place in places] == [layout.step_tag_id] * 3


def test_rlhflow_reads_before_each_verdict_of_a_chat_in_which_all_were_right(made: Any) -> None:
    layout = made("rlhflow")
    turns = [f"{QUESTION} {STEPS[0].strip()}", *(step.strip() for step in STEPS[1:])]
    said = [
        message
        for turn in turns
        for message in ({"role": "user", "content": turn}, {"role": "assistant", "content": "+"})
    ]
    clock = DAY.strftime
    whole = layout.tokenizer.apply_chat_template(said, tokenize=False, strftime_now=clock)
    text = layout.text(QUESTION, STEPS)
    assert whole.startswith(text) and whole[len(text) :].startswith("+")
    ids, places = layout.marked(QUESTION, STEPS)
    assert ids == layout.encode(text) and places[-1] == len(ids) - 1
    wrong, right = layout.reading.verdicts
    assert layout.tokenizer.decode([wrong, right]) == "-+"
    assert [ids[place + 1] for place in places[:-1]] == [right] * 2


def test_a_tokenizer_that_does_not_suit_is_refused(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = transformers_tokenizer(str(model_dir("small")))
    with pytest.raises(ConfigError, match=r"scorer: '\+ -' is 3 tokens"):
        layouts.ShepherdFormat(tokenizer)
    with pytest.raises(ConfigError, match="step tag 'xyz' after a blank is not one token"):
        layouts.ShepherdFormat(made("math-shepherd").tokenizer, "xyz")


class TestWhichItIs:
    def folder(self, at: Path, *architectures: str) -> Path:
        (at / "config.json").write_text(json.dumps({"model_type": "qwen2", "architectures": list(architectures)}))
        return at

    def test_a_configuration_may_tell(self, tmp_path: Path) -> None:
        assert layout_of(str(model_dir("prm"))) == "qwen2.5-math-prm"
        assert layout_of(str(self.folder(tmp_path, "Qwen2ForPrmModel"))) == "skywork-o1"

    @pytest.mark.parametrize("architectures", [("LlamaForCausalLM",), ("Qwen2ForTokenClassification",), ()])
    def test_where_it_does_not_the_choices_are_named(self, tmp_path: Path, architectures: tuple[str, ...]) -> None:
        with pytest.raises(ConfigError) as caught:
            layout_of(str(self.folder(tmp_path, *architectures)))
        assert all(f'"{name}"' in str(caught.value) for name in LAYOUTS) and "`layout`" in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        with pytest.raises(ConfigError, match="layout"):
            layout_of(str(tmp_path / "nowhere"))

    @pytest.mark.parametrize(
        ("told", "words"),
        [
            ({"layout": "skywork"}, r"scorer: .*Did you mean 'skywork-o1'\?"),
            ({"layout": "skywork-o1", "step_tag": "x"}, "layout 'skywork-o1' has no `step_tag`"),
            (
                {"layout": "math-shepherd", "system_prompt": "Be brief."},
                "layout 'math-shepherd' has no `system_prompt`",
            ),
            ({"kind": "likelihood", "model": None, "layout": "rlhflow"}, "`layout` is for kind 'prm'"),
            ({"prompt": "{question} {step}"}, "`prompt` is for kind 'judge'"),
            ({"kind": "judge"}, "a judge is asked through backend 'server'"),
        ],
    )
    def test_a_models_file_that_contradicts_itself_is_refused(self, told: dict[str, Any], words: str) -> None:
        role = {"backend": "transformers", "model": str(model_dir("small"))}
        with pytest.raises(ConfigError, match=words):
            parse_family({"small": role, "large": role, "scorer": {"model": role, **told}})

    def test_only_those_that_speak_get_the_usual_system_message(self) -> None:
        role = {"backend": "transformers", "model": "m"}
        assert scorer_config("rlhflow", Path("m")).system_prompt is None
        assert scorer_config("rlhflow", Path("m"), system_prompt="Be brief.").system_prompt == "Be brief."
        family = parse_family({"small": role, "large": role, "scorer": {"model": role, "layout": "qwen2.5-math-prm"}})
        assert family.scorer is not None and "step by step" in str(family.scorer.system_prompt)
        assert parse_family(family.model_dump()) == family
