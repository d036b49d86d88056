"""One generation from requests to steps: thinking that was not asked for, and requests that fail."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recited import Recited

from rollouts.config import Limits, Sampling
from rollouts.models.base import Completion
from rollouts.models.stepwise import Draft, StepRules
from rollouts.text.prompts import PromptFormat
from rollouts.text.steps import Prefix, StopReason
from rollouts.text.tokenizer import load_tokenizer
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


@pytest.mark.parametrize("whole", [False, True])
def test_a_text_of_pieces_of_a_vocabulary_is_refused(rules, whole):
    """As engines of transformers 5 decode byte-level tokenizers whose configuration names LlamaTokenizerFast."""
    draft = Draft(rules, Prefix("p", "Let a=1+2. Find a.", 0, (), 0), whole=whole)
    ids = tuple(rules.prompts.encode("a = 3\n\nSo"))
    draft.take(Completion("a\u0120=\u01203\u010a\u010aSo", len(ids), ids, "eos"))
    assert draft.generation.steps[0].stop_reason is StopReason.FAILED and draft.generation.decoded == len(ids)
    assert "tokenizer_class" in draft.generation.reason
    assert drawn(rules, "It is \u0120stanbul.\n\n").steps[0].text == "It is \u0120stanbul.\n\n"


def test_a_failed_request_keeps_its_reason(rules):
    generation = drawn(rules, "", "failed", "HTTP 400: too long")
    assert generation.steps[0].stop_reason is StopReason.FAILED and generation.reason == "HTTP 400: too long"


TEXTS = st.lists(
    st.sampled_from(["a=1", "so", " ", "  ", "\t", "\n", "\n", "\n\n", "\r\n", "\n \n", "---", "\u00a0", "\\boxed{1}"]),
    max_size=14,
).map("".join)


def recited(rules, text, *, whole=False, **options):
    draft = Draft(rules, Prefix("p", "Let a=1+2. Find a.", 0, (), 0), whole=whole)
    model = Recited(rules, draft.prompt, text, **options)
    while draft.generation is None:
        draft.take(model(draft.request()))
    return draft.generation


@settings(deadline=None)
@given(text=TEXTS)
def test_a_step_is_the_first_of_the_whole_path(rules, text):
    alone, path = recited(rules, text), recited(rules, text, whole=True)
    assert alone.steps[0] == path.steps[0]
    assert alone.decoded == alone.steps[0].tokens + alone.cut_tokens
    assert path.decoded == sum(step.tokens for step in path.steps) + path.cut_tokens


@pytest.mark.parametrize("blank", ["\n\n", "\n \n", "\n\t\n", "\r\n\r\n"])
def test_usual_blank_lines_stop_the_request(rules, blank):
    generation = recited(rules, f"a=1+2=3{blank}So a=3{blank}")
    assert generation.steps[0].text == "a=1+2=3\n\n" and generation.cut_tokens == 0
    assert generation.steps[0].stop_reason is StopReason.DELIMITER


@pytest.mark.parametrize("blank", ["\n   \n", "\n\u00a0\n", "\n\t \t\n", "\n \r\n"])
@pytest.mark.parametrize("tells_ids", [True, False])
def test_what_is_decoded_beyond_an_unusual_one_is_cut_and_counted(rules, blank, tells_ids):
    text = f"a=1+2=3{blank}So a=3"
    generation, length = recited(rules, text, tells_ids=tells_ids), len(rules.prompts.encode(text))
    assert generation.steps[0].text == "a=1+2=3\n\n" and generation.steps[0].stop_reason is StopReason.DELIMITER
    assert generation.steps[0].tokens == len(rules.prompts.encode(f"a=1+2=3{blank}"))
    assert generation.decoded == length + 1 and generation.cut_tokens == length + 1 - generation.steps[0].tokens > 0


def test_a_path_of_unusual_blank_lines_is_cut_at_each_where_prompts_stay_the_same(rules):
    generation = recited(rules, "a=1+2=3\n \nSo a=3.\n\n\\boxed{3}", whole=True)
    assert [step.text for step in generation.steps] == ["a=1+2=3\n\n"] and generation.dropped == 2
