"""Scorers: the self-test finds wrong ones, and inputs that do not fit are never truncated or padded."""

from __future__ import annotations

import math
from concurrent.futures import Future
from contextlib import nullcontext

import pytest

from rollouts.errors import BackendError, ConfigError, RequestFailed
from rollouts.models.base import Capabilities, Completion, LogprobRequest, PoolingRequest
from rollouts.scoring.base import EXAMPLES, Failed, score_paths, self_test
from rollouts.scoring.likelihood import LikelihoodScorer
from rollouts.scoring.prm import RewardScorer, rounding
from rollouts.scoring.self_evaluation import SelfEvaluationScorer, read_digit
from rollouts.text.likelihood import Likelihood
from rollouts.text.prompts import PromptFormat, RewardFormat
from rollouts.text.tokenizer import load_tokenizer
from rollouts.tinymath import model_dir

RIGHT = {example.right[-1] for example in EXAMPLES}


class Stub:
    """Scores paths by a function of the question and the steps so far."""

    name = "stub"
    tolerance = 1e-6

    def __init__(self, rule, count=lambda n: n):
        self.rule, self.count = rule, count

    def process(self):
        return {}

    def submit(self, question, steps):
        future: Future = Future()
        future.set_result([self.rule(steps, i) for i in range(self.count(len(steps)))])
        return future


def good(steps, i):
    return 0.9 if i == 0 or steps[i] in RIGHT else 0.2


def test_a_good_scorer_passes():
    assert self_test(Stub(good)) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (Stub(lambda steps, i: 1 - good(steps, i)), "prefers wrong steps"),
        (Stub(lambda steps, i: 0.5), "prefers wrong steps"),
        (Stub(good, count=lambda n: 1), "1 scores for 2 steps"),
        (Stub(lambda steps, i: 3.0), r"expected numbers in \[0, 1\]"),
        (Stub(lambda steps, i: float("nan")), r"expected numbers in \[0, 1\]"),
        (Stub(lambda steps, i: 0.9 / len(steps)), "must not depend on later steps"),
    ],
)
def test_wrong_scorers_are_found(scorer, message):
    with pytest.raises(ConfigError, match=message):
        self_test(scorer)


def test_a_reward_model_in_half_precision_may_round_more_than_one_in_single_precision(tokenizer):
    """As a real one did; one that looks ahead gives itself away all the same."""
    for format_of, shift, passes in (("float32", 0.02, False), ("bfloat16", 0.02, True), ("bfloat16", 0.1, False)):
        rule = Stub(lambda steps, i, by=shift: (0.9 if steps[i] in RIGHT else 0.4) - by * (len(steps) > i + 1))  # noqa: B023
        rule.tolerance = rounding({"dtype": format_of})
        with nullcontext() if passes else pytest.raises(ConfigError, match="must not depend on later steps"):
            self_test(rule)
    assert rounding({}) == rounding({"dtype": "bfloat16"}) == 5e-2


class Answers:
    """A backend that answers at once."""

    role = "scorer"

    def __init__(self, answer, window=1024, **can):
        self.answer, self.window = answer, window
        self.capabilities = Capabilities(**can)
        self.requests: list = []

    def submit(self, request):
        self.requests.append(request)
        future: Future = Future()
        try:
            future.set_result(self.answer(request))
        except RequestFailed as error:
            future.set_exception(error)
        return future


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(model_dir("small")))


STEPS = ["a=1\n\n", "b=2\n\n", "c=3"]


def test_prm_scores_what_fits_and_nothing_else(tokenizer):
    prompts = RewardFormat(tokenizer, None, "<extra_0>")
    backend = Answers(lambda r: [0.5] * len(r.positions), window=len(prompts.ids("q", STEPS[:2])), pooling=True)
    scorer = RewardScorer("prm", backend, prompts, "m")
    assert score_paths(scorer, [("q", STEPS)]) == [[0.5, 0.5, None]]
    assert backend.requests == [PoolingRequest(*prompts.marked("q", STEPS[:2]))]
    assert [backend.requests[0].ids[place] for place in backend.requests[0].positions] == [prompts.step_tag_id] * 2
    assert score_paths(scorer, [("q" * 999, STEPS)]) == [[None, None, None]]


def test_a_reward_model_that_answers_with_another_count_is_an_error(tokenizer):
    scorer = RewardScorer(
        "prm", Answers(lambda r: [0.5], pooling=True), RewardFormat(tokenizer, None, "<extra_0>"), "m"
    )
    with pytest.raises(BackendError, match="1 scores came back for 3 steps"):
        score_paths(scorer, [("q", STEPS)])


def test_what_a_backend_lacks_is_an_error_before_the_run(tokenizer):
    with pytest.raises(ConfigError, match="log-probabilities"):
        LikelihoodScorer("l", Answers(None), PromptFormat(tokenizer), "m")


def test_likelihood_is_the_least_token_probability_of_each_step(tokenizer):
    prompts = PromptFormat(tokenizer)
    ids, positions = prompts.step_spans("q", STEPS)

    def answer(request: LogprobRequest):
        return Likelihood(tuple(math.log(0.9) - 0.01 * (i % 7) for i in range(request.start, len(request.ids))))

    backend = Answers(answer, prompt_logprobs=True)
    scorer = LikelihoodScorer("l", backend, prompts, "m")
    (scores,) = score_paths(scorer, [("q", STEPS)])
    for score, start, end in zip(scores, positions, positions[1:], strict=False):
        assert score == pytest.approx(0.9 * math.exp(-0.01 * max(i % 7 for i in range(start, end))))
    small = Answers(answer, window=positions[2], prompt_logprobs=True)
    (cut,) = score_paths(LikelihoodScorer("l", small, prompts, "m"), [("q", STEPS)])
    assert cut[0] == scores[0] and cut[1:] == [None, None]
    assert score_paths(scorer, [("q", [""])]) == [[0.0]]
    for known in (1, 2, 3):  # nothing is asked about steps that are scored; llama.cpp is asked token by token
        asked = len(backend.requests)
        assert scorer.submit("q", STEPS, known).result() == [None] * known + scores[known:]
        assert [request.start for request in backend.requests[asked:]] == positions[known:3][:1]


def test_self_evaluation_asks_about_every_step(tokenizer):
    replies = iter(["9", " I say 3.", "no idea"])
    backend = Answers(lambda r: Completion(next(replies), 2, None, "eos"))
    (scores,) = score_paths(SelfEvaluationScorer("s", backend, tokenizer, "m"), [("q", STEPS)])
    assert scores == [1.0, pytest.approx(1 / 3), None]
    assert all(request.sampling.temperature == 0 for request in backend.requests)
    shown = tokenizer.decode(backend.requests[1].prompt_ids)
    assert "Step 2: b=2" in shown and "c=3" not in shown
    assert [read_digit(reply) for reply in ("", "10", "0.9", "7,5", "10/10")] == [None] * 5
    assert [read_digit(reply) for reply in ("9/9", "9.", "It is 0", "10? no, 9")] == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("kind", ["prm", "likelihood", "self-evaluation"])
def test_what_fails_on_a_backend_that_is_well_can_be_asked_again(tokenizer, kind):
    """It is no score of a step that none can be had of, and no reason to end a run."""

    def refuse(request):
        if kind == "self-evaluation":
            return Completion("", 0, None, "failed", "HTTP 400: no")
        raise RequestFailed("HTTP 400: no")

    backend = Answers(refuse, pooling=True, prompt_logprobs=True)
    scorer = {
        "prm": lambda: RewardScorer("s", backend, RewardFormat(tokenizer, None, "<extra_0>"), "m"),
        "likelihood": lambda: LikelihoodScorer("s", backend, PromptFormat(tokenizer), "m"),
        "self-evaluation": lambda: SelfEvaluationScorer("s", backend, tokenizer, "m"),
    }[kind]()
    assert scorer.submit("q", STEPS, 1).result() == [None, *[Failed("HTTP 400: no")] * 2]
