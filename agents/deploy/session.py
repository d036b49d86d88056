"""One solution under way: what a router sees, decides and is told of it (docs/design.md, section 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import EllipsisType
from typing import Any, cast

import numpy as np

from agents.routers.asking import Asking
from agents.routers.base import Floats, Knob, Router, StatefulRouter, is_blind, refuse_undrafted, told_cap
from agents.routers.whole import Cascade, QueryRouter
from rollouts.errors import ConfigError, did_you_mean
from rollouts.text.steps import ROLES, SMALL, Step, StopReason, closes_box
from rollouts.trees.arrays import ASK, CONTINUE_SMALL, ESCALATE_LARGE
from rollouts.trees.columns import FACTS, Folded, checked_signal, facts_of, is_signal
from trim_env.features import Schema, left_feature, probabilities, schema_named

_ROWS = 16  # computed at once: few enough for NumPy to multiply on one thread; waking others takes longer
_STATE = frozenset({"score", "tokens"})  # routers with a state are told of them
_NOTHING = Schema("nothing", 1, ())
_CHECKED = {name: fact.checked for name, fact in FACTS.items()}


class Session:
    """One solution: `decide` for each proposal, then `accept`; see `agents.deploy.policy` for an example.

    Attributes:
        router: Who decides; of a mixture, the part that was drawn.
        step: Number of the step that is decided next, from 1.
        ended: Whether the solution is complete: a terminal step was accepted, or `max_steps` steps.
        chance: Probability of escalating in the last decision; None before the first.
        decides_once: Whether it decides for the whole problem: ``decide(question=...)`` says who writes all of it, and
            then the session has ended.
    """

    def __init__(
        self,
        router: Any,
        knob: Knob,
        max_steps: int,
        caps: tuple[int | None, int | None],
        generator: np.random.Generator | None,
        splitting: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin.

        Args:
            router: Who decides: an `AnyRouter`, or a `QueryRouter`.
            knob: The setting in use.
            max_steps: Most steps.
            caps: Most escalations, and most tokens of the large model; None for no cap.
            generator: For routers that draw; None: one from entropy, once it is needed.
            splitting: How solutions are cut into steps, as artefacts have it; None: at blank lines.

        Raises:
            ConfigError: The router is a cascade, or no router.
            ArtefactError: It decides before there are proposals.
        """
        if isinstance(router, Cascade):
            raise ConfigError(
                f"{router.name} decides once for a whole problem, and when the small model has solved it: it cannot be "
                "streamed, and has no session."
            )
        if not any(isinstance(router, kind) for kind in (QueryRouter, Router, StatefulRouter)):
            raise ConfigError(f"A {type(router).__name__} is no router of steps. Begin with agents.Policy.session.")
        refuse_undrafted(router)
        self.router, self.knob, self.decides_once = router, knob, isinstance(router, QueryRouter)
        self.step, self.escalations, self.large_tokens, self.ended = 1, 0, 0, False
        self._schema = _NOTHING if is_blind(router) else schema_named(router.schema)
        self._bought = frozenset(router.facts if isinstance(router, Asking) else ())
        self._folded = Folded(fold for fold in self._schema.folds if fold.fact not in self._bought)
        self._asked_of = tuple(fold for fold in self._schema.folds if fold.fact in self._bought)
        told = _STATE if isinstance(router, StatefulRouter) else frozenset[str]()
        self._needs, self._needs_of_large = (
            (self._schema.facts - self._bought) | told,
            self._folded.facts | told | {"tokens"},
        )
        self._max_steps, (self._cap, self._token_cap), self._generator = max_steps, caps, generator
        steps = splitting or {}
        self._thinks, by = steps.get("name") == "thinking", steps.get("answer_by")
        self._author = ROLES.index(by) if self._thinks and by in ROLES else None
        self._alone: int | None = None  # who writes instead of a proposal of an answer that one model alone writes
        self._state = router.start(1) if isinstance(router, StatefulRouter) else None
        self._proposal: dict[str, float] | None = None
        self._action, self._told = CONTINUE_SMALL, False
        self.chance: float | None = None

    @property
    def large_tokens_left(self) -> int | None:
        """Tokens that the large model may still decode; None without a cap."""
        return None if self._token_cap is None else max(self._token_cap - self.large_tokens, 0)

    @property
    def escalations_left(self) -> int | None:
        """Steps that the large model may still write; None without a cap."""
        return None if self._cap is None else max(self._cap - self.escalations, 0)

    def decide(
        self,
        score: float | EllipsisType = ...,
        tokens: int | EllipsisType = ...,
        *,
        text: str | None = None,
        ended: bool = False,
        thinking: bool | None = None,
        **facts: Any,
    ) -> int:
        r"""Return who writes the next step: 0 (CONTINUE_SMALL) or 1 (ESCALATE_LARGE), within the caps.

        A router that asks (`agents.routers.asking.Asking`) may return 2 (ASK) instead: call again, with what it asks
        for, for 0 or 1; if nobody can tell, `override`. What is given at once is read only where it would ask.

        Args:
            score: Score of the small model's proposal, where the router's features read it (as all that follows).
            tokens: Tokens that were decoded for it.
            text: Its text, from which the facts below are read where they are not given.
            ended: With a text: whether the model stopped by itself after it, or a limit was hit. A step that closes a
                ``\boxed{...}`` ends the solution anyway.
            thinking: With a text, of policies whose solutions begin with a thinking block: whether it is part of that,
                where nothing is an answer. Where one model alone writes the answer (``answer_by``), False is that
                model's turn, which is no escalation.
            facts: What else the router's features read (`rollouts.trees.columns.FACTS`): ``terminal``, whether
                accepting the proposal ends the solution (at the last step that is allowed it always does);
                ``has_answer``, whether it states a final answer; columns of score tables,
                ``**{"small.min_logprob": -0.3}`` (`rollouts.text.likelihood.STATISTICS`). With what a router asks
                for, if features fold that over the accepted steps, ``accepted``: a list of the same of each of them,
                ``[{"score": 0.9}, ...]``; who is asked has read them all.

        Raises:
            ConfigError: Something lacks that the features read, a value is out of range, the last decision waits for
                `accept`, the solution has ended, or a router that decides once is told anything but a ``question``.
        """
        facts |= {name: value for name, value in (("score", score), ("tokens", tokens)) if value is not ...}
        if text is not None:
            facts["text"], facts["ended"] = text, ended
        if thinking is not None:
            facts["thinking"] = thinking
        return self._decided(float(_chances([self], [self._take(facts)])[0]))

    def _take(self, proposal: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns for a proposal, given as the arguments of `decide`."""
        if self.decides_once:
            return self._take_question(**proposal)
        if self.ended:
            raise ConfigError(f"The solution has ended after {self.step - 1} steps; begin a new session.")
        asked = self._proposal is not None and self._action == ASK
        if self._proposal is not None and not asked:
            raise ConfigError("The last proposal is still open: call accept() before the next decide().")
        accepted = proposal.get("accepted", ())
        proposal = {name: value for name, value in proposal.items() if name != "accepted"}
        self._alone = self._author if proposal.get("thinking") is False else None
        if "text" not in proposal:
            proposal.pop("thinking", None)
        else:
            if self._thinks and "thinking" not in proposal:
                raise ConfigError("decide() got a text: say whether it is part of the thinking block (thinking=True).")
            proposal = _read(**proposal)
        columns = {**(self._proposal or {}), **_checked(proposal)}
        needs = self._needs | self._bought if asked else self._needs
        if not needs.issubset(columns):
            lacking, read = (", ".join(sorted(names)) for names in (needs.difference(columns), needs))
            raise ConfigError(
                f"decide() lacks {lacking} of the proposal: {self.router.name} reads {read} (features "
                f"{self._schema.id}). Name what lacks, or give the proposal's text."
            )
        columns["terminal"] = columns.get("terminal", False) or self.step == self._max_steps
        columns["step"], columns["max_steps"] = self.step, self._max_steps
        self._folded.tell(columns)
        told = self._bought.issubset(columns)
        if told and self._asked_of:
            self._folds_of(accepted).tell(columns)
        self._proposal, self._told, self._action = columns, told, CONTINUE_SMALL
        if told:
            return columns
        return dict.fromkeys((*self._bought, *(fold.name for fold in self._asked_of)), 0.0) | columns

    def _take_question(self, question: str | None = None, **others: Any) -> dict[str, Any]:
        """Return the question for the one decision that there is."""
        if not isinstance(question, str) or others or self.ended:
            raise ConfigError(
                f"{self.router.name} decides once for a whole problem, before anything is generated: "
                + ("it has; begin a new session." if self.ended else "decide(question=...) and nothing else.")
            )
        self.ended = True
        return {"question": question}

    def _folds_of(self, accepted: Sequence[Mapping[str, Any]]) -> Folded:
        """Return folds over what is asked for of the accepted steps."""
        folded = Folded(self._asked_of)
        steps = [_checked(each) if isinstance(each, Mapping) else {} for each in accepted]
        lacking = [fact for fact in folded.facts if not all(fact in each or is_signal(fact) for each in steps)]
        if len(steps) != self.step - 1 or lacking:
            raise ConfigError(
                f"decide() got accepted={list(accepted)!r}, expected {', '.join(sorted(folded.facts))} of each of the "
                f"{self.step - 1} accepted steps."
            )
        for each in steps:
            folded.add(each)
        return folded

    def _decided(self, chance: float) -> int:
        """Turn the probability of escalating, or `ASK`, into an action."""
        if self._alone is not None:
            self.chance, self._action = float(self._alone), self._alone
            return self._alone
        if chance == ASK:
            self._action = ASK
            return ASK
        self.chance = chance if self._may_escalate() else 0.0
        escalate = chance > 0 and (chance >= 1 or self._draw() < chance)
        self._action = ESCALATE_LARGE if escalate and self._may_escalate() else CONTINUE_SMALL
        return self._action

    def _draw(self) -> float:
        if self._generator is None:
            self._generator = np.random.default_rng()
        return self._generator.random()

    def _may_escalate(self) -> bool:
        return self.escalations_left != 0 and self.large_tokens_left != 0

    def override(self, action: int) -> None:
        """Say that another action is taken than was decided, for example because the large model cannot be reached.

        Raises:
            ConfigError: Nothing was decided, or the action is neither 0 nor 1, or beyond a cap.
        """
        if self._proposal is None:
            raise ConfigError("There is no decision to override: call decide() first.")
        if action not in (CONTINUE_SMALL, ESCALATE_LARGE):
            raise ConfigError(f"The action is {action!r}, expected 0 (CONTINUE_SMALL) or 1 (ESCALATE_LARGE).")
        if action == ESCALATE_LARGE and not self._may_escalate():
            raise ConfigError(f"No escalation is left after {self.escalations}; accept the proposal.")
        self._action = int(action)

    def accept(
        self,
        score: float | None = None,
        tokens: int | None = None,
        *,
        action: int | None = None,
        wasted: int = 0,
        **facts: Any,
    ) -> None:
        """Say which step was accepted: by default the proposal after action 0, the large model's after action 1.

        Args:
            score: Score of the large model's step, where the router needs it; after action 0 the proposal's own counts.
            tokens: Its tokens; likewise, and always needed.
            action: As `override`.
            wasted: Tokens that the large model decoded for a step that was not accepted.
            facts: ``terminal``, whether the large model's step ends the solution (by default not), and what else the
                router's features read of accepted steps. What the small model makes of the large one's, ``small.*``,
                is not known where rollouts come from and left out; of a text that is the proposal's it is known.

        Raises:
            ConfigError: Nothing was decided, something lacks, contradicts the proposal or is out of range.
        """
        if action is not None:
            self.override(action)
        if self._proposal is None:
            raise ConfigError("There is nothing to accept: call decide() first.")
        if self._action == ASK:
            raise ConfigError(
                f"{self.router.name} asks for {', '.join(sorted(self._bought))}: call decide() with it, or say action."
            )
        step = self._proposal
        if self._action == ESCALATE_LARGE:
            step = _checked({**_given(score, tokens), **facts})
            lacking = {name for name in self._needs_of_large.difference(step) if name.partition(".")[0] != SMALL}
            if lacking & {"score", "tokens"}:
                raise ConfigError("accept() needs score and tokens of the step that the large model wrote.")
            if lacking:
                raise ConfigError(f"accept() lacks {', '.join(sorted(lacking))} of the large model's step (features "
                                  f"{self._schema.id}).")  # fmt: skip
        elif score is not None or tokens is not None:
            said = _checked(_given(score, tokens))
            if said.items() - step.items():
                proposed = ", ".join(f"{name} {step[name]:g}" for name in ("score", "tokens") if name in step)
                raise ConfigError(
                    f"accept() got score {score} and tokens {tokens}, but the proposal ({proposed}) is what is "
                    "accepted. Leave them out, or say action=1."
                )
        spent, left = int(step.get("tokens", 0)) * self._action + int(wasted), self.large_tokens_left
        if wasted < 0 or (left is not None and spent > left):
            raise ConfigError(
                f"The large model decoded {spent} tokens, expected at least 0 and at most the {left} that are left. "
                "Cut its step off there and accept the proposal: accept(action=0, wasted=...)."
            )
        self.large_tokens += spent
        if self._state is not None:
            told = np.array([self._action], np.int64), np.array([step["score"]], np.float32)
            router = cast(StatefulRouter, self.router)
            self._state = router.accept(self._state, *told, np.array([step["tokens"]], np.int64))
        self._folded.add(step)
        self.escalations += self._action * (self._alone is None)
        self.ended = bool(step.get("terminal")) or self.step == self._max_steps
        self.step += 1
        self._proposal = None


def decide_together(sessions: Sequence[Session], proposals: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the actions of n sessions, one proposal each: what `Session.decide` returns, faster.

    Raises:
        ConfigError: As of `Session.decide`, or there are not as many proposals as sessions, each once.
    """
    if len(sessions) != len(proposals):
        raise ConfigError(f"{len(proposals)} proposals for {len(sessions)} sessions, expected one each.")
    groups: dict[tuple[int, int], list[int]] = {}
    for place, session in enumerate(sessions):
        groups.setdefault((id(session.router), session._max_steps), []).append(place)
    columns = _take_all(sessions, proposals)
    actions = [0] * len(sessions)
    for places in (each[i : i + _ROWS] for each in groups.values() for i in range(0, len(each), _ROWS)):
        own = [sessions[place] for place in places]
        chances = _chances(own, [columns[place] for place in places])
        for place, session, chance in zip(places, own, chances.tolist(), strict=True):
            actions[place] = session._decided(chance)
    return actions


def _take_all(sessions: Sequence[Session], proposals: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Let every session take its proposal, or none of them."""
    columns: list[dict[str, Any]] = []
    before = [(session._proposal, session._action, session.ended) for session in sessions]
    try:
        for session, proposal in zip(sessions, proposals, strict=True):
            columns.append(session._take(proposal))
    except ConfigError:
        for session, was in list(zip(sessions, before, strict=True))[: len(columns)]:
            session._proposal, session._action, session.ended = was
        raise
    return columns


def _chances(sessions: list[Session], columns: list[dict[str, Any]]) -> Floats:
    """Return the (n,) probabilities of escalating, or `ASK`, in sessions of one router; those with a state go on."""
    first = sessions[0]
    if isinstance(first.router, QueryRouter):
        return probabilities(first.router.sends([each["question"] for each in columns]), len(sessions))
    if len(columns) == 1:
        features = first._schema.single(columns[0])
    else:
        features = first._schema.together(columns)
    cap = told_cap(first.router)
    if cap is not None:
        left = np.array([cap - session.large_tokens for session in sessions])
        features = np.concatenate([features, left_feature(np.maximum(left, 0), cap)[:, None]], axis=1)
    states = [session._state for session in sessions if session._state is not None]
    if isinstance(first.router, Asking):
        asks = [not session._told and session._may_escalate() for session in sessions]
        told = probabilities(first.router.probability(features), len(sessions))
        return np.where(first.router.asks(features) & asks, ASK, told)
    if not states:
        return probabilities(cast(Router, first.router).probability(features), len(sessions))
    chances, after = cast(StatefulRouter, first.router).decide(features, np.concatenate(states))
    for place, session in enumerate(sessions):
        session._state = after[place : place + 1]
    return probabilities(chances, len(sessions))


def _given(score: float | None, tokens: int | None) -> dict[str, float]:
    return {name: value for name, value in (("score", score), ("tokens", tokens)) if value is not None}


def _checked(given: Mapping[str, Any]) -> dict[str, float]:
    """Return facts of a step as features count them, without columns of score tables that are None.

    Raises:
        ConfigError: One is unknown or out of range.
    """
    try:
        return {
            name: checked_signal(name, value) if is_signal(name) else _CHECKED[name](value)
            for name, value in given.items()
            if value is not None or not is_signal(name)
        }
    except KeyError as error:
        raise ConfigError(
            f"Nothing is known of {error.args[0]!r} of a step.{did_you_mean(error.args[0], FACTS)}"
        ) from error


def _read(text: str, ended: bool = False, thinking: bool = False, **given: Any) -> dict[str, Any]:
    """Return the facts of a proposal with this text; those that are given count."""
    boxed = not thinking and closes_box(text)
    stop = StopReason.BOXED if boxed else StopReason.EOS if ended else StopReason.DELIMITER
    read = facts_of(Step(text, 0, stop, thinking=thinking), 0.0)
    return {name: value for name, value in read.items() if name not in _STATE} | given
