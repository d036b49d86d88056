"""Generations that think: their steps, their budget, closing by force, and single steps that are those of paths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recited import Recited

from rollouts.config import Limits, Sampling, StepsConfig
from rollouts.models.base import Completion
from rollouts.models.stepwise import Draft, Generation, StepRules
from rollouts.text.prompts import PromptFormat
from rollouts.text.splitting import Splitting
from rollouts.text.steps import Prefix, StopReason
from rollouts.text.tokenizer import load_tokenizer
from rollouts.tinymath import model_dir

MARKS = ("<think>\n", "</think>\n\n")
QUESTION = "Let a=1+2. Find a."


def rules_of(limits: Limits = Limits(), marks: tuple[str, str] = MARKS, **steps: Any) -> StepRules:  # noqa: B008
    steps = {"split": "thinking", **steps}
    splitting = Splitting(StepsConfig(**steps))
    prompts = PromptFormat(load_tokenizer(str(model_dir("small"))), marks=marks if splitting.thinks else None)
    return StepRules("small", prompts, 512, Sampling(), limits, lambda question, texts: True, splitting=splitting)


def recited(rules: StepRules, text: str, *before: str, used: int = 0, whole: bool = False, **told: Any) -> Generation:
    draft = Draft(rules, Prefix("p", QUESTION, 0, before, used), whole=whole)
    model = Recited(rules, draft.prompt, text, **told)
    while draft.generation is None:
        draft.take(model(draft.request()))
    return draft.generation


def reasons(generation: Generation) -> list[str]:
    return [str(step.stop_reason) for step in generation.steps]


KINDS = {
    "plain": rules_of(),
    "other marks": rules_of(marks=("[THINK]", "[/THINK]")),
    "options": rules_of(min_tokens=7, cues=("Wait", "But"), sentences=2),
    "sentences": rules_of(split="sentence", min_tokens=3),
    "tight": rules_of(Limits(step_tokens=9), max_thinking_tokens=30, sentences=1),
}
TEXTS = st.lists(
    st.sampled_from(
        ["a=1", "So 3.", " It is 2!", " Wait", "But no", " ", "\n", "\n\n", "\n \n", "---", "?", "\\boxed{1}"]
        + ["\n</think>\n\n", "</think>", "[/THINK]", "</think>\n"]
    ),
    max_size=14,
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [(), ("b=2\n\n",), ("b=2\n</think>\n\n",)], ids=["start", "thinking", "answer"])
@settings(max_examples=60)
@given(text=TEXTS)
def test_a_step_is_the_first_of_the_whole_path(kind: str, before: tuple[str, ...], text: str) -> None:
    rules = KINDS[kind]
    alone, path = (recited(rules, text, *before, used=5 * len(before), whole=whole) for whole in (False, True))
    assert alone.steps[0] == path.steps[0]
    assert alone.decoded == alone.steps[0].tokens + alone.cut_tokens
    assert path.decoded == sum(step.tokens for step in path.steps) + path.cut_tokens
    assert sum("</think>" in step.text for step in path.steps if step.thinking) <= 1
    assert all(step.tokens <= rules.limits.step_tokens for step in path.steps)
    if rules.splitting.thinks:
        thinking = [step.thinking for step in path.steps]
        assert thinking == sorted(thinking, reverse=True)  # first the block, then the answer
        assert not any(step.has_answer or step.stop_reason is StopReason.BOXED for step in path.steps if step.thinking)


def test_a_path_ends_with_the_block_and_the_answer_is_the_next() -> None:
    rules = rules_of()
    thought = recited(rules, "a=1+2.\n\nSo \\boxed{4}?\n\nNo.\n</think>\n\nIt is \\boxed{3}.", whole=True)
    assert [step.text for step in thought.steps] == ["a=1+2.\n\n", "So \\boxed{4}?\n\n", "No.\n</think>\n\n"]
    assert reasons(thought) == ["delimiter"] * 3 and thought.cut_tokens == thought.dropped == 0
    answer = recited(rules, "It is \\boxed{3}.", *(step.text for step in thought.steps), whole=True)
    assert reasons(answer) == ["boxed"] and not answer.steps[0].thinking
    assert rules.splitting.answer([step.text for step in (*thought.steps, *answer.steps)]) == "It is \\boxed{3}."
    assert rules.splitting.answer([step.text for step in thought.steps[:2]]) == ""


@pytest.mark.parametrize("whole", [False, True])
def test_a_block_that_has_spent_its_budget_is_closed_by_force(whole: bool) -> None:
    rules = rules_of(max_thinking_tokens=20)
    cut_off = recited(rules, "a=1+2=3 and so on and on without an end", whole=whole)
    assert [step.text for step in cut_off.steps] == ["a=1+2=3 and so on an\n</think>\n\n"]
    assert reasons(cut_off) == ["forced"] and cut_off.steps[0].tokens == 20 and not cut_off.steps[0].terminal
    exact = recited(rules, "a=1+2=3.\n\nMore of it.\n\n", "b=2\n\n", used=11, whole=whole)
    assert exact.steps[0].text == "a=1+2=3.\n</think>\n\n" and reasons(exact)[0] == "forced"
    assert exact.steps[0].tokens == 9 and exact.cut_tokens == exact.decoded - 9


@pytest.mark.parametrize("whole", [False, True])
def test_a_step_that_has_reached_its_own_limit_closes_the_block(whole: bool) -> None:
    rules = rules_of(Limits(step_tokens=6))
    assert reasons(recited(rules, "a=1+2=3 and so on", whole=whole)) == ["forced"]
    answer = recited(rules, "a=1+2=3 and so on", "x</think>\n\n", whole=whole)
    assert reasons(answer) == ["length"] and answer.steps[0].terminal


def test_the_ends_of_a_solution_end_it_within_the_block_too() -> None:
    rules = rules_of(Limits(solution_tokens=50, max_steps=3), max_thinking_tokens=40)
    assert reasons(recited(rules, "a=1")) == ["eos"]
    assert reasons(recited(rules, "a=1\n\nb=2\n\n", "x\n\n", "y\n\n", used=8)) == ["max_steps"]
    assert reasons(recited(rules, "on and on and on", used=49)) == ["length"]
    crowded = replace(rules, fits=lambda question, texts: len(texts) < 2)
    assert reasons(recited(crowded, "a=1\n\nb=2\n\nc=3\n\n", whole=True)) == ["delimiter", "context"]


def test_hidden_marks_are_found_by_their_tokens() -> None:
    """As gpt-oss has them: of special tokens, which no backend's text holds."""
    rules = rules_of(marks=("<|im_start|>thoughts", "<|im_end|><|im_start|>final\n"))
    assert rules.prompts.hidden
    ids = rules.prompts.encode("a=1.<|im_end|><|im_start|>final\nIt is 3.\n\n")
    for whole in (False, True):
        draft = Draft(rules, Prefix("p", QUESTION, 0, (), 0), whole=whole)
        draft.take(Completion("a=1.final\nIt is 3.\n\n", len(ids), ids, "stop"))
        assert draft.generation is not None
        assert [step.text for step in draft.generation.steps][:1] == ["a=1.</think>\n\n"]
        assert len(draft.generation.steps) == 1 + whole and not draft.generation.dropped


def test_thinking_that_was_not_asked_for_has_failed_still() -> None:
    rules = replace(rules_of(), splitting=Splitting(), prompts=PromptFormat(load_tokenizer(str(model_dir("small")))))
    draft = Draft(rules, Prefix("p", QUESTION, 0, (), 0))
    draft.take(Completion("<think>\nWell\n\n", 5, None, "stop"))
    assert draft.generation is not None and reasons(draft.generation) == ["failed"]
    assert 'split = "thinking"' in draft.generation.reason
