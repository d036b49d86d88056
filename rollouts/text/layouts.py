"""The layouts of process reward models by name: that of Qwen2.5-Math-PRM, and those of three other kinds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import date as Date
from itertools import accumulate
from typing import Any

from rollouts.config import LAYOUTS, ScorerConfig, checked
from rollouts.errors import ConfigError
from rollouts.text.prompts import PROBE, STEPS, ChatLayout, Reading, RewardFormat, RewardLayout, hash_of
from rollouts.text.tokenizer import model_settings

SHEPHERD_TAG = "\u043a\u0438"  # of Math-Shepherd: two letters that no English text has
_NUMBERED = re.compile(r"step\s+\d+\s*[:.]", re.IGNORECASE)


class SkyworkFormat(RewardLayout):
    r"""The layout of Skywork-o1-Open-PRM: a value head, read at the line break after each step.

    The beginning-of-sequence token, the question and a line break are followed by the lines of the steps. Each line is
    tokenised by itself and followed by a line break; of a step the last one is read. The head's value is made a
    probability by the logistic function.

    Source: the model card of Skywork/Skywork-o1-Open-PRM-Qwen-2.5-7B and what it refers to,
    https://github.com/SkyworkAI/skywork-o1-prm-inference (``model_utils/io_utils.py``, ``model_utils/prm_model.py``).
    There every line is a step; here a step may have several.
    """

    layout = "skywork-o1"

    def _find_reading(self) -> Reading:
        self._break = self.one_token("\n", "a line break")
        return Reading(labels=1)

    def _head(self, question: str) -> str:
        return f"{self.tokenizer.special_tokens_map.get('bos_token', '')}{self.special.plain(question)}\n"

    def text(self, question: str, steps: Sequence[str]) -> str:
        """Return the input that scores each of `steps`."""
        return self._head(question) + "".join(f"{self.said(step)}\n" for step in steps)

    def marked(self, question: str, steps: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the input as token ids, and the positions of the line breaks that end steps."""
        ids, places = list(self.encode(self._head(question))), []
        for step in steps:
            for line in self.said(step).split("\n"):
                ids += (*self.encode(line), self._break)
            places.append(len(ids) - 1)
        return tuple(ids), tuple(places)


class ShepherdFormat(RewardLayout):
    r"""The layout of Math-Shepherd: a language model, whose next token after a step tag is ``+`` or ``-``.

    The question and the steps, which are numbered (``Step 1: ...``), each followed by a blank, the step tag and a line
    break. Scores are P(+ | + or -) of the token after each tag.

    Source: the model card of peiyi9979/math-shepherd-mistral-7b-prm, https://arxiv.org/abs/2312.08935.
    """

    layout = "math-shepherd"
    step_tag = SHEPHERD_TAG

    def __init__(self, tokenizer: Any, step_tag: str = SHEPHERD_TAG, **kept: Any) -> None:
        """Find the tokens of the step tag, around which blanks do not count, and of both verdicts.

        Raises:
            ConfigError: Another number of tokens than one for each, or a tag that is not found again in an input.
        """
        super().__init__(tokenizer, step_tag=step_tag.strip(), **kept)
        self.marked(PROBE, STEPS)

    def _find_reading(self) -> Reading:
        backend, step_tag = self.tokenizer.backend_tokenizer, self.step_tag
        whole, bare = backend.encode("+").ids, backend.encode("+", add_special_tokens=False).ids
        self._begin = tuple(whole[: whole.index(bare[0])])
        verdicts = self.encode("+ -")
        if len(verdicts) != 2:
            raise ConfigError(f"scorer: '+ -' is {len(verdicts)} tokens of its tokenizer, expected two.")
        # As the tag stands in an input, after a blank: many tokenizers have another token for it elsewhere.
        alone, tagged = (self.encode(f"a{end}") for end in ("", f" {step_tag}"))
        if tagged[: len(alone)] != alone or len(tagged) != len(alone) + 1:
            raise ConfigError(f"scorer: step tag {step_tag!r} after a blank is not one token of its tokenizer.")
        self.step_tag_id = tagged[-1]
        return Reading(0, (verdicts[1], verdicts[0]), self.step_tag_id)

    def text(self, question: str, steps: Sequence[str]) -> str:
        """Return the input that scores each of `steps`, without the beginning-of-sequence token."""
        written = [self.said(step) for step in steps]
        numbered = (
            text if _NUMBERED.match(text) else f"Step {at}: {text}".rstrip() for at, text in enumerate(written, 1)
        )  # of a step without text, too, the tag stands after one blank
        return f"{self.special.plain(question)} " + "\n".join(f"{each} {self.step_tag}" for each in numbered)

    def marked(self, question: str, steps: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the input as token ids, which hold exactly one step tag per step, and the tags' positions."""
        ids = self._begin + self.encode(self.text(question, steps))
        places = tuple(place for place, token in enumerate(ids) if token == self.step_tag_id)
        if len(places) != len(steps):
            raise ConfigError(
                f"scorer: {len(places)} step tags {self.step_tag!r} are in an input of {len(steps)} steps."
            )
        return ids, places


class TurnsFormat(ChatLayout):
    """The layout of RLHFlow's PRMs: a chat in which the assistant answers each step with ``+`` or ``-``.

    The question with the first step, and then each step, is a message of the user; the assistant has answered all
    earlier ones with ``+``. Scores are P(+ | + or -) of the token with which its answer begins.

    Source: the model card of RLHFlow/Llama3.1-8B-PRM-Deepseek-Data and
    https://github.com/RLHFlow/RLHF-Reward-Modeling (``math-rm/prm_evaluate.py``).
    """

    layout = "rlhflow"

    def _find_reading(self) -> Reading:
        return Reading(0, (self.one_token("-", "verdict"), self.one_token("+", "verdict")))

    def _open(self, system_prompt: str | None, date: Date | None, remembered: int) -> None:
        super()._open(system_prompt, date, remembered)
        _, ask, turn, again, _ = self._chat.around(PROBE, 4, joined=True)
        if ask != again:
            raise self._chat.refusal("opens the assistant's messages in two ways. Name a `tokenizer` with another one.")
        if self.encode(self.text(PROBE, STEPS)) != self.ids(PROBE, STEPS):
            raise self._chat.refusal("does not divide a verdict from what is before it. Name another `tokenizer`.")

    def hash_on(self, date: Date | None) -> str:
        """Return what `template_hash` is on a date."""
        return hash_of("+".join(self._render(PROBE, date)))

    def _render(self, question: str, date: Date | None = None) -> tuple[str, str, str]:
        """Return what is before the first step, between a step and its verdict, and between that and the next step."""
        head, ask, turn, *_ = self._chat.around(self.special.plain(question), 4, date, joined=True)
        return head, ask, turn

    def _parts(self, question: str, steps: Sequence[str]) -> list[str]:
        """Return the pieces of an input, each of which ends where a score is read."""
        head, ask, turn = self._head(question)
        return [f"{f'+{turn}' if at else head}{self.said(step)}{ask}" for at, step in enumerate(steps)]

    def text(self, question: str, steps: Sequence[str]) -> str:
        """Return the input that scores each of `steps`."""
        return "".join(self._parts(question, steps)) or self._head(question)[0]

    def marked(self, question: str, steps: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the input as token ids, and the positions of the tokens before the verdicts."""
        pieces = [self.encode(part) for part in self._parts(question, steps)]
        ends = accumulate(map(len, pieces))
        return tuple(token for piece in pieces for token in piece), tuple(end - 1 for end in ends)


_LAYOUTS = {each.layout: each for each in (RewardFormat, SkyworkFormat, ShepherdFormat, TurnsFormat)}
_OF_ARCHITECTURE = {"Qwen2ForProcessRewardModel": RewardFormat.layout, "Qwen2ForPrmModel": SkyworkFormat.layout}


def reward_layout(scorer: ScorerConfig, tokenizer: Any, **kept: Any) -> RewardLayout:
    """Return how the reward model of a configuration, of kind ``prm``, reads paths.

    Args:
        scorer: The configuration.
        tokenizer: Its tokenizer.
        kept: Date, memory and splitting, as of `rollouts.text.prompts.RewardLayout`.

    Raises:
        ConfigError: Nobody says which layout it is, or the tokenizer is not one for it.
    """
    assert scorer.model is not None
    layout = scorer.layout
    if layout is None and scorer.model.backend == "server":  # which serves what vLLM can, under any name
        with suppress(ConfigError):
            layout = layout_of(*scorer.model.tokenizer_source)
        layout = layout or RewardFormat.layout
    layout = layout or layout_of(scorer.model.model, scorer.model.revision)
    scorer = checked(ScorerConfig, {**scorer.model_dump(exclude_unset=True), "layout": layout})  # which knows the rest
    told: dict[str, Any] = {"step_tag": scorer.step_tag} if scorer.step_tag else {}
    made: RewardLayout = _LAYOUTS[layout](tokenizer, system_prompt=scorer.system_prompt, **told, **kept)
    return made


def layout_of(model: str, revision: str | None = None) -> str:
    """Return the layout that the configuration of a reward model tells.

    Raises:
        ConfigError: It tells none: language models look alike, whatever they were tuned for.
    """
    found = model_settings(model, revision).get("architectures") or ["unknown"]
    for architecture in found:
        if architecture in _OF_ARCHITECTURE:
            return _OF_ARCHITECTURE[architecture]
    names = ", ".join(f'"{name}"' for name in LAYOUTS)
    raise ConfigError(f"scorer: {model}: a model of architecture {', '.join(found)} may be a reward model of several "
                      f"kinds. Name its `layout` under [scorer]: {names}.")  # fmt: skip
