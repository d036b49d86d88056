"""Single steps from a large model that can only be asked by chat: vendors' APIs that continue no partial answer."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

from rollouts.config import GeneratorConfig, Limits, Sampling
from rollouts.errors import BackendError, ConfigError, RequestFailed, did_you_mean
from rollouts.models.base import UNPENALISED
from rollouts.models.server.http import Server, Servers
from rollouts.models.stepwise import Fits, Generation, close_step
from rollouts.text.prompts import Turns, chat_messages
from rollouts.text.steps import DELIMITER, Prefix, Segment, Step, StopReason, closes_box, normalise

_REQUEST = (
    "Problem:\n{question}\n\n{so_far}Write only the next step of the solution (step {number}): one short paragraph of "
    "plain reasoning, without a heading, a step number or blank lines. Do not repeat earlier steps and do not go on "
    "to later ones. If this step finishes the solution, end it with the final answer in \\boxed{{}}."
)
_SO_FAR = "Solution so far:\n{steps}\n\n"
_PROBE = "Answer with the word OK."
_PROBE_TOKENS = 16  # some APIs refuse less
# A server that refuses one of these is not sent it, as long as the value wanted is the one it would use anyway.
_NEUTRAL: dict[str, Any] = {"top_k": 0, "min_p": 0.0, **UNPENALISED, "top_p": 1.0, "temperature": 1.0}
_BEYOND_OPENAI = ("top_k", "min_p", "repetition_penalty")
# Headings that name a step, a line of their own: "Step 4", "**Step 4: Add**", "### Step 4: Add".
_HEADING = re.compile(
    r"(?:\#{1,6}[ \t]+(?:\*\*|__)?step\b[^\n]*|(?P<bold>\*\*|__)step\s+\d+\b[^\n]*?(?P=bold)|step\s+\d+)"
    r"[:.]?[ \t]*(?:\n+|$)",
    re.IGNORECASE,
)
# Labels before a step on its own line: "Step 4:", "**Step 4 (add):**", "Next step -".
_LABEL = re.compile(
    r"(?P<bold>\*\*|__)?(?:the\s+)?(?:next\s+)?step(?:\s+\d+)?(?:\s*\([^)\n]*\))?"
    r"\s*(?:[:.)]|\s[-\u2013\u2014](?=\s)|(?=\*\*|__))(?P<close>\*\*|__)?[:.]?\s*",
    re.IGNORECASE,
)
_THINKING = re.compile(r"\s*<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL)


def step_request(question: str, steps: Sequence[str]) -> str:
    """Return the message that asks for the step after `steps`."""
    numbered = "\n".join(f"Step {number}: {step.strip()}" for number, step in enumerate(steps, 1))
    so_far = _SO_FAR.format(steps=numbered) if steps else ""
    return _REQUEST.format(question=question, so_far=so_far, number=len(steps) + 1)


def first_step(answer: str, number: int) -> tuple[str, bool]:
    """Cut an answer after its first step.

    Labels and headings that models write before a step (``Step 4:``, ``**Step 4: Add**``, ``4.``), decorative
    lines and a block of thinking are taken out.

    Args:
        answer: What the model wrote.
        number: Number of the step that was asked for; a bare number is a label only if it is this one, or 1.

    Returns:
        The step without its delimiter and without a blank line inside, empty if there is none; and whether a
        delimiter completed it.
    """
    rest, before = _THINKING.sub("", answer, count=1).lstrip(), None
    while rest != before:
        before = rest
        rest = re.sub(rf"^(?:\({number}\)|(?:{number}|1)[.)])\s+", "", rest)
        rest = _HEADING.sub("", rest, count=1) if _HEADING.match(rest) else rest
        if label := _LABEL.match(rest):
            opened = label["bold"] or ""
            rest = (opened if not label["close"] else "") + rest[label.end() :]
        rest = rest.lstrip()
    block, complete = normalise(rest)
    if rest.startswith("<think") or not any(map(str.isalnum, block)):
        return "", False  # nothing but thinking that was cut off, or but decoration
    return block.rstrip().rsplit(DELIMITER, 1)[-1], complete


@dataclass(frozen=True)
class Said:
    """What an answer to a chat holds.

    Attributes:
        tokens: Decoded tokens as billed, hidden ones included.
        hidden: Those of reasoning that is not shown, as far as they are told.
        prompt_tokens: Tokens of the prompt; 0 if they are not told.
    """

    text: str
    tokens: int
    hidden: int
    prompt_tokens: int
    reason: str


def read_said(body: Any) -> Said:
    """Return what an answer holds; raises LookupError, TypeError or ValueError for something else."""
    choice, usage = body["choices"][0], body["usage"]
    hidden = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
    prompt = usage.get("prompt_tokens")
    said = Said(
        text_of(choice["message"].get("content")),
        decoded(usage),
        hidden if isinstance(hidden, int) else 0,
        prompt if isinstance(prompt, int) else 0,
        str(choice["finish_reason"]),
    )
    if min(said.tokens, said.prompt_tokens, said.hidden) < 0:
        raise ValueError(f"{said.prompt_tokens}, {said.tokens} and {said.hidden} tokens, expected at least 0")
    return said


class StepChat:
    """How one model is asked for a step by chat, whoever sends it: which fields it takes, and what its answers mean.

    Tokens are those that the server bills, what it wrote beyond the step and any reasoning it hides included. An answer
    without a step, such as one whose tokens all went into hidden reasoning, is a failed step.

    Attributes:
        unsent: Fields that it refuses, and is not sent.
        path: Where chats are asked for, below the base URL.
    """

    path = "chat/completions"

    def __init__(self, role: str, model: GeneratorConfig) -> None:
        """Suppose that it takes every field; errors name `role`."""
        self.role, self.model = role, model
        self.unsent: set[str] = set()
        self._limit = "max_tokens"

    def probe(self) -> dict[str, Any]:
        """Return the body of something trivial."""
        return self.payload(_PROBE, _PROBE_TOKENS)

    def check(self, said: Said) -> None:
        """Raise ConfigError if the answer to a probe has no text; hidden thoughts may take all of so few tokens."""
        if not said.text.strip() and said.reason != "length":
            raise ConfigError(
                f"{self.role}: {', '.join(self.model.url)} answered a chat with {self.model.model} without text "
                f"(ended by {said.reason!r})."
            )

    def leave_out(self, refusal: str, payload: Mapping[str, Any]) -> bool:
        """Adapt to a refusal; return whether there was anything to adapt.

        Raises:
            ConfigError: It refuses a value that the configuration wants.
        """
        if "max_tokens" in payload and "max_completion_tokens" in refusal:
            self._limit = "max_completion_tokens"
            return True
        named = [name for name in _NEUTRAL if name in payload and re.search(rf"\b{name}\b", refusal)]
        if not named and "stop" in payload and re.search(r"\bstop\b", refusal):
            named = ["stop"]
        named = named or [name for name in _BEYOND_OPENAI if name in payload]
        wanted = [f"{name} = {payload[name]}" for name in named if payload[name] != _NEUTRAL.get(name, payload[name])]
        if wanted:
            raise ConfigError(f"{self.role}: {', '.join(self.model.url)} refuses {', '.join(wanted)} ({refusal}).")
        self.unsent.update(named)
        return bool(named)

    def unable(self, sampling: Sampling) -> list[str]:
        """Return the sampling parameters that cannot be had, as the server takes none but its own."""
        return [name for name, value in asdict(sampling).items() if name in self.unsent and value != _NEUTRAL[name]]

    def payload(
        self,
        content: str,
        max_tokens: int,
        *,
        stop: bool = True,
        model: GeneratorConfig | None = None,
        turns: Turns = (),
    ) -> dict[str, Any]:
        """Return a body; sampling and system message are those of `model`, by default as configured."""
        model = model or self.model
        fields = {**_NEUTRAL, **asdict(model.sampling)}
        return {
            "model": model.model,
            "messages": chat_messages(content, model.system_prompt, turns),
            self._limit: max_tokens,
            "stream": False,
            **({"stop": [DELIMITER]} if stop and "stop" not in self.unsent else {}),
            **{name: value for name, value in fields.items() if name not in self.unsent},
        }

    async def step(
        self,
        send: Callable[[Mapping[str, Any], int], Awaitable[Said]],
        prefix: Prefix,
        limits: Limits,
        fits: Fits,
        *,
        model: GeneratorConfig | None = None,
        turns: Turns = (),
        again: bool = True,
    ) -> Generation:
        """Ask for the next step.

        Args:
            send: Sends a body that may take so many tokens; what it raises is raised, but for `RequestFailed`.
            prefix: Where it goes on.
            limits: Token and step limits.
            fits: Whether a prefix leaves room in every role's window.
            model: As of `payload`.
            turns: Earlier turns of the chat.
            again: Whether an answer without a step is asked for once more.
        """
        content = step_request(prefix.question, prefix.steps)
        budget = min(limits.step_tokens, limits.solution_tokens - prefix.used_tokens)
        billed, why = 0, "no step in its answer"
        # An answer that begins with a heading or with thinking ends at the first blank line in it, without a step:
        # then it is asked for again without the stop string.
        for stop in (False,) if "stop" in self.unsent else (True, False)[: 1 + again]:
            try:
                said = await send(self.payload(content, budget, stop=stop, model=model, turns=turns), budget)
            except RequestFailed as error:
                why = str(error)
                break
            billed += said.tokens
            if said.reason not in ("stop", "length"):
                why = f"ended by {said.reason!r}"  # such as a vendor's filter
                break
            text, complete = first_step(said.text, len(prefix.steps) + 1)
            cut = said.reason == "length" and not complete
            if cut and not text:
                why = f"no step within {budget} tokens; it thought, or hid what it decoded: raise limits.step_tokens"
                break
            if text:
                goes_on = not cut and not closes_box(text)
                segment = Segment(text + DELIMITER * goes_on, 0, billed, goes_on)
                step = close_step(prefix, (), segment, StopReason.LENGTH, limits, fits, 0)
                return Generation((step,), billed)
        return Generation((Step("", billed, StopReason.FAILED),), billed, reason=why)


class ChatWriter:
    """Asks for one step at a time; the manifest records this as another process than continuing a prefix.

    Such an API takes no prompt of token ids (`StepChat`).
    """

    whole_paths = False

    def __init__(self, role: str, model: GeneratorConfig, limits: Limits, fits: Fits) -> None:
        """Connect, and find out which request fields the server takes.

        Args:
            role: Named in errors; ``large``.
            model: Configuration with backend ``server`` and ``chat_only``.
            limits: Token and step limits.
            fits: Whether a prefix leaves room in every role's window.

        Raises:
            ConfigError: No key, or the server refuses a parameter that the configuration wants.
            BackendError: The server is not there, refuses the key, or has no such model.
        """
        self.role = role
        self._limits = limits
        self._fits = fits
        self._chat = StepChat(role, model)
        self._http = Servers(role, model)
        self._known: Mapping[str, Any] = {}
        try:
            self._known = self._http.meet(self._identify)
        except BackendError as error:
            listed, name = self._http.listed, model.model
            known = did_you_mean(name, listed) if listed and name not in listed else ""
            raise BackendError(f"{error}{known}") from None

    async def _identify(self, server: Server) -> dict[str, Any]:
        """Ask something trivial, leaving out one refused field after the other; later ones must take what is sent."""

        def adapt(refusal: str, payload: Mapping[str, Any]) -> bool:
            return not self._known and self._chat.leave_out(refusal, payload)

        said, told = await server.chat(self._chat.probe, read_said, adapt)
        self._chat.check(said)
        return told

    def submit(self, prefix: Prefix, *, whole: bool) -> Future[Generation]:
        """Ask for the next step; `whole` makes no difference. Raises BackendError if the server is gone."""

        async def send(payload: Mapping[str, Any], budget: int) -> Said:
            return await self._http.post(self._chat.path, payload, read_said, budget, prefix.question)

        return self._http.submit(lambda: self._chat.step(send, prefix, self._limits, self._fits))

    def describe(self) -> Mapping[str, Any]:
        """Return the servers' version and number, the model's name, and which fields they are not sent."""
        return self._http.described("chat", unsent=sorted(self._chat.unsent))

    def close(self) -> None:
        """Cancel what is pending and disconnect."""
        self._http.close()


def text_of(content: Any) -> str:
    """Return the text of a message: a string, or a list of parts, of which those that hold thinking are left out."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise TypeError("message.content is neither text nor a list of parts")
    said = [{"text": part} if isinstance(part, str) else part for part in content]
    return "".join(part["text"] for part in said if part.get("type", "text") in ("text", "output_text"))


def decoded(usage: Mapping[str, Any]) -> int:
    """Return the decoded tokens; some APIs leave hidden ones out of `completion_tokens`, and tell them elsewhere."""
    told = int(usage["completion_tokens"])
    total, prompt = usage.get("total_tokens"), usage.get("prompt_tokens")
    if isinstance(total, int) and isinstance(prompt, int):
        told = max(told, total - prompt)
    hidden = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
    # Where they are a part of the others, they cannot be more than these.
    return told + hidden if isinstance(hidden, int) and hidden > told else told
