"""Random decision processes, episodes drawn from them, and trees drawn from a known hidden-state model."""

from __future__ import annotations

from itertools import product

import numpy as np

from agents.routers.pomdp.model import Kinds, Model
from rollouts.trees.arrays import MISSING, TERMINAL, Trees


def made_model(seed=0, steps=4, bins=4, levels=2, token_bins=2, **changes) -> Model:
    """Return a random model; with no levels (0) scores do not depend on those before."""
    random = np.random.default_rng(seed)
    kinds = Kinds(np.arange(1, token_bins, dtype=np.float32))
    count, contexts = kinds.count, levels + 1
    ends = np.broadcast_to(kinds.terminal.astype(float), (steps, count)).copy()
    ends[-1] = 1.0
    line = np.zeros((steps, count, 2))
    line[..., 1] = random.uniform(0.5, 2, count)
    arrays = {
        "kinds": kinds,
        "edges": np.sort(random.normal(size=bins - 1)).astype(np.float32),
        "level": np.arange(bins) * max(levels, 1) // bins,
        "small": random.dirichlet(np.ones(bins), (contexts, count, 3)),
        "large": random.dirichlet(np.ones(bins), (contexts, 2)),
        "kind": random.dirichlet(np.ones(count), steps),
        "p_small": random.uniform(0.5, 0.95, (steps, count)),
        "p_large": np.stack([random.uniform(0.9, 1, count), random.uniform(0.5, 0.9, count)]),
        "repair": 0.1,
        "ends": ends,
        "large_ends": np.where(ends == 1, 1.0, random.uniform(0, 0.2, (steps, count))),
        "end_value": random.uniform([0.9, 0, 0], [1, 0.2, 0.2], (count, 3)),
        "large_end_value": np.array([0.95, 0.1]),
        "token_line": line,
        "tokens": line[..., 1] * small_tokens(kinds),
    }
    model = Model(**{**arrays, **changes})
    model.check()
    return model


def small_tokens(kinds):
    """Return the tokens that drawn proposals of each kind have."""
    inner = 20 * np.exp(np.arange(len(kinds.token_edges) + 1) + 0.5)
    return np.concatenate([inner, [20.0, 20.0]])


def features_of(model, kind, bins):
    """Return features of the schema agg+ that fall into the kinds and bins."""
    edges = model.edges.astype(float)
    inside = np.concatenate([[edges[0] - 1], (edges[:-1] + edges[1:]) / 2, [edges[-1] + 1]])
    features = np.zeros((len(kind), 6), np.float32)
    features[:, 0] = inside[bins]
    features[:, 2] = np.log(small_tokens(model.kinds)[kind] / 20)
    features[:, 4] = model.kinds.terminal[kind]
    features[:, 5] = kind == model.kinds.count - 2
    return features


def scores_of(model, bins):
    """Return scores in [0, 1] that fall into the bins."""
    inside = features_of(model, np.zeros(len(bins), int), bins)[:, 0].astype(float)
    return 1 / (1 + np.exp(-3 * inside))


def choice(random, probabilities):
    """Draw (n,) columns from (n, c) probabilities."""
    return (random.random((len(probabilities), 1)) > np.cumsum(probabilities, axis=1)[:, :-1]).sum(axis=1)


def play(model, router, episodes, seed):
    """Play episodes of the model; return (n,) whether correct, and (n,) expected large tokens paid for."""
    random = np.random.default_rng(seed)
    right, done = np.ones(episodes, bool), np.zeros(episodes, bool)
    context = np.full(episodes, len(model.small) - 1)
    correct, paid = np.zeros(episodes, bool), np.zeros(episodes)
    state = router.start(episodes)
    for step in range(model.steps):
        kind = choice(random, np.tile(model.kind[step], (episodes, 1)))
        good = random.random(episodes) < model.p_small[step, kind]
        hidden = np.where(~right, 1, np.where(good, 0, 2))
        bins = choice(random, model.small[context, kind, hidden])
        escalate, state = router.decide(features_of(model, kind, bins), state)
        escalate = escalate > 0.5
        chance = np.where(right, model.p_large[np.where(good, 0, 1), kind], model.repair)
        large_right = random.random(episodes) < chance
        large_bins = choice(random, model.large[context, np.where(large_right, 0, 1)])
        ends = random.random(episodes) < np.where(escalate, model.large_ends[step, kind], model.ends[step, kind])
        value = np.where(escalate, model.large_end_value[np.where(large_right, 0, 1)], model.end_value[kind, hidden])
        now = ends & ~done
        correct[now] = (random.random(episodes) < value)[now]
        paid += np.where(escalate & ~done, model.tokens[step, kind], 0)
        done |= ends
        right = np.where(escalate, large_right, right & good)
        accepted = np.where(escalate, large_bins, bins)
        state = router.accept(state, escalate.astype(int), scores_of(model, accepted), np.zeros(episodes, int))
        context = model.level[accepted]
    assert done.all()
    return correct, paid


def best_value(model, lam, step=0, context=None, hidden=(1.0, 0.0)):
    """Return the greatest expected return by enumerating everything that can be seen and be hidden.

    `hidden` are unnormalised probabilities of (prefix right, wrong) together with all that was seen.
    """
    context = len(model.small) - 1 if context is None else context
    total = 0.0
    for kind, score in product(range(model.kinds.count), range(len(model.level))):
        share = model.kind[step, kind]
        if share == 0:
            continue
        p, f = model.p_small[step, kind], model.small[context, kind, :, score]
        s0, s2, s1 = (share * each for each in (hidden[0] * p * f[0], hidden[0] * (1 - p) * f[2], hidden[1] * f[1]))
        ends, large_ends = model.ends[step, kind], model.large_ends[step, kind]
        small = ends * (model.end_value[kind] @ [s0, s1, s2])
        if ends < 1:
            small += (1 - ends) * best_value(model, lam, step + 1, model.level[score], (s0, s1 + s2))
        right = model.p_large[0, kind] * s0 + model.p_large[1, kind] * s2 + model.repair * s1
        wrong = s0 + s1 + s2 - right
        large = large_ends * (model.large_end_value @ [right, wrong]) - lam * model.tokens[step, kind] * (s0 + s1 + s2)
        if large_ends < 1:
            for after in range(len(model.level)):
                f = model.large[context, :, after]
                onward = best_value(model, lam, step + 1, model.level[after], (right * f[0], wrong * f[1]))
                large += (1 - large_ends) * onward
        total += max(small, large)
    return total


def made_trees(count=500, seed=0, depth=4, p_small=0.8, p_large=(0.99, 0.8), salvage=0.1, cap=None) -> Trees:
    """Draw complete trees from a hidden-state model in which scores depend on the class alone; they carry labels.

    Step `depth` is the last. A tenth of the scores of right steps is exactly 1. Every third pair of equal
    correctness is the same step. With a cap only paths with at most so many escalations are there.
    """
    random = np.random.default_rng(seed)
    columns = {name: [] for name in ("child", "score", "correct", "label", "tokens", "tree", "depth", "text")}
    root = []

    def score(hidden):
        if hidden == 0 and random.random() < 0.1:
            return 1.0
        return random.beta(*((6, 1.5), (1.2, 6), (1.5, 4))[hidden])

    def node(tree, right, at, used):
        row = len(columns["tree"])
        good = random.random() < p_small
        able = random.random() < p_large[0 if good else 1]
        same = (good == able or not right) and random.random() < 1 / 3
        large_good = good if same else able
        hidden = [0 if right and each else 1 if not right else 2 for each in (good, large_good)]
        scores = [score(each) for each in hidden]
        last = at == depth - 1
        for name, value in (
            ("child", [TERMINAL, TERMINAL]),
            ("score", [scores[0], scores[0] if same else scores[1]]),
            ("correct", [int(each == 0 or random.random() < salvage) if last else -1 for each in hidden]),
            ("label", [int(good), int(large_good)]),
            ("tokens", [int(random.integers(10, 30))] * 2),
            ("tree", tree),
            ("depth", at),
            ("text", b"aa" if same else b"ab"),
        ):
            columns[name].append(value)
        if last and same:
            columns["correct"][row][1] = columns["correct"][row][0]
        if not last:
            first = node(tree, hidden[0] == 0, at + 1, used)
            closed = cap is not None and used >= cap
            second = first if same or closed else node(tree, hidden[1] == 0, at + 1, used + 1)
            columns["child"][row] = [first, second]
        if cap is not None and used >= cap:
            for name, value in (("child", MISSING), ("score", np.nan), ("correct", -1), ("label", -1), ("tokens", 0)):
                columns[name][row][1] = value
        return row

    for tree in range(count):
        root.append(len(columns["tree"]))
        node(tree, True, 0, 0)
    nodes = len(columns["tree"])
    child = np.array(columns["child"], np.int32)
    zeros = np.zeros((nodes, 2), np.int32)
    tokens = np.array(columns["tokens"], np.int32)
    return Trees(
        child=child,
        tokens=tokens,
        accepted_tokens=tokens,
        prompt_tokens=zeros,
        score=np.array(columns["score"], np.float32),
        correct=np.array(columns["correct"], np.int8),
        stop_reason=zeros.astype(np.int8),
        has_answer=child == TERMINAL,
        label=np.array(columns["label"], np.int8),
        tree=np.array(columns["tree"], np.int32),
        depth=np.array(columns["depth"], np.int16),
        root=np.array(root, np.int32),
        problem=np.arange(count, dtype=np.int32),
        replica=np.zeros(count, np.int16),
        text=np.frombuffer(b"".join(columns["text"]), np.uint8),
        text_end=np.arange(1, 2 * nodes + 1).reshape(nodes, 2),
        problem_ids=tuple(f"p{i}" for i in range(count)),
        questions=("",) * count,
        splits=np.array(["train", "validation", "test"])[np.arange(count) % 3],
        meta={"max_steps": depth, "max_escalations": None, "scorer": "made", "grader": "made", "hash": "made"},
    )
