"""One generation from requests to steps: thinking that was not asked for, and requests that fail."""

import pytest

from rollouts.config import Limits, Sampling
from rollouts.models.base import Completion
from rollouts.models.stepwise import Draft, StepRules
from rollouts.text.prompts import PromptFormat, load_tokenizer
from rollouts.text.steps import Prefix, StopReason
from rollouts.tinymath import model_dir


@pytest.fixture(scope="module")
def rules():
    prompts = PromptFormat(load_tokenizer(str(model_dir("small"))))
    return StepRules("small", prompts, 512, Sampling(), Limits(), lambda question, steps: True)


def drawn(rules, text, finish="stop", detail="", *, whole=False):
    draft = Draft(rules, Prefix("p", "Let a=1+2. Find a.", 0, (), 0), whole=whole)
    ids = tuple(rules.prompts.encode(text))
    draft.take(Completion(text, len(ids), ids, finish, detail))
    return draft.generation


@pytest.mark.parametrize("whole", [False, True])
def test_a_model_that_begins_to_think_has_failed_and_says_why(rules, whole):
    generation = drawn(rules, "<think>\nWell\n\n", whole=whole)
    assert [step.stop_reason for step in generation.steps] == [StopReason.FAILED] and generation.decoded > 0
    assert "thinking" in generation.reason


def test_a_text_about_thinking_is_a_text(rules):
    generation = drawn(rules, "The tag <think> opens a block.\n\n")
    assert generation.steps[0].text.startswith("The tag <think>") and not generation.reason
    assert generation.steps[0].stop_reason is StopReason.DELIMITER


def test_a_failed_request_keeps_its_reason(rules):
    generation = drawn(rules, "", "failed", "HTTP 400: too long")
    assert generation.steps[0].stop_reason is StopReason.FAILED and generation.reason == "HTTP 400: too long"
