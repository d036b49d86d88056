"""Episodes over a rollout store that need not be complete: what is missing is generated while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium.vector import AutoresetMode

from rollouts.errors import ConfigError, StoreError
from rollouts.models.stepwise import StepWriter
from rollouts.scoring.base import Scorer
from rollouts.store.store import Store
from rollouts.tasks.grading import Grader, make_grader
from rollouts.tasks.problems import Problem
from rollouts.text.steps import LARGE, ROLES, SMALL
from rollouts.trees.columns import Folded
from rollouts.trees.grow import Labeller
from rollouts.trees.live import Generated, LiveTrees
from rollouts.trees.on_policy import Episode, act, observe
from trim_env.costs import CostModel, cost_model, cost_of, sources_of
from trim_env.episodes import Array, EpisodesVectorEnv, Lam, Steps, unknown_problem
from trim_env.features import DEFAULT_SCHEMA, Schema, schema_named
from trim_env.tables import checked_answers, checked_cap, checked_token_cap, cut, draw

if TYPE_CHECKING:
    from rollouts.family import Family

_READ_AHEAD = 16  # episodes of each environment whose trees are read from the store together


class LiveVectorEnv(EpisodesVectorEnv):
    """E episodes of `trim_env.env.TrimEnv` over a store, with the models that made it at hand.

    Proposals and scores that the store has are taken from there. In every step, all that the E episodes lack goes out
    as one batch for each role and one for the scorer; it is added to the store together with the grades of new
    solutions, and never generated again. On a complete store nothing is generated, and trajectories are those of
    `trim_env.vector.TrimVectorEnv` with the same seeds and actions.

    Only what episodes reach is generated. Trees that are not closed are noted in the store as such
    (`rollouts.trees.live.keep_open`) and not compiled before `generate` has closed them. A path that exceeds the
    scorer's window is an error here, whereas compiled trees leave out the whole tree.

    If a model fails, its error comes through with all that was made before in the store, and `reset` is needed.
    Seeds, and what is told of episodes that end: `trim_env.episodes.EpisodesVectorEnv`.
    """

    def __init__(
        self,
        store: Store | str | Path,
        writers: Mapping[str, StepWriter],
        scorer: Scorer,
        grader: Grader | str = "exact",
        split: str | None = "train",
        num_envs: int = 64,
        *,
        lam: Lam = 3e-4,
        schema: str | Schema = DEFAULT_SCHEMA,
        cost: str | CostModel = "decode-only",
        max_escalations: int | None = None,
        max_large_tokens: int | None = None,
        replicas: int | None = None,
        labeller: Labeller | None = None,
        others: Sequence[Scorer] = (),
        max_generated_large_tokens: int | None = None,
        generated: Generated | None = None,
        on_progress: Callable[[Generated], None] | None = None,
        trees_in_memory: int | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.SAME_STEP,
    ) -> None:
        """Open the store.

        Args:
            store: Its path, whose write lock is then held until `close`, or a store whose write lock is held.
            writers: Both models.
            scorer: The scorer.
            grader: The grader or its name.
            split: This, and what is not named here, as of `trim_env.vector.TrimVectorEnv`.
            num_envs: E.
            lam: λ, or its range.
            schema: Feature schema.
            cost: Cost model.
            max_escalations: Cap on escalations per episode; None: none, whatever the store is closed under.
            max_large_tokens: Cap on the tokens that the large model decodes in an episode. The store gets whole large
                steps all the same; what an episode pays and accepts is what a request cut off there would give.
            replicas: Replicas of every problem; None: those that the store has, at least one.
            labeller: Exact labels of steps, for stores that have them.
            others: Further scorers, whose columns the schema reads.
            max_generated_large_tokens: Tokens that the large model may decode for the store, in `generated`.
            generated: This and what follows, as of `rollouts.trees.live.LiveTrees`.
            on_progress: Called about once a second.
            trees_in_memory: About the most trees kept in memory; those of running episodes always are. None: 4 for each
                episode, and at least 1024.
            autoreset_mode: When episodes that end are replaced.

        Raises:
            StoreError: The store cannot be used or is being written to, or the split is empty.
            ConfigError: An argument is out of range or unknown.
        """
        self._held = ExitStack()
        with ExitStack() as opened:  # what was opened is closed again if something below is wrong
            if not isinstance(store, Store):
                store = Store(store)
                opened.enter_context(store.writing())
            if isinstance(grader, str):
                grader = make_grader(grader)
                if hasattr(grader, "close"):
                    opened.callback(grader.close)
            self.schema, self.cost_model = schema_named(schema, imports=True), cost_model(cost, imports=True)
            self._roots = _roots(store, split, replicas)
            steps = int(store.manifest["process"]["limits"]["max_steps"])
            caps = checked_cap(None, max_escalations), checked_token_cap(max_large_tokens)
            checked_answers(store.manifest["process"].get("splitting"), max_large_tokens)
            pool = np.arange(len(self._roots))
            super().__init__(num_envs, pool, self.schema, steps, lam, *caps, autoreset_mode=autoreset_mode)
            self._live = LiveTrees(
                store, writers, scorer, grader, labeller=labeller, others=others,
                max_large_tokens=max_generated_large_tokens, generated=generated, on_progress=on_progress,
            )  # fmt: skip
            self._sources = sources_of(self.schema, scorer.name)
            self._memory = max(1024, 4 * num_envs) if trees_in_memory is None else trees_in_memory
            self._episodes: list[Episode] = [None] * num_envs  # type: ignore[list-item]
            self._broken = False
            opened.callback(self._live.flush)
            self._held = opened.pop_all()

    @property
    def generated(self) -> int:
        """Steps generated so far."""
        return self._live.generated.steps

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start E episodes; see `trim_env.episodes.EpisodesVectorEnv.reset`.

        Raises:
            BackendError: A model is gone; what was made before is in the store.
            BudgetSpent: The large model has decoded its tokens; likewise.
        """
        with self._keeping():
            return super().reset(seed=seed, options=options)

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Take (E,) actions.

        Raises:
            ConfigError: They are not (E,) of 0 and 1, or `reset` is needed.
            BackendError: A model is gone; what was made before is in the store.
            BudgetSpent: The large model has decoded its tokens; likewise.
        """
        if self._broken:
            raise ConfigError("The last call failed half-way: call reset() before step().")
        action = self._checked(actions)
        with self._keeping():
            return self._step(action)

    def _take(self, which: Any, action: Array) -> Steps:
        episodes = self._at(which)
        alone = [each.node is not None and each.tree.author(each.node) == LARGE for each in episodes]
        asked = action | np.array(alone, np.int64)
        tokens, prompts = self._written(episodes, asked)
        cost = cost_of(self.cost_model, tokens, prompts, self._sources)[np.arange(len(episodes)), asked]
        small, large = tokens[:, ROLES.index(SMALL)], tokens[:, ROLES.index(LARGE)]
        cut_off = np.zeros(len(episodes), bool)
        if self._token_cap is not None:
            paid, cut_off = cut(large, self._left(which))
            cost, large = cost - self.cost_model.large_decode * (large - paid), paid
        act(self._live, episodes, action - cut_off)
        done = np.array([episode.node is None for episode in episodes], bool)
        return Steps(action - cut_off, cost, large, small, cut_off, self._solved(episodes), done)

    def _at(self, which: Any) -> list[Episode]:
        return [self._episodes[index] for index in self._index[which].tolist()]

    def _written(self, episodes: Sequence[Episode], action: Array) -> tuple[Array, Array]:
        """Return (n, 2) decoded and prompt tokens of the proposals that actions ask for; the small one always is."""
        standing = [(each.tree, each.node) for each in episodes if each.node is not None]
        self._live.generated.needed += int(action.sum())
        self._live.propose((tree, node, LARGE) for (tree, node), asked in zip(standing, action, strict=True) if asked)
        tokens, prompts = np.zeros((2, len(standing), 2), np.int64)
        for index, ((_, node), asked) in enumerate(zip(standing, action.tolist(), strict=True)):
            for place, role in enumerate(ROLES[: 1 + asked]):
                step = node.proposals[role]
                tokens[index, place], prompts[index, place] = step.tokens, step.prompt_tokens
        return tokens, prompts

    def _solved(self, episodes: Sequence[Episode]) -> Array:
        """Return (n,) 1 where a right solution has ended."""
        return np.array(
            [each.node is None and self._live.correct((each.tree, *each.last)) for each in episodes],  # type: ignore[misc]
            np.float64,
        )

    def _begin(self, which: Array, trees: Array) -> None:
        wanted = [self._roots[number] for number in trees.tolist()]
        if not all(self._live.has((problem.id, replica)) for problem, replica in wanted):
            self._live.load([*wanted, *self._coming()])
        found = [self._live.tree((problem.id, replica)) for problem, replica in wanted]
        self._live.begin(found)
        for index, tree in zip(which.tolist(), found, strict=True):
            self._episodes[index] = Episode(tree, tree.root, folded=Folded(self.schema.folds))

    def _coming(self) -> Iterator[tuple[Problem, int]]:
        """Yield the trees of the next episodes: reading many at a time is what makes reading cheap."""
        ahead = min(_READ_AHEAD, self._memory // (2 * self.num_envs))
        episodes = self._episode[:, None] + np.arange(1, ahead + 1, dtype=np.uint64)
        positions = draw(np.repeat(self._seeds, ahead), episodes.ravel(), len(self._roots))
        return (self._roots[position] for position in dict.fromkeys(positions.tolist()))

    def _replicas(self, problem: str) -> dict[int, int]:
        found = {replica: number for number, (each, replica) in enumerate(self._roots) if each.id == problem}
        if not found:
            raise unknown_problem(problem, list(dict.fromkeys(each.id for each, _ in self._roots)))
        return found

    def _features(self, which: Any) -> Array:
        episodes = self._at(which)
        self._live.generated.needed += len(episodes)
        columns = observe(self._live, episodes)
        for name in self.schema.signals:
            if name not in columns or np.isnan(columns[name]).any():
                raise StoreError(f"Schema {self.schema.name} reads {name}, which some proposals lack: its scorer is to "
                                 "be at hand (`others`), or the model to tell it with its steps.")  # fmt: skip
        features = self.schema(columns)
        self._live.grade()
        if self.schema.history:
            self._remember()
        self._live.forget(self._memory, {episode.tree.key for episode in self._episodes})
        return features

    def _remember(self) -> None:
        """Take down the step that each running episode accepted last."""
        going = [i for i, each in enumerate(self._episodes) if each.node is not None and each.last is not None]
        places = [(self._episodes[index].tree, *self._episodes[index].last) for index in going]  # type: ignore[misc]
        tokens = np.array([node.accepted_tokens(role) for _, node, role in places])
        score = np.array(self._live.score(places), np.float32)
        self._past[going, self.totals["steps"][going] - 1] = self.schema.accepted(score, tokens)

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Write everything to the store if something fails inside."""
        self._broken = True
        try:
            yield
            self._broken = False
        finally:
            if self._broken:
                self._live.flush()

    def close_extras(self, **kwargs: Any) -> None:
        """Write what is new to the store and give its write lock back."""
        self._held.close()


def family_of(store: Store, models: str = "tinymath") -> Family:
    """Return the models that made a store, of a TOML file or ``tinymath[:transformers]``; none is loaded yet.

    Raises:
        StoreError: The store was made by other models; the fields that differ are named.
        ConfigError: The models file is wrong.
    """
    from rollouts.config import load_family
    from rollouts.family import Family
    from rollouts.scoring.base import self_test_examples

    process = store.manifest["process"]
    examples = self_test_examples(store.problems())
    family = Family(load_family(models), seed=process["seed"], examples=examples, store=store)
    Store.create(store.path, family.process(process["max_escalations"], labels=process["labels"]))
    family.refuse_other_scores(store)
    return family


@contextmanager
def open_models(
    store: Store, family: Family, on_opening: Callable[[str], None] = lambda role: None, **options: Any
) -> Iterator[Callable[..., LiveVectorEnv]]:
    """Load the models of a store and hold its write lock; yields what makes environments, of which one is open at once.

    Args:
        store: The store.
        family: Its models (`family_of`).
        on_opening: Called with ``small``, ``large`` or ``scorer`` before it is loaded.
        options: Arguments of `LiveVectorEnv` from `grader` on; what is called with further ones goes before.

    Raises:
        StoreError: The store is being written to.
        BackendError: A model cannot be started.
    """
    from rollouts.trees.grow import label_of

    with store.writing(), ExitStack() as stack:
        writers: dict[str, Any] = {}
        for role in ROLES:
            on_opening(role)
            writers[role] = stack.enter_context(family.open(role, store))
        read = schema_named(options.get("schema", DEFAULT_SCHEMA), imports=True).signals
        scorers: list[Scorer] = []
        if family.config.scorer is not None:
            on_opening("scorer")
            scorers.append(stack.enter_context(family.open_scorer(store)))
        for role in ROLES:  # without a scorer, the small model's statistics are the score
            if any(name.startswith(f"{role}.") for name in read) or not scorers:
                scorers.append(family.statistics(role, getattr(writers[role], "backend", None)))
        scorer, *others = scorers
        running = stack.enter_context(ExitStack())
        labeller = label_of(store)

        def begin(**more: Any) -> LiveVectorEnv:
            running.close()
            settings = {**options, **more}
            env = LiveVectorEnv(store, writers, scorer, labeller=labeller, others=others, **settings)
            running.callback(env.close)
            return env

        yield begin


@contextmanager
def open_live(store: str | Path, models: str = "tinymath", **options: Any) -> Iterator[LiveVectorEnv]:
    """Open a store with the models that made it, and an environment over both; closes all at the end.

    Raises:
        StoreError: The store was made by other models (the fields that differ are named), or is being written to.
        ConfigError: The models file is wrong, or an option is.
        BackendError: A model cannot be started.
    """
    opened = Store(store)
    with open_models(opened, family_of(opened, models), **options) as begin:
        yield begin()


def _roots(store: Store, split: str | None, replicas: int | None) -> list[tuple[Problem, int]]:
    """Return the (problem, replica) pairs that episodes are drawn from, in the order of compiled trees."""
    problems = store.problems(split)
    if not problems:
        raise StoreError(f"{store.path}: no problems. Add them with `python -m rollouts generate`.")
    if replicas is not None:
        if replicas < 1:
            raise ConfigError(f"replicas is {replicas}, expected at least 1.")
        return [(problem, replica) for problem in problems for replica in range(replicas)]
    found: dict[str, set[int]] = {}
    for part in store.steps.read(columns=["problem", "replica"]):
        for row in part.group_by(["problem", "replica"]).aggregate([]).to_pylist():
            found.setdefault(row["problem"], set()).add(row["replica"])
    return [(problem, replica) for problem in problems for replica in sorted(found.get(problem.id, {0}))]
