"""Judges: what they are asked, what their answers say, and what becomes of failures, against a scripted server."""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fake_server import HANG, FakeServer, chat_reply, error_reply, fake
from handmade import problem
from made_stores import PROBLEMS, grown

from rollouts.__main__ import main
from rollouts.cli.generate import run_scoring
from rollouts.config import parse_family
from rollouts.errors import BackendError, ConfigError, RequestsFailed, StoreError
from rollouts.family import Family
from rollouts.models.server.judge import Terms, read_verdict_of, verdict_in
from rollouts.scoring.base import EXAMPLES, Failed, score_paths
from rollouts.scoring.judge import PROMPT, judge_question
from rollouts.store.store import Store
from rollouts.text.splitting import Splitting
from rollouts.text.steps import CLOSE
from rollouts.tinymath import model_dir
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import load_trees
from rollouts.trees.verify import verify_store

__all__ = ["fake"]
SELF_TEST = 6  # questions of the self-test: two problems, a step before, one that is right and one that is wrong
QUESTION = "What is {step} of \\frac{1}{2}?"
STEPS = ["a=1\n\n", "b=2\n\n", "c=3"]


def probe(body: Any) -> bool:
    return "What is 1 + 1?" in body["messages"][-1]["content"]


def last_step(body: Any) -> str:
    return body["messages"][-1]["content"].rpartition("Last step:\n")[2].partition("\n\nIs the")[0]


def told(*tokens: tuple[str, dict[str, float]], content: str | None = None) -> Any:
    """An answer with log-probabilities, made of (token, what else could have stood there) with probabilities."""
    said = [
        {
            "token": token,
            "logprob": math.log(tops[token]),
            "top_logprobs": [{"token": each, "logprob": math.log(share)} for each, share in tops.items()],
        }
        for token, tops in tokens
    ]
    text = "".join(token for token, _ in tokens) if content is None else content
    choice = {"message": {"content": text}, "finish_reason": "stop", "logprobs": {"content": said}}
    return 200, {}, {"choices": [choice], "usage": {"prompt_tokens": 30, "completion_tokens": len(tokens)}}


def said(text: str | None, reason: str = "stop") -> Any:
    status, headers, body = chat_reply(text, reason)
    return status, headers, {**body, "usage": {"prompt_tokens": 30, "completion_tokens": 5, "total_tokens": 35}}


def family_of(server: FakeServer, **scorer: Any) -> Family:
    role = {"backend": "transformers", "model": str(model_dir("small")), "system_prompt": ""}
    model = {"backend": "server", "url": server.url, "model": "fake", "retries": 1, **scorer.pop("model", {})}
    return Family(parse_family({"small": role, "large": role, "scorer": {"kind": "judge", "model": model, **scorer}}))


@pytest.fixture
def server(fake: FakeServer) -> FakeServer:
    """It knows which of the steps of the self-test are wrong, and says yes to everything else."""
    wrong = {f"Step 2: {example.wrong[-1].strip()}" for example in EXAMPLES}
    fake.fault = lambda path, body, count: (
        (said("No" if last_step(body) in wrong else "Yes")) if path.endswith("chat/completions") else None
    )
    return fake


def opened(family: Family, tmp_path: Path) -> Any:
    store = grown(tmp_path / "s")
    return store, family.open_scorer(store)


class TestAnswers:
    @pytest.mark.parametrize(
        ("text", "score"),
        [
            *[(text, 1.0) for text in ("Yes", "yes.", " **Yes**", "Right", "TRUE", "Correct: 6 * 7 = 42, not wrong.")],
            *[(text, 0.0) for text in ("No", "no!", "*No*, because it is right elsewhere", "incorrect", "Not right.")],
            ("The sum is wrong at first sight, but 2 + 2 = 4. So: yes", 1.0),
            ("It looks right.\n\nAnswer: No", 0.0),
            ("This isn't correct", 0.0),
            *[(text, 1.0) for text in ("No errors: 6 * 7 = 42, correct.", "There is nothing wrong with it")],
            ("No, there is an error", 0.0),
            ("No arithmetic mistakes.", None),
            ("<think>Yes? No? yes</think>\n\nNo", 0.0),
            *[("0.8", 0.8), ("80%", 0.8), ("8/10", 0.8), ("`0.25`", 0.25), ("1", 1.0), ("0", 0.0)],
            ("Score: 0.9", 0.9),
            ("I would say 7 / 10 for it", 0.7),
            ("0.2\nThe step is not right, it forgets the eggs.", 0.2),
            *[(text, None) for text in ("", "maybe", "8", "Step 7 of 42", "150%", "nothing to say about know-how")],
            ("<think>Yes, it is right", None),
        ],
    )
    def test_a_verdict_or_a_number_is_read_from_words(self, text: str, score: float | None) -> None:
        assert verdict_in(text) == score

    def test_the_probability_is_that_of_the_token_with_which_the_verdict_begins(self) -> None:
        yes = told(("Yes", {"Yes": 0.6, " yes": 0.1, "No": 0.2, "Maybe": 0.1}), (".", {".": 1.0}))
        assert read_verdict_of(yes[2]).score == pytest.approx(0.7 / 0.9)
        assert read_verdict_of(yes[2]).spent == (30, 2)
        no = told(("So", {"So": 1.0}), (": ", {": ": 1.0}), ("N", {"N": 0.75, "Y": 0.25}), ("o", {"o": 1.0}))
        assert read_verdict_of(no[2]).score == pytest.approx(0.25)
        thought = told(("Yes", {"Yes": 1.0}), ("</think>", {"</think>": 1.0}), (" no", {" no": 0.9, "yes": 0.1}))
        assert read_verdict_of(thought[2]).score == pytest.approx(0.1)
        hidden = told(("Yes", {"Yes": 0.5, "No": 0.5}), content="")  # a server that keeps the text elsewhere
        assert read_verdict_of(hidden[2]).score == 0.5
        assert read_verdict_of(told(("0", {"0": 1.0}), (".4", {".4": 1.0}))[2]).score == 0.4
        assert read_verdict_of(told(("Hm", {"Hm": 1.0}), content="Yes")[2]).score == 1.0

    def test_what_says_nothing_has_a_reason(self) -> None:
        verdict = read_verdict_of(said("Let me think about this", "length")[2])
        assert verdict.score is None and "Let me think" in verdict.why and "cut off" in verdict.why
        assert read_verdict_of(said(None)[2]).score is None
        with pytest.raises(LookupError):
            read_verdict_of({"choices": []})

    def test_words_of_thoughts_that_were_cut_off_are_no_verdict(self) -> None:
        thoughts = "Okay, 6 * 7 = 42 is right, 0.5 of them is"
        for text in (thoughts, f"<think>\n{thoughts}", "<think>\nYes", "The share is 0.5 of"):
            assert read_verdict_of(said(text, "length")[2]).score is None
        assert read_verdict_of(said("<think>\nYes")[2]).score is None
        for text, score in (
            ("No", 0.0),
            ("**Yes**, because", 1.0),
            ("0.8\nas", 0.8),
            (f"{thoughts}</think>\n\nNo", 0.0),
        ):
            assert read_verdict_of(said(text, "length")[2]).score == score


def test_the_question_has_the_problem_the_steps_before_and_the_last_one() -> None:
    text = judge_question(PROMPT, QUESTION, STEPS[:2])
    assert (
        QUESTION in text and "Steps before the last one:\nStep 1: a=1\n" in text and "Last step:\nStep 2: b=2\n" in text
    )
    assert "(none)" in judge_question(PROMPT, "Q", STEPS[:1])
    assert judge_question("{q} {question}|{step}", "{step}", ["x{before}"]) == "{q} {step}|Step 1: x{before}"


def test_it_asks_about_each_new_step_once_side_by_side(server: FakeServer, tmp_path: Path) -> None:
    store, opening = opened(family_of(server, model={"concurrency": 4}), tmp_path)
    with opening as scorer:
        server.delay, server.most_busy = 0.05, 0
        assert scorer.submit(QUESTION, STEPS, 1).result(10) == [None, 1.0, 1.0]
        asked = [last_step(body) for path, body in server.seen if body and QUESTION in body["messages"][-1]["content"]]
        assert sorted(asked) == ["Step 2: b=2", "Step 3: c=3"]
        assert score_paths(scorer, [(f"{QUESTION} {number}", STEPS) for number in range(5)]) == [[1.0] * 3] * 5
        assert server.most_busy == 4
        process = scorer.process()
        assert process["kind"] == "judge" and process["model"] == "fake" and process["reads"] == "words"
    start = store.manifest["engines"][-1]
    assert start["role"] == "scorer" and start["engine"] == "judge"
    assert start["servers"] == 1 and "127.0.0.1" not in str(store.manifest["engines"])  # whose machine it was


def test_a_judge_that_prefers_wrong_steps_is_refused_unless_it_need_not_know(
    server: FakeServer, tmp_path: Path
) -> None:
    server.fault = lambda path, body, count: said("Yes") if path.endswith("chat/completions") else None
    with pytest.raises(ConfigError, match="prefers wrong steps"), opened(family_of(server), tmp_path)[1]:
        pass
    with opened(family_of(server, informed=False), tmp_path / "other")[1] as scorer:
        assert scorer.submit("Q", STEPS).result(10) == [1.0, 1.0, 1.0]


class TestTerms:
    """What a server refuses is left out, as far as one can do without it."""

    def asked_with(self, server: FakeServer, refused: Any, tmp_path: Path) -> dict[str, Any]:
        before = server.fault

        def fault(path: str, body: Any, count: int) -> Any:
            words = refused(body) if body else None
            return error_reply(400, words) if words else before(path, body, count)

        server.fault = fault
        with opened(family_of(server, max_tokens=64), tmp_path)[1] as scorer:
            assert scorer.submit("Q", STEPS[:1]).result(10) == [1.0]
        return dict(server.seen[-1][1])

    def test_a_server_that_takes_all(self, server: FakeServer, tmp_path: Path) -> None:
        body = self.asked_with(server, lambda body: None, tmp_path)
        assert (body["temperature"], body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (0.0, True, 20, 64)
        assert [message["role"] for message in body["messages"]] == ["user"]

    def test_one_that_names_its_limit_otherwise(self, server: FakeServer, tmp_path: Path) -> None:
        words = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        body = self.asked_with(server, lambda body: words if "max_tokens" in body else None, tmp_path)
        assert body["max_completion_tokens"] == 64 and "max_tokens" not in body and body["top_logprobs"] == 20

    def test_one_that_has_few_log_probabilities(self, server: FakeServer, tmp_path: Path) -> None:
        refused = lambda body: "top_logprobs must be at most 5" if body.get("top_logprobs", 0) > 5 else None  # noqa: E731
        assert self.asked_with(server, refused, tmp_path)["top_logprobs"] == 5

    def test_one_that_has_none_and_one_temperature(self, server: FakeServer, tmp_path: Path) -> None:
        def refused(body: Any) -> str | None:
            return "temperature is fixed" if "temperature" in body else "unknown field" if "logprobs" in body else None

        assert not {"temperature", "logprobs", "top_logprobs"} & set(self.asked_with(server, refused, tmp_path))

    def test_one_that_refuses_everything(self, server: FakeServer, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="scorer: http.* refuses a chat with fake: HTTP 400: no"):
            self.asked_with(server, lambda body: "no", tmp_path)
        assert Terms(top=0, temperature=False).yielding("no") is None


class TestFailures:
    def test_one_question_fails_alone_with_its_reason(self, server: FakeServer, tmp_path: Path) -> None:
        with opened(family_of(server), tmp_path)[1] as scorer:
            before = server.fault
            answers: Counter[str] = Counter()

            def fault(path: str, body: Any, count: int) -> Any:
                step = last_step(body) if body else ""
                answers[step] += 1
                if step.endswith("b=2"):
                    return error_reply(400, "too long")
                if step.endswith("c=3"):
                    return said("I cannot tell")
                return (
                    error_reply(500, "boom") if step.endswith("a=1") and answers[step] == 1 else before(path, body, 0)
                )

            server.fault = fault
            first, second, third = scorer.submit("Q", STEPS).result(10)
            assert first == 1.0 and answers["Step 1: a=1"] == 2  # tried again
            assert second == Failed("HTTP 400: too long") and answers["Step 2: b=2"] == 1
            assert isinstance(third, Failed) and "I cannot tell" in third.reason and answers["Step 3: c=3"] == 2

    def test_a_judge_most_of_whose_answers_say_nothing_ends_the_run(self, server: FakeServer, tmp_path: Path) -> None:
        before, store = server.fault, grown(tmp_path / "s")
        server.fault = lambda path, body, count: (
            said("Hm.") if body and any(each.question in str(body) for each in PROBLEMS) else before(path, body, count)
        )
        with pytest.raises(RequestsFailed, match=r"scorer: \d+ of the first \d+ questions failed.*Hm"):
            run_scoring(store, family_of(server), None)
        run_scoring(store, family_of(server), None, give_up=True)  # who knows better says so
        assert not any("unscored" in line for line in verify_store(store).problems)

    def test_what_always_fails_ends_no_run_of_a_judge_that_answers(self, server: FakeServer, tmp_path: Path) -> None:
        """When the others are scored, all that is asked fails, and that may be more than the first questions."""
        store, before = grown(tmp_path / "s", problems=[problem(f"p{number}") for number in range(16)]), server.fault
        asked: dict[str, bool] = {}

        def fault(path: str, body: Any, count: int) -> Any:
            if not body or probe(body) or any(each.question in str(body) for each in EXAMPLES):
                return before(path, body, count)
            content = body["messages"][-1]["content"]
            asked[content] = zlib.crc32(content.encode()) % 4 == 0
            return error_reply(400, "the filter says no") if asked[content] else before(path, body, count)

        server.fault = fault
        run_scoring(store, family_of(server), None)
        assert 20 < sum(asked.values()) < len(asked) / 2
        asked.clear()
        run_scoring(store, family_of(server), None)
        assert len(asked) > 20 and all(asked.values())
        run_scoring(store, family_of(server), None, give_up=True)
        assert not any("unscored" in line for line in verify_store(store).problems)

    def test_a_server_that_is_gone_ends_the_run(self, server: FakeServer, tmp_path: Path) -> None:
        with opened(family_of(server, model={"timeout_s": 0.2, "retries": 0}), tmp_path)[1] as scorer:
            server.fault = lambda *_: HANG
            with pytest.raises(BackendError, match="scorer: http"):
                scorer.submit("Q", STEPS).result(20)


class TestStores:
    def models(self, server: FakeServer, tmp_path: Path) -> Path:
        file, role = tmp_path / "models.toml", f'backend = "transformers"\nmodel = "{model_dir("small")}"\n'
        judge = f'backend = "server"\nurl = "{server.url}"\nmodel = "fake"\nretries = 0\nprice_input = 1000.0\n'
        text = f'[small]\n{role}[large]\n{role}[scorer]\nkind = "judge"\n[scorer.model]\n{judge}'
        file.write_text(
            text.replace("[large]", 'system_prompt = ""\n[large]', 1).replace(
                "[scorer]", 'system_prompt = ""\n[scorer]', 1
            )
        )
        return file

    def test_score_asks_once_about_each_text_counts_tokens_and_asks_again_about_what_failed(
        self, server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path, before, fails = grown(tmp_path / "s").path, server.fault, {"yet": True}
        asked: Counter[str] = Counter()

        def fault(at: str, body: Any, count: int) -> Any:
            if body and not probe(body) and not any(each.question in str(body) for each in EXAMPLES):
                content = body["messages"][-1]["content"]
                asked[content] += 1
                if fails["yet"] and len(asked) % 9 == 4 and asked[content] == 1:
                    return error_reply(400, "the filter says no")
            return before(at, body, count)

        server.fault = fault
        command = ["score", str(path), "--models", str(self.models(server, tmp_path))]
        assert main(command) == 0
        printed = " ".join(re.sub(r"[^\x20-\x7e]", " ", capsys.readouterr().err).split())
        assert max(asked.values()) == 1 and len(asked) > 20
        assert re.search(r"(\d+) steps have no score yet.*\1 times: HTTP 400: the filter says no", printed)
        answered = int(re.search(r"The judge answered (\d+) questions", printed)[1])  # type: ignore[index]
        assert f"{30 * answered:,} tokens in, {5 * answered:,} out, price {30 * answered / 1000:.2f}" in printed
        assert any("unscored" in line for line in verify_store(Store(path)).problems)
        fails["yet"], first = False, set(asked)
        asked.clear()
        assert main(command) == 0
        assert set(asked) < first and len(asked) == len(first) - (answered - SELF_TEST)
        assert not verify_store(Store(path)).problems
        table = Store(path).scores("judge-fake")
        assert table.counters()["requests_scorer"] == len(first) + 2 * SELF_TEST
        asked.clear()
        assert main(command) == 0 and not asked

    def test_a_question_that_always_fails_can_be_given_up_on(
        self, server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path, before = grown(tmp_path / "s", replicas=1).path, server.fault
        assert main(["grade", str(path)]) == 0
        root = next(iter(load_trees(Store(path), PROBLEMS[:1], 1, None))).root
        first = f"Step 1: {root.proposals['small'].text.strip()}"

        def fault(at: str, body: Any, count: int) -> Any:
            refused = body and PROBLEMS[0].question in str(body) and last_step(body) == first
            return error_reply(400, "the filter says no") if refused else before(at, body, count)

        server.fault = fault
        command = ["score", str(path), "--models", str(self.models(server, tmp_path))]
        assert main(command) == 0 == main(command)
        assert "with --give-up for the last time" in " ".join(capsys.readouterr().err.split())
        with pytest.raises(StoreError, match=r"no score by 'judge-fake' yet. Run `python -m rollouts score"):
            compile_store(path, cache=False)
        assert main([*command, "--give-up"]) == 0
        assert "their trees are left out: 1" in " ".join(capsys.readouterr().err.split())
        assert compile_store(path, cache=False).meta["left_out_trees"] == 1

    def test_another_prompt_is_not_mixed_in(self, server: FakeServer, tmp_path: Path) -> None:
        store = grown(tmp_path / "s")
        run_scoring(store, family_of(server), PROBLEMS[:2])
        other = family_of(server, prompt="Problem: {question} Last step:\n{step}\n\nIs the last right?")
        with pytest.raises(StoreError, match="template_hash"):
            run_scoring(store, other, None)
        assert Family(other.config).windows.keys() == {"small", "large"}

    def test_nor_is_another_system_message(self, server: FakeServer, tmp_path: Path) -> None:
        store = grown(tmp_path / "s")
        run_scoring(store, family_of(server, system_prompt=""), PROBLEMS[:1])
        run_scoring(store, family_of(server), PROBLEMS[:2])
        with pytest.raises(StoreError, match="template_hash"):
            run_scoring(store, family_of(server, system_prompt="Be strict."), None)


def test_it_reads_thinking_without_what_closes_the_block(server: FakeServer, tmp_path: Path) -> None:
    family = family_of(server)
    thinks = parse_family({**family.config.model_dump(), "steps": {"split": "thinking"}})
    for config, count in ((family.config, 2), (thinks, 0)):
        store = grown(tmp_path / str(count), splitting=Splitting(config.steps).described())
        with Family(config).open_scorer(store) as scorer:
            scorer.submit("Q", [f"a=1\n{CLOSE}\n\n", "b=2"]).result(10)
        asked = [body["messages"][-1]["content"] for _, body in server.seen[-2:]]
        assert sum(CLOSE in content for content in asked) == count
        assert all("Step 1: a=1\n" in content for content in asked)
