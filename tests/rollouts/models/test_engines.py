"""Both engines on the embedded weights, the generators in processes of their own: the same answers, the same ends."""

import importlib.util
import json
import shutil
import subprocess
import sys
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
from thread_engine import in_threads

from rollouts import tinymath
from rollouts.config import ModelConfig, Sampling, embedded_family
from rollouts.errors import BackendError, ConfigError
from rollouts.models.base import CompletionRequest, LogprobRequest, PoolingRequest
from rollouts.models.hf.generator import generator as hf_generator
from rollouts.models.open import open_backend
from rollouts.text.prompts import PromptFormat, RewardFormat
from rollouts.text.tokenizer import load_tokenizer
from rollouts.tinymath import generate_problems

GREEDY = Sampling(temperature=0.0)
HAVE_VLLM = importlib.util.find_spec("vllm") is not None
VLLM = pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.skipif(not HAVE_VLLM, reason="vllm is missing")])
both_engines = pytest.mark.parametrize("kind", [VLLM, "transformers"])
needs_vllm = [pytest.mark.vllm, pytest.mark.skipif(not HAVE_VLLM, reason="vllm is missing")]


@pytest.fixture(scope="module")
def prompts():
    """Eight problems as the small model sees them."""
    style = PromptFormat(load_tokenizer(str(tinymath.model_dir("small"))))
    return [style.ids(problem.question) for problem in tinymath.generate_problems("train", 8)]


@pytest.fixture(scope="module")
def paths():
    """Requests to the reward model about one, two and three steps, and how it is read."""
    style = RewardFormat(load_tokenizer(str(tinymath.model_dir("prm"))), None, tinymath.STEP_TAG)
    steps = ["a=70+33=103\n\n", "b=a+49=103+49=151\n\n", "The answer is \\boxed{151}"]
    question = "Let a=70+33, b=a+49. Find b."
    return [PoolingRequest(*style.marked(question, steps[:count])) for count in (1, 2, 3)], style.reading


@pytest.fixture(scope="module")
def generators():
    """The small model on each engine in a process of its own, started when it is first asked for."""
    with ExitStack() as stack:
        yield cache(lambda kind: stack.enter_context(open_backend("small", embedded_family(kind).small, seed=11)))


@pytest.fixture(scope="module")
def rewards(paths):
    """The reward model on each engine in a thread."""

    def start(kind):
        model = embedded_family(kind, "float32").scorer.model
        with in_threads():
            return stack.enter_context(open_backend("scorer", model, seed=11, reading=paths[1]))

    with ExitStack() as stack:
        yield cache(start)


def answers(backend, requests):
    return [future.result(timeout=300) for future in [backend.submit(request) for request in requests]]


class TestTheSameOnBothEngines:
    pytestmark = needs_vllm

    def test_greedy_completions(self, generators, prompts):
        requests = [CompletionRequest(ids, 60, GREEDY) for ids in prompts]
        exact = generators("transformers")
        agreed = 0
        for request, left, right in zip(
            requests, answers(generators("vllm"), requests), answers(exact, requests), strict=True
        ):
            pairs = list(zip(left.token_ids, right.token_ids, strict=False))
            differing = [place for place, (one, other) in enumerate(pairs) if one != other]
            if not differing:
                assert (left.text, left.tokens, left.finish) == (right.text, right.tokens, right.finish)
                agreed += 1
                continue
            # Rounding may swap two tokens that are equally likely, and nothing else.
            common = request.prompt_ids + left.token_ids[: differing[0]]
            likely = [
                exact.submit(LogprobRequest((*common, token), len(common))).result().logprobs[0]
                for token in pairs[differing[0]]
            ]
            assert likely[0] == pytest.approx(likely[1], abs=1e-3)
        assert agreed >= len(prompts) // 2

    def test_log_probabilities(self, generators, prompts):
        requests = [LogprobRequest(ids, start, True) for ids in prompts for start in (1, len(ids) - 3, len(ids))]
        for request, left, right in zip(
            requests,
            answers(generators("vllm"), requests),
            answers(generators("transformers"), requests),
            strict=True,
        ):
            assert len(left.logprobs) == len(right.logprobs) == len(request.ids) - request.start
            assert left.logprobs == pytest.approx(right.logprobs, abs=2e-3)
            assert left.entropies == pytest.approx(right.entropies, abs=5e-3)

    def test_reward_scores(self, rewards, paths):
        requests = paths[0]
        for count, left, right in zip(
            (1, 2, 3), answers(rewards("vllm"), requests), answers(rewards("transformers"), requests), strict=True
        ):
            assert len(left) == len(right) == count
            assert all(0.0 <= score <= 1.0 for score in left)
            assert left == pytest.approx(right, abs=1e-3)


@both_engines
class TestEnds:
    def test_a_stop_string_ends_the_text_even_inside_a_token(self, kind, generators, prompts):
        # "\n\n" is one token: where it completes the stop string "\n", the text ends within it.
        requests = [CompletionRequest(ids, 300, Sampling(1.0), ("\n",), seed) for seed, ids in enumerate(prompts)]
        stopped = [answer for answer in answers(generators(kind), requests) if answer.finish == "stop"]
        assert stopped
        for answer in stopped:
            assert answer.text.endswith("\n") and answer.text.count("\n") == 1
            assert answer.tokens == len(answer.token_ids)

    def test_any_stretch_of_the_text_can_be_the_stop_string(self, kind, generators, prompts):
        backend = generators(kind)
        free = backend.submit(CompletionRequest(prompts[0], 40, GREEDY)).result()
        stop = free.text[4:7]
        cut = backend.submit(CompletionRequest(prompts[0], 40, GREEDY, ("never written", stop))).result()
        assert cut.finish == "stop"
        assert cut.text == free.text[: free.text.index(stop) + len(stop)]
        assert cut.token_ids == free.token_ids[: cut.tokens] and cut.tokens < free.tokens

    def test_the_models_own_end(self, kind, generators, prompts):
        end = load_tokenizer(str(tinymath.model_dir("small"))).eos_token_id
        requests = [CompletionRequest(ids, 800, Sampling(1.0), (), seed) for seed, ids in enumerate(prompts)]
        ended = [answer for answer in answers(generators(kind), requests) if answer.finish == "eos"]
        assert ended
        for answer in ended:
            assert answer.token_ids[-1] == end and end not in answer.token_ids[:-1]
            assert "<|" not in answer.text and answer.tokens == len(answer.token_ids)

    def test_length_of_the_request_and_of_the_window(self, kind, generators, prompts):
        backend = generators(kind)
        free = backend.submit(CompletionRequest(prompts[0], 40, GREEDY)).result()
        cut = backend.submit(CompletionRequest(prompts[0], 5, GREEDY)).result()
        assert (cut.finish, cut.token_ids) == ("length", free.token_ids[:5])
        long = (prompts[0] * 100)[: backend.window - 3]
        last = backend.submit(CompletionRequest(long, 50, GREEDY)).result()
        assert last.tokens == 3 and last.finish == "length" or last.finish == "eos"

    def test_what_cannot_be_served_is_an_answer_not_a_crash(self, kind, generators, prompts):
        backend = generators(kind)
        long = (prompts[0] * 100)[: backend.window]
        for bad in (
            CompletionRequest(long, 5, GREEDY),
            CompletionRequest((), 5, GREEDY),
            CompletionRequest(prompts[0], 0, GREEDY),
            CompletionRequest((10**6,), 5, GREEDY),
        ):
            answer = backend.submit(bad).result()
            assert (answer.finish, answer.tokens, answer.text) == ("failed", 0, "") and answer.detail
        for unanswerable in (LogprobRequest(long, 3), LogprobRequest(prompts[0], 0), PoolingRequest(prompts[0], (1,))):
            with pytest.raises(BackendError, match="^small: "):
                backend.submit(unanswerable).result()
        assert backend.submit(CompletionRequest(prompts[0], 1, GREEDY)).result().tokens == 1

    def test_a_reward_model_refuses_what_is_too_long(self, kind, rewards, paths):
        with pytest.raises(BackendError, match="^scorer: "):
            rewards(kind).submit(PoolingRequest(paths[0][0].ids * 100, (3,))).result()
        assert len(rewards(kind).submit(paths[0][2]).result()) == 3

    def test_it_says_what_it_is(self, kind, generators):
        described = generators(kind).describe()
        assert described["engine"] == kind and described["seed"] == 11 and described["device"] == "cpu"
        assert described["version"] and described["torch"] and described["dtype"].startswith("float")


def test_a_model_without_all_of_its_weights_is_refused(tmp_path):
    """Transformers draws those that it does not find at random."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tinymath.model_dir("small"), tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="no weight model.norm.weight. Expected a whole language model"):
        hf_generator(ModelConfig(backend="transformers", model=str(tmp_path)), 0)


def test_draws_depend_on_the_seed_alone(generators, prompts):
    backend = generators("transformers")
    sampling = Sampling(0.9, top_p=0.95, top_k=50, min_p=0.001)
    requests = [CompletionRequest(prompts[seed % 8], 30, sampling, ("\n\n",), seed) for seed in range(16)]
    together = answers(backend, requests)
    assert answers(backend, requests[::-1])[::-1] == together
    assert [backend.submit(request).result() for request in requests[:5]] == together[:5]
    again = [CompletionRequest(prompts[0], 60, Sampling(1.5), (), seed) for seed in range(16)]
    assert len({answer.token_ids for answer in answers(backend, again)}) > 1


def test_sampling_filters():
    torch = pytest.importorskip("torch")
    from rollouts.models.hf.generator import _probabilities

    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]], dtype=torch.float64).log()

    def kept(**fields):
        return _probabilities(logits, Sampling(**{"temperature": 1.0, **fields}))[0].tolist()

    assert kept() == pytest.approx([0.5, 0.25, 0.15, 0.1])
    assert kept(temperature=0.5) == pytest.approx([value**2 / 0.345 for value in (0.5, 0.25, 0.15, 0.1)])
    assert kept(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert kept(top_p=0.6) == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert kept(top_p=0.4) == pytest.approx([1, 0, 0, 0])
    assert kept(min_p=0.25) == pytest.approx([value / 0.9 for value in (0.5, 0.25, 0.15)] + [0])


class TestStarting:
    def test_a_missing_model_is_named(self, tmp_path):
        model = ModelConfig(backend="transformers", model=str(tmp_path / "nowhere"))
        with pytest.raises(BackendError, match="small: .*nowhere"):
            open_backend("small", model, seed=0)

    def test_vllm_missing_names_the_extra(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"small: .*trim-routing\[vllm\]"):
            open_backend("small", embedded_family("vllm").small, seed=0)

    def test_gpus_are_counted_among_the_visible_ones(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
        from rollouts.models.open import _visible

        assert _visible((1,)) == ["6"] and _visible(()) == []
        with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
            _visible((2,))

    def test_opening_imports_nothing_heavy(self):
        code = (
            "import sys, rollouts.models.open, rollouts.models.vllm_engine, rollouts.models.hf.generator, "
            "rollouts.models.hf.pooling; print({'torch', 'vllm', 'transformers'} & set(sys.modules))"
        )
        shown = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3], check=True
        )
        assert shown.stdout.strip() == "set()"


class TestRewardModelFolders:
    """The head is read by hand from safetensors, so odd folders are this project's own business."""

    @pytest.fixture
    def folder(self, tmp_path):
        target = tmp_path / "prm"
        shutil.copytree(tinymath.model_dir("prm"), target)
        return target

    def load(self, folder, paths):
        from rollouts.models.hf.pooling import pooling

        shape = {"dtype": "float32", "max_length": 1024, "max_batch": 8, "threads": 1}
        model = ModelConfig(backend="transformers", model=str(folder), **shape)
        return pooling(model, seed=0, reading=paths[1])

    def scores(self, engine, paths):
        for key, request in enumerate(paths[0]):
            engine.add(key, request)
        return dict(engine.step())

    def test_shards_give_the_scores_of_one_file(self, folder, paths):
        from safetensors.torch import load_file, save_file

        expected = self.scores(self.load(folder, paths), paths)
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        places = {}
        for number, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2])):
            file = f"model-{number}.safetensors"
            save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
            places.update(dict.fromkeys(names, file))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        assert self.scores(self.load(folder, paths), paths) == expected

    @pytest.mark.parametrize("missing", ["score.2.weight", "model.layers.1.mlp.up_proj.weight"])
    def test_a_missing_weight_is_named(self, folder, paths, missing):
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        del weights[missing]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=missing.removeprefix("model.").replace(".", r"\.")):
            self.load(folder, paths)


def test_the_texts_of_completions_are_those_of_the_tokenizer_that_prompts_have(tmp_path):
    """Transformers builds tokenizers anew by the name of their class, byte-level ones of some R1 distills wrongly."""
    for file in tinymath.model_dir("small").iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    for name, told in (
        ("tokenizer_config", {"tokenizer_class": "LlamaTokenizerFast"}),
        ("config", {"model_type": "llama"}),
    ):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | told))
    prompts = PromptFormat(load_tokenizer(str(tmp_path)), None)
    loaded = hf_generator(ModelConfig(backend="transformers", model=str(tinymath.model_dir("small")),
                                      tokenizer=str(tmp_path), dtype="float64"), seed=0)  # fmt: skip
    prompt = prompts.ids(generate_problems("train", 1)[0].question)
    loaded.add(1, CompletionRequest(prompt, 40, Sampling(0.0), ("\n\n",)))
    while not (found := loaded.step()):
        pass
    completion = found[0][1]
    assert completion.text == "".join(prompts.pieces(prompt, completion.token_ids)) and completion.finish == "stop"
