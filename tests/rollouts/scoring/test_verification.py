"""The small model is asked several times about each solution of its own; its verdicts are a table of the store."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from handmade import process
from made_whole import WRITTEN, three_problems

from rollouts.config import GeneratorConfig, embedded_family
from rollouts.errors import ConfigError
from rollouts.family import Family
from rollouts.models.base import Completion
from rollouts.scoring.base import Failed
from rollouts.scoring.verification import MOST_TOKENS, PROMPT, SAMPLES, Verifier
from rollouts.store.store import Store
from rollouts.text.tokenizer import load_tokenizer
from rollouts.tinymath import model_dir
from rollouts.trees.compile import compile_store
from rollouts.trees.verifications import unverified, verify_solutions
from rollouts.trees.verify import verify_store

RIGHT = "2 + 2 is 4, as it says.\nVerdict: correct"
WRONG = "It is not.\nVerdict: incorrect"


class Asked:
    """A backend that answers each prompt's samples in turn."""

    role, identity = "small", {}  # noqa: RUF012

    def __init__(self, tokenizer, answer, window=4096):
        self.tokenizer, self.answer, self.window = tokenizer, answer, window
        self.requests = []

    def submit(self, request):
        number = sum(each.prompt_ids == request.prompt_ids for each in self.requests)
        self.requests.append(request)
        future: Future = Future()
        text = self.answer(self.tokenizer.decode(request.prompt_ids), number)
        failed = text is None
        future.set_result(
            Completion(text or "", 0 if failed else 10, None, "failed" if failed else "eos", "gone" * failed)
        )
        return future


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(model_dir("small")))


def test_verdicts_are_counted(tokenizer):
    replies = [RIGHT, WRONG, "I cannot tell.", "Verdict: **Correct**", "It is right, I think. Verdict: incorrect"]
    backend = Asked(tokenizer, lambda _, number: replies[number])
    yes, samples, read, decoded = Verifier(backend, tokenizer, "m", samples=5).submit("1 + 1?", "It is 2.").result()
    assert (yes, samples, decoded) == (2, 5, 50) and read == 5 * len(backend.requests[0].prompt_ids)
    assert {(each.max_tokens, each.sampling.temperature) for each in backend.requests} == {(MOST_TOKENS, 1.0)}
    assert len({each.seed for each in backend.requests}) == 5
    shown = tokenizer.decode(backend.requests[0].prompt_ids)
    assert "1 + 1?" in shown and "It is 2." in shown


def test_braces_of_problems_stand_for_themselves(tokenizer):
    backend = Asked(tokenizer, lambda *_: RIGHT)
    Verifier(backend, tokenizer, "m").submit("What is {solution} {0}?", "It is {question}.").result()
    shown = tokenizer.decode(backend.requests[0].prompt_ids)
    assert "What is {solution} {0}?" in shown and "It is {question}." in shown


def test_what_does_not_fit_is_not_asked_and_what_fails_is_asked_again(tokenizer):
    verifier = Verifier(Asked(tokenizer, lambda *_: RIGHT, window=MOST_TOKENS), tokenizer, "m")
    assert verifier.submit("q", "s").result() == (0, 0, 0, 0) and not verifier.backend.requests
    found = Verifier(Asked(tokenizer, lambda _, number: RIGHT if number else None), tokenizer, "m").submit("q", "s")
    assert found.result() == Failed("gone")


def test_a_small_model_that_is_asked_by_chat_is_refused(tmp_path):
    chat = GeneratorConfig(model="x", backend="server", url=("http://127.0.0.1:9/v1",), chat_only=True)
    family = Family(embedded_family("transformers").model_copy(update={"small": chat}))
    store = Store.create(tmp_path / "s", process())
    with pytest.raises(ConfigError, match="small: .*chat_only"), family.open_verifier(store):
        pass


def test_examples_have_both_verdicts():
    assert PROMPT.count("Verdict: correct") > 1 and PROMPT.count("Verdict: incorrect") > 1


def test_a_store_has_a_row_for_every_solution_of_the_small_model_alone(tokenizer, tmp_path):
    three_problems(tmp_path / "s", max_escalations=1)
    store, gone = Store(tmp_path / "s"), {"p1"}

    def answer(prompt, number):
        name = next(each for each in WRITTEN if f"Question {each}?" in prompt)
        if name in gone:
            return None
        assert f"boxed{{{WRITTEN[name]['small'][0]}}}" in prompt  # its own solution, and to its end
        return RIGHT if number % SAMPLES < {"p0": 6, "p1": 2, "p2": 0}[name] else WRONG

    backend = Asked(tokenizer, answer)
    with store.writing():
        first = verify_solutions(store, Verifier(backend, tokenizer, "m"))
        assert first.rows == 2 and first.failed == {"gone": 1}
        assert not verify_solutions(store, Verifier(backend, tokenizer, "m")).rows  # it is asked about again
        gone.clear()
        again = verify_solutions(store, Verifier(backend, tokenizer, "m"))
        assert again.rows == 1 and not again.failed
        assert not list(unverified(store, store.score_rows("verification")))
    assert len(backend.requests) == 5 * SAMPLES
    assert not verify_store(store).problems  # nothing else is to have a row
    trees = compile_store(store, cache=False)
    yes = trees.signals["verification.yes"][:, 0]
    assert sorted(yes[yes >= 0].tolist()) == [0, 2, 6] and (yes >= 0).sum() == 3
    assert trees.meta["scorer"] != "verification"


def test_what_always_fails_can_be_given_up(tokenizer, tmp_path):
    three_problems(tmp_path / "s")
    store = Store(tmp_path / "s")
    with store.writing():
        found = verify_solutions(store, Verifier(Asked(tokenizer, lambda *_: None), tokenizer, "m"), give_up=True)
    assert found.rows == 3 and found.failed == {"gone": 3}
    assert not list(unverified(store, store.score_rows("verification")))
