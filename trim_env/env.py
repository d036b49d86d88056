"""The environment ``Trim-v0``: one episode is one problem solved step by step, with a choice of author per step."""

from __future__ import annotations

import string
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from rollouts.errors import ConfigError, did_you_mean
from rollouts.trees.arrays import ASK, CONTINUE_SMALL, Trees, actions_of, graph_of
from trim_env.costs import CostModel
from trim_env.episodes import EPISODE_INFO, Lam, UnknownRenderMode
from trim_env.features import DEFAULT_SCHEMA, Schema
from trim_env.tables import DecisionTables, Rollouts
from trim_env.vector import TrimVectorEnv


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

    With ``ask`` it is ``Discrete(3)``: 2, `ASK`, shows the features that ``scorer`` or ``large`` tells of the proposal,
    which are 0 before, and charges what they cost; the episode stays where it is. Asking again acts as continuing.

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
    ``ask`` one more feature follows, whether it was asked, and with ``max_large_tokens`` M the share of M that is left,
    in [0, 1].

    Own features and schemas are named ``module:object``: ``agg+,my_module:my_feature`` (`trim_env.features.Feature`).

    ## Starting State
    A problem of the split, in one of its replicas, drawn uniformly; no accepted steps, the first proposal scored.
    ``reset(options={"problem": ID, "replica": NUMBER})`` asks for one.

    ## Reward
    ``-lam * cost`` at every step and 1 more at the end if the answer is correct. By default the cost is the number
    of tokens that the large model decodes, so continuing costs nothing (`trim_env.costs.cost_model`, or
    ``my_module:my_cost``).

    ## Episode End
    Termination when an accepted step is terminal: it closes a ``\boxed{}``, the model ended by itself, or a limit
    was hit, `max_steps` accepted steps among them (the step number is observed). Never truncated. The last
    observation repeats that of the last decision: an ended solution has no proposal.

    ## Information
    Always: ``problem``, ``replica``, ``node`` (row in the compiled trees), ``partial_solution``, ``proposal`` (empty
    at the end), ``escalations``, ``action_mask`` (which actions are possible: what ``action_space.sample`` takes). At
    the end also ``correct``, ``return``, ``cost``, ``large_tokens``, ``small_tokens`` (accepted or not), ``masked``
    (escalations asked for beyond a cap), ``cut_off`` (large steps cut off by M, 0 or 1) and ``steps``. ``escalations``
    counts the steps that the large model wrote; with M, ``large_tokens_left`` is always there, with ``ask`` ``asked``:
    how often it was.

    ## Arguments
    ``rollouts``: compiled trees, the path of a rollout store, or a bundled one's name (``"quickstart"``); ``split``;
    ``lam``: λ, reward per unit of cost; ``schema``; ``cost``: cost model; ``max_escalations``: cap K, after which
    escalating acts as continuing; ``max_large_tokens``: cap M on the large model's tokens;
    ``ask``: who tells only what is asked, ``"scorer"`` or ``"large"``; ``render_mode``: ``"ansi"``
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
        lam: Lam = 3e-4,
        schema: str | Schema = DEFAULT_SCHEMA,
        cost: str | CostModel = "decode-only",
        max_escalations: int | None = None,
        max_large_tokens: int | None = None,
        ask: str | None = None,
        render_mode: str | None = None,
    ) -> None:
        """Load the trees; arguments and errors are those of `trim_env.vector.TrimVectorEnv`."""
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UnknownRenderMode(f"Unknown render_mode {render_mode!r}.{did_you_mean(str(render_mode), ['ansi'])}")
        with_text = isinstance(schema, str) and schema.split(":")[0] == "text"
        if with_text:
            schema = str(schema).partition(":")[2] or DEFAULT_SCHEMA
        self._vector = TrimVectorEnv(
            rollouts,
            split,
            num_envs=1,
            lam=lam,
            schema=schema,
            cost=cost,
            max_escalations=max_escalations,
            max_large_tokens=max_large_tokens,
            ask=ask,
            autoreset_mode=AutoresetMode.NEXT_STEP,
        )
        self.tables = self._vector.tables
        self.render_mode = render_mode
        features = self._vector.single_observation_space
        self.observation_space: spaces.Space[Any] = features
        self.action_space = self._vector.single_action_space
        self._with_text = with_text
        if with_text:
            text = text_space(self.tables.trees)
            self.observation_space = spaces.Dict({"features": features, "partial_solution": text, "proposal": text})
        self._seeded = False
        self._row = -1  # of the node where the episode stands; negative where none is running

    @property
    def lam(self) -> Any:
        """Reward per unit of cost, λ; see `trim_env.vector.TrimVectorEnv.lam`."""
        return self._vector.lam

    @lam.setter
    def lam(self, value: float) -> None:
        self._vector.lam = value

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: Seed of the draws of problems; None goes on with those of the last seed.
            options: ``problem`` (an id) and ``replica`` (default 0 if a problem is given) to start a given one.

        Raises:
            ConfigError: Unknown options, or no such problem or replica.
        """
        super().reset(seed=seed)
        if seed is None and not self._seeded:
            seed = int(self.np_random.integers(2**32))
        observations, _ = self._vector.reset(seed=None if seed is None else [seed], options=options)
        self._seeded, trees = True, self.tables.trees
        self._arrive()
        tree = int(trees.tree[self._row])
        problem = int(trees.problem[tree])
        self._origin = {"problem": trees.problem_ids[problem], "replica": int(trees.replica[tree])}
        self._question = trees.questions[problem]
        self._accepted: list[tuple[int, int]] = []  # (row, action)
        self._text = self._question + "\n\n"
        return self._observation(observations), self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take an action.

        Raises:
            ConfigError: The action is none of those that there are, or the episode has ended.
            StoreError: The proposal that is needed was not generated.
        """
        if self._row < 0:
            raise ConfigError("No episode is running: call reset() before the next step().")
        taken = actions_of(action)
        if taken.size != 1 or not 0 <= taken.item() < self._vector.single_action_space.n:
            asking = ", 2 (ASK)" if self._vector.single_action_space.n > ASK else ""
            raise ConfigError(f"The action is {action!r}, expected 0 (CONTINUE_SMALL) or 1 (ESCALATE_LARGE){asking}.")
        # not `step`, which would check again
        observations, rewards, _, _, ended = self._vector._step(taken.reshape(1))
        if not self._vector.asked[0]:
            accepted = self._row, int(self._vector.taken[0])
            self._accepted.append(accepted)
            self._text += self.tables.trees.proposal(*accepted) if accepted[1] else self._proposal
            self._arrive()
        info = self._info() | {name: ended[name][0].item() for name in EPISODE_INFO if ended}
        return self._observation(observations), float(rewards[0]), self._row < 0, False, info

    def action_masks(self) -> NDArray[np.bool_]:
        """Return (2,) or (3,) whether each action is possible, as ``action_mask`` of `info` does."""
        masks: NDArray[np.bool_] = self._vector.action_masks()[0]
        return masks

    def _observation(self, observations: NDArray[np.float32]) -> Any:
        if not self._with_text:
            return observations[0]
        return {"features": observations[0], "partial_solution": self._text, "proposal": self._proposal}

    def _info(self) -> dict[str, Any]:
        totals, cap = self._vector.totals, self.tables.max_large_tokens
        told: dict[str, Any] = {} if cap is None else {"large_tokens_left": cap - int(totals["large_tokens"][0])}
        if "asked" in totals:
            told["asked"] = int(totals["asked"][0])
        return {
            **self._origin,
            "node": max(self._row, -1),
            "partial_solution": self._text,
            "proposal": self._proposal,
            "escalations": int(totals["escalations"][0]),
            "action_mask": self.action_masks().astype(np.int8),
            **told,
        }

    def _arrive(self) -> None:
        self._row = int(self._vector.node[0])
        self._proposal = "" if self._row < 0 else self.tables.trees.proposal(self._row, CONTINUE_SMALL)

    def render(self) -> str | None:
        """Return the question, the accepted steps with author and score, and the proposal (`render_mode` "ansi")."""
        if self.render_mode is None:
            return None
        lines = [self._question, ""]
        for row, action in self._accepted:
            lines.append(self._line(row, action, "small" if action == CONTINUE_SMALL else "LARGE"))
        if self._row >= 0:
            lines.append(self._line(self._row, CONTINUE_SMALL, "small?"))
        else:
            row, action = self._accepted[-1]
            solved = "correct" if self.tables.solved[2 * row + action] == 1 else "wrong"
            lines.append(f"-> {solved}, {self._vector.totals['large_tokens'][0]} large tokens")
        return "\n".join(lines)

    def _line(self, row: int, action: int, author: str) -> str:
        trees = self.tables.trees
        text = trees.proposal(row, action).strip().replace("\n", "\n" + " " * 15)
        return f"{author:>6}  {trees.score[row, action]:.3f}  {text}"


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
