"""A future made from another's answer shares its fate: result, exception, cancellation, in both directions."""

from __future__ import annotations

from concurrent.futures import CancelledError, Future

import pytest
from handmade import problem

from rollouts.config import Limits, Sampling
from rollouts.models.base import Capabilities, Completion
from rollouts.models.futures import forward, settled
from rollouts.models.stepwise import StepModel, StepRules
from rollouts.text.prompts import PromptFormat
from rollouts.text.steps import Prefix
from rollouts.text.tokenizer import load_tokenizer
from rollouts.tinymath import model_dir


def pair(take=None):
    source, target = Future(), Future()
    forward(source, take or (lambda value: target.set_result(value + 1)), target)
    return source, target


def test_results_and_exceptions_come_through():
    source, target = pair()
    source.set_result(1)
    assert target.result(0) == 2
    source, target = pair()
    source.set_exception(ValueError("the backend's words"))
    with pytest.raises(ValueError, match="the backend's words"):
        target.result(0)
    source, target = pair(lambda value: 1 / value)
    source.set_result(0)
    with pytest.raises(ZeroDivisionError):
        target.result(0)
    assert settled(3).result(0) == 3


def test_cancelling_one_cancels_the_other():
    source, target = pair()
    target.cancel()
    assert source.cancelled()
    source, target = pair()
    source.cancel()
    assert target.cancelled()
    with pytest.raises(CancelledError):
        target.result(0)


def test_an_answer_to_a_request_that_nobody_waits_for_is_dropped(caplog):
    taken = []
    source, target = pair(taken.append)
    source.set_running_or_notify_cancel()  # under way: it cannot be cancelled any more
    target.cancel()
    source.set_result(1)
    assert target.cancelled() and not taken and not caplog.records


def test_a_step_that_is_given_up_ends_the_request_under_way():
    class Waits:
        role, window, capabilities = "small", 512, Capabilities()
        asked: list[Future] = []

        def submit(self, request):
            self.asked.append(Future())
            return self.asked[-1]

    prompts = PromptFormat(load_tokenizer(str(model_dir("small"))))
    model = StepModel(Waits(), StepRules("small", prompts, 512, Sampling(), Limits(), lambda *_: True))
    step = model.submit(Prefix("p", problem().question, 0, (), 0), whole=False)
    Waits.asked[0].set_result(Completion("---\n\n", 2, None, "stop"))  # decoration: the step needs a second request
    step.cancel()
    assert len(Waits.asked) == 2 and Waits.asked[1].cancelled()
