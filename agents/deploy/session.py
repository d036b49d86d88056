"""One solution under way: what a router sees, decides and is told of it (docs/design.md, section 1)."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from agents.routers.base import AnyRouter, Floats, Knob, Router, StatefulRouter, told_cap
from rollouts.errors import ConfigError
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE
from trim_env.features import Seen, left_feature, schema_named

_ROWS = 16  # computed at once: few enough for NumPy to multiply on one thread; waking others takes longer
_Row = tuple[float, float, float, float, float, float, float]


class Proposal(NamedTuple):
    """What is known of the small model's next step.

    Attributes:
        score: Its PRM score in [0, 1].
        tokens: Tokens that were decoded for it.
        terminal: Whether accepting it ends the solution.
        has_answer: Whether it states a final answer.
    """

    score: float
    tokens: int
    terminal: bool = False
    has_answer: bool = False


class Session:
    """One solution: `decide` for each proposal, then `accept`; see `agents.deploy.policy` for an example.

    Attributes:
        router: Who decides; of a mixture, the part that was drawn.
        knob: The setting in use.
        step: Number of the step that is decided next, from 1.
        escalations: Steps that the large model wrote.
        large_tokens: Tokens that it decoded.
        ended: Whether the solution is complete: a terminal step was accepted, or `max_steps` steps.
    """

    def __init__(
        self,
        router: AnyRouter,
        knob: Knob,
        max_steps: int,
        caps: tuple[int | None, int | None],
        generator: np.random.Generator | None,
    ) -> None:
        """Begin.

        Args:
            router: Who decides.
            knob: The setting in use.
            max_steps: Most steps.
            caps: Most escalations, and most tokens of the large model; None for no cap.
            generator: For routers that draw; None: one from entropy, once it is needed.
        """
        self.router, self.knob = router, knob
        self.step, self.escalations, self.large_tokens, self.ended = 1, 0, 0, False
        self._features = schema_named(router.schema)
        self._max_steps, (self._cap, self._token_cap), self._generator = max_steps, caps, generator
        self._least = self._product = 1.0
        self._state = router.start(1) if isinstance(router, StatefulRouter) else None
        self._proposal: Proposal | None = None
        self._action = CONTINUE_SMALL

    @property
    def large_tokens_left(self) -> int | None:
        """Tokens that the large model may still decode; None without a cap."""
        return None if self._token_cap is None else max(self._token_cap - self.large_tokens, 0)

    def decide(self, score: float, tokens: int, terminal: bool = False, has_answer: bool = False) -> int:
        """Return who writes the next step: 0 (CONTINUE_SMALL) or 1 (ESCALATE_LARGE), within the caps.

        Args:
            score: PRM score of the small model's proposal.
            tokens: Tokens that were decoded for it.
            terminal: Whether accepting it ends the solution; at the last step that is allowed it always does.
            has_answer: Whether it states a final answer.

        Raises:
            ConfigError: A value is out of range, the last decision waits for `accept`, or the solution has ended.
        """
        row = self._take(Proposal(score, tokens, terminal, has_answer))
        return self._decided(float(_chances([self], [row])[0]))

    def _take(self, proposal: Proposal) -> _Row:
        """Return the columns of `trim_env.features.Seen` for a proposal."""
        if self.ended:
            raise ConfigError(f"The solution has ended after {self.step - 1} steps; begin a new session.")
        if self._proposal is not None:
            raise ConfigError("The last proposal is still open: call accept() before the next decide().")
        score, tokens = checked(proposal.score, proposal.tokens)
        terminal = bool(proposal.terminal) or self.step == self._max_steps
        self._proposal = Proposal(score, tokens, terminal, bool(proposal.has_answer))
        product = float(np.float32(self._product))  # as compiled trees hold it
        return score, self._least, product, tokens, self.step, terminal, self._proposal.has_answer

    def _decided(self, chance: float) -> int:
        """Turn the probability of escalating into an action."""
        escalate = chance > 0 and (chance >= 1 or self._draw() < chance)
        self._action = ESCALATE_LARGE if escalate and self._may_escalate() else CONTINUE_SMALL
        return self._action

    def _draw(self) -> float:
        if self._generator is None:
            self._generator = np.random.default_rng()
        return self._generator.random()

    def _may_escalate(self) -> bool:
        return (self._cap is None or self.escalations < self._cap) and self.large_tokens_left != 0

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
        terminal: bool = False,
        wasted: int = 0,
    ) -> None:
        """Say which step was accepted: by default the proposal after action 0, the large model's after action 1.

        Args:
            score: Score of the large model's step; after action 0 the proposal's own is taken.
            tokens: Its tokens; likewise.
            action: As `override`.
            terminal: Whether the large model's step ends the solution.
            wasted: Tokens that the large model decoded for a step that was not accepted.

        Raises:
            ConfigError: Nothing was decided, score or tokens lack, contradict the proposal or are out of range.
        """
        if action is not None:
            self.override(action)
        if self._proposal is None:
            raise ConfigError("There is nothing to accept: call decide() first.")
        own = self._proposal
        if self._action == ESCALATE_LARGE:
            if score is None or tokens is None:
                raise ConfigError("accept() needs score and tokens of the step that the large model wrote.")
            score, tokens = checked(score, tokens)
        else:
            given = checked(own.score if score is None else score, own.tokens if tokens is None else tokens)
            if given != (own.score, own.tokens):
                raise ConfigError(
                    f"accept() got score {score} and tokens {tokens}, but the proposal (score {own.score:g}, tokens "
                    f"{own.tokens}) is what is accepted. Leave them out, or say action=1."
                )
            (score, tokens), terminal = given, own.terminal
        spent, left = tokens * self._action + int(wasted), self.large_tokens_left
        if wasted < 0 or (left is not None and spent > left):
            raise ConfigError(
                f"The large model decoded {spent} tokens, expected at least 0 and at most the {left} that are left. "
                "Cut its step off there and accept the proposal: accept(action=0, wasted=...)."
            )
        self.large_tokens += spent
        self._go_on(score, tokens, terminal)

    def _go_on(self, score: float, tokens: int, terminal: bool) -> None:
        if self._state is not None:
            router = cast(StatefulRouter, self.router)
            taken = np.array([self._action], np.int64), np.array([score], np.float32), np.array([tokens], np.int64)
            self._state = router.accept(self._state, *taken)
        self._least, self._product = min(self._least, score), self._product * score
        self.escalations += self._action
        self.ended = terminal or self.step == self._max_steps
        self.step += 1
        self._proposal = None


def decide_together(sessions: Sequence[Session], proposals: Sequence[Proposal]) -> list[int]:
    """Return the actions of n sessions, one proposal each: what `Session.decide` returns, faster.

    Raises:
        ConfigError: As of `Session.decide`, or there are not as many proposals as sessions, each once.
    """
    if len(sessions) != len(proposals):
        raise ConfigError(f"{len(proposals)} proposals for {len(sessions)} sessions, expected one each.")
    groups: dict[tuple[int, int], list[int]] = {}
    for place, session in enumerate(sessions):
        groups.setdefault((id(session.router), session._max_steps), []).append(place)
    rows = _take_all(sessions, proposals)
    actions = [0] * len(sessions)
    for places in (each[i : i + _ROWS] for each in groups.values() for i in range(0, len(each), _ROWS)):
        own = [sessions[place] for place in places]
        chances = _chances(own, [rows[place] for place in places])
        for place, session, chance in zip(places, own, chances.tolist(), strict=True):
            actions[place] = session._decided(chance)
    return actions


def _take_all(sessions: Sequence[Session], proposals: Sequence[Proposal]) -> list[_Row]:
    """Let every session take its proposal, or none of them."""
    rows: list[_Row] = []
    try:
        for session, proposal in zip(sessions, proposals, strict=True):
            rows.append(session._take(proposal))
    except ConfigError:
        for session in sessions[: len(rows)]:
            session._proposal = None
        raise
    return rows


def _chances(sessions: list[Session], rows: list[_Row]) -> Floats:
    """Return the (n,) probabilities of escalating in sessions of one router, and let those with a state go on."""
    first = sessions[0]
    if len(rows) == 1:
        features = first._features.single(rows[0], first._max_steps)
    else:
        features = first._features(Seen(*np.array(rows, np.float64).T), first._max_steps)
    cap = told_cap(first.router)
    if cap is not None:
        left = np.array([cap - session.large_tokens for session in sessions])
        features = np.concatenate([features, left_feature(np.maximum(left, 0), cap)[:, None]], axis=1)
    states = [session._state for session in sessions if session._state is not None]
    if not states:
        return cast(Router, first.router).probability(features)
    chances, after = cast(StatefulRouter, first.router).decide(features, np.concatenate(states))
    for place, session in enumerate(sessions):
        session._state = after[place : place + 1]
    return chances


def checked(score: Any, tokens: Any) -> tuple[float, int]:
    """Return a score, rounded as rollouts hold it, and tokens.

    Raises:
        ConfigError: One is out of range.
    """
    try:
        value = float(np.float32(score))
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value <= 1:
        raise ConfigError(f"The score of a step is {score!r}, expected a number from 0 to 1.")
    try:
        count = operator.index(tokens)
    except TypeError:
        count = 0
    if count < 1:
        raise ConfigError(f"The tokens of a step are {tokens!r}, expected a whole number of at least 1.")
    return value, count


__all__ = ["Proposal", "Session", "checked", "decide_together"]
