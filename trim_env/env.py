"""The environment ``Trim-v0``: one episode is one problem solved step by step, with a choice of author per step."""

from __future__ import annotations

import string
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from rollouts.errors import ConfigError, StoreError, did_you_mean
from rollouts.trees.arrays import CONTINUE_SMALL, ESCALATE_LARGE, MISSING, TERMINAL, Trees, graph_of
from trim_env.costs import CostModel
from trim_env.features import DEFAULT_SCHEMA, Schema, left_feature
from trim_env.tables import DecisionTables, Rollouts, decision_tables, draw, missing
from trim_env.vector import checked_lam


class TrimEnv(gymnasium.Env[Any, Any]):
    r"""Decide at every step of a solution who writes it: a small model, or a large one that costs.

    ## Description
    A small language model solves a maths problem step by step (steps end at a blank line). At every step it
    proposes the next one, and a process reward model (PRM) scores the proposal. The agent accepts it, or throws it
    away and has the large model write that one step from the same prefix; then the small model goes on. All
    proposals come from recorded rollout trees: every prefix that the two models can reach, with what either of
    them wrote there, so an episode has the distribution of live generation and costs some array look-ups.

    ## Action Space
    ``Discrete(2)``:

    | value | name             | effect                                                    |
    |-------|------------------|-----------------------------------------------------------|
    | 0     | `CONTINUE_SMALL` | the small model's proposal is accepted                    |
    | 1     | `ESCALATE_LARGE` | the large model writes this step instead                  |

    With ``max_large_tokens`` M, a large step that needs more tokens than are left is cut off: what is left is paid,
    the truncated step is thrown away and the proposal is accepted. Once nothing is left, escalating acts as continuing.

    ## Observation Space
    A ``Box`` of float32 features, one schema of `trim_env.features.SCHEMAS` (r_t: PRM score of the proposal at step
    t; c_t: its tokens):

    | index | `agg+` (default)      | range     | paper's symbol       |
    |-------|-----------------------|-----------|----------------------|
    | 0     | logit(score) / 3      | -3.1, 3.1 | r_t, clipped to 1e-4 |
    | 1     | logit(min_score) / 3  | -3.1, 3.1 | min(r_1..r_{t-1})    |
    | 2     | ln(tokens / 20)       | -4, 8     | c_t                  |
    | 3     | step / max_steps      | 0, 1      | t                    |
    | 4     | terminal              | 0, 1      |                      |
    | 5     | has_answer            | 0, 1      |                      |

    | index | `agg` (TRIM-Agg)      | range     | paper's symbol       |
    |-------|-----------------------|-----------|----------------------|
    | 0     | score                 | 0, 1      | r_t                  |
    | 1     | min_score             | 0, 1      | min(r_1..r_{t-1})    |
    | 2     | tokens / 300          | 0, inf    | c_t                  |
    | 3     | step / max_steps      | 0, 1      | t                    |

    `agg+prod` is `agg` and, at index 4, the product of r_1..r_{t-1}. `seq` (TRIM-Seq) is logit(r_i) / 3 and
    ln(c_i / 20) for every step i <= t (at index 2i - 2 and 2i - 1: the accepted ones, then the proposal), zeros up to
    max_steps T, and at 2T, 2T + 1, 2T + 2: step / max_steps, terminal, has_answer. ``text:SCHEMA`` is a ``Dict`` of
    ``features`` (those of SCHEMA) and two ``Text`` entries, ``partial_solution`` and ``proposal``. With
    ``max_large_tokens`` M one more feature follows: the share of M that is left, in [0, 1].

    ## Starting State
    A problem of the split, in one of its replicas, drawn uniformly; no accepted steps, the first proposal scored.
    ``reset(options={"problem": ID, "replica": NUMBER})`` asks for one.

    ## Reward
    ``-lam * cost`` at every step and 1 more at the end if the answer is correct. By default the cost is the number
    of tokens that the large model decodes, so continuing costs nothing (`trim_env.costs.cost_model`).

    ## Episode End
    Termination when an accepted step is terminal: it closes a ``\boxed{}``, the model ended by itself, or a limit
    was hit, `max_steps` accepted steps among them (the step number is observed). Never truncated. The last
    observation repeats that of the last decision: an ended solution has no proposal.

    ## Information
    Always: ``problem``, ``replica``, ``node`` (row in the compiled trees), ``partial_solution``, ``proposal`` (empty
    at the end), ``escalations``, ``action_mask`` (whether each action is possible). At the end also ``correct``,
    ``return``, ``cost``, ``large_tokens``, ``small_tokens`` (accepted or not), ``masked`` (escalations asked for
    beyond a cap), ``cut_off`` (large steps cut off by M, 0 or 1) and ``steps``. ``escalations`` counts the steps that
    the large model wrote; with M, ``large_tokens_left`` is always there as well.

    ## Arguments
    ``rollouts``: compiled trees, the path of a rollout store, or a bundled one's name (``"quickstart"``); ``split``;
    ``lam``: λ, reward per unit of cost; ``schema``; ``cost``: cost model; ``max_escalations``: cap K, after which
    escalating acts as continuing; ``max_large_tokens``: cap M on the large model's tokens; ``render_mode``: ``"ansi"``
    makes `render` return the partial solution with scores and authors.

    ```python
    import gymnasium, trim_env
    env = gymnasium.make("Trim-v0", rollouts="quickstart", lam=3e-4)
    observation, info = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(1)
    ```

    ## References
    Kapoor et al., "TRIM: Hybrid Inference via Targeted Stepwise Routing in Multi-Step Reasoning Tasks", ICLR 2026,
    arXiv 2601.10245.

    ## Version History
    v0: first version.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}

    def __init__(
        self,
        rollouts: Rollouts | DecisionTables = "quickstart",
        split: str | None = "train",
        *,
        lam: float = 3e-4,
        schema: str | Schema = DEFAULT_SCHEMA,
        cost: str | CostModel = "decode-only",
        max_escalations: int | None = None,
        max_large_tokens: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        """Load the trees; arguments and errors are those of `trim_env.vector.TrimVectorEnv`."""
        if render_mode not in (None, "ansi"):
            raise ConfigError(f"Unknown render_mode {render_mode!r}.{did_you_mean(str(render_mode), ['ansi'])}")
        with_text = isinstance(schema, str) and schema.split(":")[0] == "text"
        if with_text:
            schema = str(schema).partition(":")[2] or DEFAULT_SCHEMA
        self.tables = (
            rollouts
            if isinstance(rollouts, DecisionTables)
            else decision_tables(
                rollouts,
                split,
                schema=schema,
                cost=cost,
                max_escalations=max_escalations,
                max_large_tokens=max_large_tokens,
            )
        )
        self.lam = checked_lam(lam)
        self.render_mode = render_mode
        low, high = self.tables.schema.observed_bounds(self.tables.trees.meta["max_steps"])
        if self.tables.max_large_tokens is not None:
            low, high = np.append(low, np.float32(0)), np.append(high, np.float32(1))
        features = spaces.Box(low, high, dtype=np.float32)
        self.observation_space: spaces.Space[Any] = features
        self.action_space = spaces.Discrete(2)
        self._with_text = with_text
        if with_text:
            text = text_space(self.tables.trees)
            self.observation_space = spaces.Dict({"features": features, "partial_solution": text, "proposal": text})
        self._seed: int | None = None
        self._episode = 0
        self._node: int | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: Seed of the draws of problems; None goes on with those of the last seed.
            options: ``problem`` (an id) and ``replica`` (default 0 if a problem is given) to start a given one.

        Raises:
            ConfigError: Unknown options, or no such problem or replica.
        """
        super().reset(seed=seed)
        if seed is not None or self._seed is None:
            self._seed = seed if seed is not None else int(self.np_random.integers(2**32))
            self._episode = 0
        else:
            self._episode += 1
        self._tree = self._chosen(options) if options else self._drawn()
        trees = self.tables.trees
        self._node = int(trees.root[self._tree])
        self._last = self._node
        self._accepted: list[tuple[int, int]] = []  # (row, action)
        self._text = trees.questions[trees.problem[self._tree]] + "\n\n"
        counted = ("large_tokens", "small_tokens", "escalations", "masked", "cut_off", "steps")
        self._totals = {"cost": 0.0, **dict.fromkeys(counted, 0)}
        self._left_seen = self._left()
        return self._observation(), self._info()

    def _drawn(self) -> int:
        assert self._seed is not None
        seed, episode = np.array([self._seed], np.uint64), np.array([self._episode], np.uint64)
        return int(self.tables.indices[draw(seed, episode, len(self.tables.indices))[0]])

    def _chosen(self, options: dict[str, Any]) -> int:
        unknown = sorted(set(options) - {"problem", "replica"})
        if unknown or "problem" not in options:
            raise ConfigError(f"reset got options {sorted(options)}, expected 'problem' and perhaps 'replica'.")
        trees, wanted = self.tables.trees, str(options["problem"])
        if wanted not in trees.problem_ids:
            raise ConfigError(f"No problem {wanted!r} in these rollouts.{_closest(wanted, trees.problem_ids)}")
        position, replica = trees.problem_ids.index(wanted), int(options.get("replica", 0))
        found = np.flatnonzero((trees.problem == position) & (trees.replica == replica))
        if not len(found):
            have = sorted(trees.replica[trees.problem == position].tolist())
            raise ConfigError(f"Problem {wanted!r} has no replica {replica}; it has {have}.")
        return int(found[0])

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take an action.

        Raises:
            ConfigError: The action is neither 0 nor 1, or the episode has ended.
            StoreError: The proposal that is needed was not generated.
        """
        if self._node is None:
            raise ConfigError("No episode is running: call reset() before the next step().")
        if int(action) not in (CONTINUE_SMALL, ESCALATE_LARGE):
            raise ConfigError(f"The action is {action!r}, expected 0 (CONTINUE_SMALL) or 1 (ESCALATE_LARGE).")
        tables, totals, row = self.tables, self._totals, self._node
        taken = int(action)
        if taken == ESCALATE_LARGE and not self._may_escalate():
            taken = CONTINUE_SMALL
            totals["masked"] += 1
        left = np.array([self._left()])
        (place,), (cost,), (large_tokens,), (cut_off,) = tables.take(np.array([row]), np.array([taken]), left)
        taken = int(place) - 2 * row  # the proposal is accepted where the large model was cut off
        child = int(tables.child[place])
        if child == MISSING:
            raise StoreError(missing(tables, np.array([place])))
        totals["cost"] += float(cost)
        totals["large_tokens"] += int(large_tokens)
        totals["cut_off"] += int(cut_off)
        totals["small_tokens"] += int(tables.small_tokens[place])
        totals["escalations"] += taken
        totals["steps"] += 1
        self._accepted.append((row, taken))
        self._text += tables.trees.proposal(row, taken)
        self._last, self._node = row, None if child == TERMINAL else child
        solved = float(tables.solved[place])
        info = self._info()
        if self._node is None:
            info |= {"correct": solved == 1, "return": solved - self.lam * totals["cost"], **totals}
        else:
            self._left_seen = self._left()
        return self._observation(), solved - self.lam * float(cost), self._node is None, False, info

    def _left(self) -> int:
        """Return the tokens that the large model may still decode; 0 where there is no cap."""
        cap = self.tables.max_large_tokens
        return 0 if cap is None else cap - int(self._totals["large_tokens"])

    def _may_escalate(self) -> bool:
        cap, tokens = self.tables.max_escalations, self.tables.max_large_tokens
        return (cap is None or self._totals["escalations"] < cap) and (tokens is None or self._left() > 0)

    def _observation(self) -> Any:
        features = self.tables.features[self._last if self._node is None else self._node].copy()
        if self.tables.schema.history:
            features = self._with_history(features)
        if self.tables.max_large_tokens is not None:  # that of the last decision at an end, as all features
            features = np.append(features, left_feature(self._left_seen, self.tables.max_large_tokens))
        if not self._with_text:
            return features
        return {"features": features, "partial_solution": self._text, "proposal": self._proposal()}

    def _with_history(self, features: Any) -> Any:
        tables = self.tables
        before = self._accepted[:-1] if self._node is None else self._accepted  # at an end those of the last decision
        past = np.zeros((1, tables.trees.meta["max_steps"], tables.schema.history), np.float32)
        past[0, : len(before)] = tables.accepted[[2 * row + action for row, action in before]]
        return tables.schema.observed(features[None], past, np.array([len(before)]))[0]

    def _info(self) -> dict[str, Any]:
        trees = self.tables.trees
        told = {} if self.tables.max_large_tokens is None else {"large_tokens_left": self._left()}
        return {
            "problem": trees.problem_ids[trees.problem[self._tree]],
            "replica": int(trees.replica[self._tree]),
            "node": -1 if self._node is None else self._node,
            "partial_solution": self._text,
            "proposal": self._proposal(),
            "escalations": self._totals["escalations"],
            "action_mask": np.array([True, self._may_escalate()]),
            **told,
        }

    def _proposal(self) -> str:
        return "" if self._node is None else self.tables.trees.proposal(self._node, CONTINUE_SMALL)

    def render(self) -> str | None:
        """Return the question, the accepted steps with author and score, and the proposal (`render_mode` "ansi")."""
        if self.render_mode is None:
            return None
        trees = self.tables.trees
        lines = [trees.questions[trees.problem[self._tree]], ""]
        for row, action in self._accepted:
            lines.append(self._line(row, action, "small" if action == CONTINUE_SMALL else "LARGE"))
        if self._node is not None:
            lines.append(self._line(self._node, CONTINUE_SMALL, "small?"))
        else:
            row, action = self._accepted[-1]
            solved = "correct" if self.tables.solved[2 * row + action] == 1 else "wrong"
            lines.append(f"-> {solved}, {self._totals['large_tokens']} large tokens")
        return "\n".join(lines)

    def _line(self, row: int, action: int, author: str) -> str:
        trees = self.tables.trees
        text = trees.proposal(row, action).strip().replace("\n", "\n" + " " * 15)
        return f"{author:>6}  {trees.score[row, action]:.3f}  {text}"


def _closest(name: str, known: tuple[str, ...]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" They have {len(known)}, the first is {known[0]!r}."


def text_space(trees: Trees) -> spaces.Text:
    """Return a space that contains every partial solution and proposal of these trees.

    The alphabet is printable ASCII and every other character that occurs in them, LaTeX and CJK included.
    """
    alphabet = set(string.printable).union(*trees.questions)
    if len(trees.text) and int(trees.text.max()) > 127:
        alphabet.update(bytes(trees.text).decode("utf-8"))
    return spaces.Text(min_length=0, max_length=longest_solution(trees), charset="".join(sorted(alphabet)))


def longest_solution(trees: Trees) -> int:
    """Return an upper bound, in characters, of question, accepted steps and proposal together."""
    sizes = np.diff(trees.text_end.reshape(-1), prepend=0).reshape(-1, 2)  # bytes: at least as many as characters
    rest = graph_of(trees).backward(lambda rows, later: (sizes[rows] + later).max(axis=1))
    return int(rest.max()) + max(map(len, trees.questions), default=0) + 2
