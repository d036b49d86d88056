"""The embedded family: problems, labels, tokenizer, bundled weights, training."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from rollouts.errors import ConfigError
from rollouts.tinymath import FRESH, SPLITS, generate_problems, label_steps, model_dir, solution_steps

QUESTION = "Let a=70+33, b=a+49, c=b*12, d=c%60, e=d-b. Find e."
STEPS = [
    "a=70+33=103\n\n",
    "b=a+49=103+49=152\n\n",
    "c=b*12=152*12=1520+300+4=1820+4=1824\n\n",
    "d=c%60=1824%60=1824-1800=24\n\n",
    "e=d-b=24-152=-128\n\n",
    "The answer is \\boxed{-128}",
]


# ---------------------------------------------------------------- problems


def test_splits_have_their_sizes_ids_and_no_common_question() -> None:
    questions: Counter[str] = Counter()
    for split, count in {**SPLITS, **FRESH}.items():
        problems = generate_problems(split)
        assert len(problems) == count
        assert [p.id for p in problems[:2]] == [f"tinymath-{split}-00000", f"tinymath-{split}-00001"]
        questions.update(p.question for p in problems)
    assert max(questions.values()) == 1


def test_a_shorter_list_is_a_prefix_of_a_longer_one() -> None:
    assert generate_problems("train", 100) == generate_problems("train", 300)[:100]
    assert generate_problems("test", 0) == []


def test_training_problems_of_the_models_are_in_no_split() -> None:
    import random
    from itertools import islice

    from rollouts.tinymath.problems import training_programs

    held_out = {p.question for split in (*SPLITS, *FRESH) for p in generate_problems(split)}
    trained = {p.question for p in islice(training_programs(random.Random(5)), 5000)}
    assert len(trained) > 4900
    assert not held_out & trained


@pytest.mark.parametrize("split", [*SPLITS, *FRESH])
def test_reference_solutions_are_right_and_give_the_answer(split: str) -> None:
    for problem in generate_problems(split, 200):
        steps = solution_steps(problem.question)
        assert 4 <= len(steps) <= 12
        assert all(label_steps(problem.question, steps))
        assert steps[-1] == f"The answer is \\boxed{{{problem.answer}}}"
        assert all(step.endswith("\n\n") for step in steps[:-1])
        assert int(problem.answer) >= 0


def test_arithmetic_of_reference_solutions_is_checked_by_python() -> None:
    for problem in generate_problems("ood", 50):
        for step in solution_steps(problem.question)[:-1]:
            _, _, *written = step.strip().split("=")
            assert len({eval(part) for part in written}) == 1, step  # noqa: S307


def test_unknown_split_role_and_question_are_refused() -> None:
    with pytest.raises(ConfigError, match="validation"):
        generate_problems("dev")
    with pytest.raises(ConfigError, match="-1"):
        generate_problems("test", -1)
    with pytest.raises(ConfigError, match="large"):
        model_dir("medium")
    with pytest.raises(ConfigError, match="Find"):
        solution_steps("What is 2+2?")


# ---------------------------------------------------------------- labels


def test_right_steps_with_and_without_delimiter() -> None:
    assert label_steps(QUESTION, STEPS) == [True] * 6
    assert label_steps(QUESTION, [step.strip() for step in STEPS]) == [True] * 6


def test_a_wrong_value_makes_its_own_step_wrong_only() -> None:
    steps = [
        STEPS[0],
        "b=a+49=103+49=162",
        "c=b*12=162*12=1620+320+4=1940+4=1944",
        "d=c%60=1944%60=1944-1920=24",
        "e=d-b=24-162=-138",
        "The answer is \\boxed{-138}",
    ]
    assert label_steps(QUESTION, steps) == [True, False, True, True, True, True]


@pytest.mark.parametrize(
    "step",
    [
        "b=a+49=104+49=153",  # operand copied wrongly
        "b=a+49=103+48=151",  # literal copied wrongly
        "b=a+48=103+48=151",  # definition copied wrongly
        "c=a+49=103+49=152",  # another variable
        "b=a+49=152",  # no copied operands
        "b=a+49=103+49=151+2=152",  # scratch wrong
        "b=a+49=103+49",  # no value
        "b=a+49=103+49=",
        "b=103+49=152",  # definition missing
        "b = a+49 = 103+49 = 152",
        "The answer is \\boxed{103}",
        "hello",
        "",
    ],
)
def test_wrong_and_malformed_steps(step: str) -> None:
    assert label_steps(QUESTION, [STEPS[0], step]) == [True, False]


def test_scratch_must_be_right() -> None:
    assert label_steps(QUESTION, [*STEPS[:2], "c=b*12=152*12=1520+310+4=1824"])[-1] is False
    assert label_steps(QUESTION, [*STEPS[:3], "d=c%60=1824%60=1824-1790=24"])[-1] is False


def test_what_was_never_written_cannot_be_used() -> None:
    assert label_steps(QUESTION, [STEPS[0], "nonsense", "b=a+49=103+49=152"]) == [True, False, True]
    assert label_steps(QUESTION, [STEPS[0], STEPS[2], STEPS[3]]) == [True, False, True]
    assert label_steps(QUESTION, [STEPS[0], "c=b*12=", STEPS[2]]) == [True, False, False]


def test_answer_must_be_the_written_value_and_the_end() -> None:
    assert label_steps(QUESTION, [*STEPS[:-1], "The answer is \\boxed{128}"])[-1] is False
    assert label_steps(QUESTION, [*STEPS, STEPS[-1], STEPS[0]])[-2:] == [False, False]


@pytest.mark.parametrize("garbage", ["", "\n\n", "=" * 50, "a=" + "9" * 6000, "\\boxed{" * 9, "a=٣+٣=٦", "\x00b=b=b"])
def test_labels_never_raise(garbage: str) -> None:
    assert label_steps(QUESTION, [garbage, garbage]) == [False, False]
    assert label_steps(garbage, ["a=1+1=2"]) == [False]
    assert label_steps(f"Let {garbage}. Find a.", ["a=1+1=2"]) == [False]
    assert label_steps("Let a=5%0. Find a.", ["a=5%0=0"]) == [False]


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("role", ["small", "large", "prm"])
def test_tokenizer_round_trip_through_auto_tokenizer(role: str) -> None:
    from transformers import AutoConfig, AutoTokenizer

    from rollouts.tinymath.training.batches import Encoder

    tokenizer = AutoTokenizer.from_pretrained(model_dir(role))
    encoder = Encoder()
    assert len(tokenizer) == AutoConfig.from_pretrained(model_dir(role)).vocab_size == 261
    for problem in generate_problems("test", 30):
        steps = solution_steps(problem.question)
        message = [{"role": "user", "content": problem.question}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        assert prompt == f"<|im_start|>user\n{problem.question}<|im_end|>\n<|im_start|>assistant\n"
        text = prompt + "".join(steps)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert ids == encoder.prompt(problem.question) + [i for step in steps for i in encoder.text(step)]
        assert ids.count(tokenizer.convert_tokens_to_ids("ĊĊ")) == len(steps) - 1
    assert tokenizer("<extra_0>")["input_ids"] == [encoder.tag]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_weights_are_small() -> None:
    files = [file for role in ("small", "large", "prm") for file in model_dir(role).iterdir()]
    assert sum(file.stat().st_size for file in files) <= 10 * 2**20


def test_bundled_models_do_as_the_family_promises() -> None:
    from rollouts.tinymath.training.results import measure_family

    models, scores = measure_family(model_dir("small").parent, splits=["test"], limit=200)
    # The wanted bands (small 0.35-0.60, large 0.85-0.97, area 0.85-0.95), each wider by about two standard
    # errors of a share or an area measured on 200 problems; RESULTS.md has the figures on all of them.
    assert 0.35 <= models["small", "test"].accuracy <= 0.60
    assert 0.80 <= models["large", "test"].accuracy <= 0.97
    assert 0.80 <= scores["test"]["minimum score"] <= 0.95
    assert scores["test"]["up to first wrong step"] >= 0.80
    errors = models["small", "test"].step_errors
    assert max(errors.values()) > 2 * min(errors.values()), "difficulty should be uneven"


# ---------------------------------------------------------------- training


def test_quick_training_writes_three_folders_that_load(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    command = [sys.executable, "-m", "rollouts.tinymath.training.train", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Process reward model" in done.stdout
    for role in ("small", "large", "prm"):
        assert (tmp_path / role / "model.safetensors").is_file()
        assert (tmp_path / role / "tokenizer.json").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import sys, rollouts.tinymath; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
