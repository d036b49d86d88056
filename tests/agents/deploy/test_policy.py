"""Routers in use: sessions decide as evaluation does, say no in plain words, and need NumPy alone."""

import json
import pickle
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

import agents
from agents.deploy.policy import Policy, decide_together
from agents.evaluation.budgets import lam_costs
from agents.evaluation.splits import Validation
from agents.evaluation.walk import run, run_trees
from agents.learners.pomdp.fit import estimate
from agents.routers import artefact
from agents.routers.base import Constant, Knob, Mixture, RandomRate, Threshold
from agents.routers.mlp import MLP, ConditionedMLP
from rollouts.errors import ArtefactError, ConfigError
from rollouts.trees.columns import columns_of
from rollouts.trees.compile import compile_store
from trim_env.features import SCHEMAS, schema_named
from trim_env.tables import decision_tables

ROOT = Path(__file__).parents[3]
ABOUT = {"max_steps": 16, "max_escalations": None}
TREES = 300


def layers(*sizes, seed=0, scale=1.0):
    draw, weights = np.random.default_rng(seed), {}
    for layer, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        weights[f"{layer}.weight"] = (scale * draw.normal(size=(outputs, inputs))).astype(np.float32)
        weights[f"{layer}.bias"] = (scale * draw.normal(size=outputs)).astype(np.float32)
    return weights


def by_score(low=1e-4, high=1e-1) -> ConditionedMLP:
    """Escalates scores below a threshold that falls as λ grows, whatever else there is to see."""
    difference = np.array([-1.0, 0, 0, 0, 0, 0, -1.0], np.float32)
    weights = {"0.weight": np.stack([0 * difference, difference]), "0.bias": np.array([0, 0.9], np.float32)}
    return ConditionedMLP("trim-agg", "agg+/1", low, high, weights)


def balanced(trees, schema, *sizes, seed=0) -> MLP:
    """A network that escalates at half of the nodes."""
    known = schema_named(schema)
    features = known(columns_of(trees, folds=known.folds))
    weights = layers(features.shape[1], *sizes, 2, seed=seed)
    logits = MLP("trim-agg", schema, Knob("lam", 1e-3), weights).logits(features)
    weights[f"{len(sizes)}.bias"][1] -= np.median(logits[:, 1] - logits[:, 0])
    return MLP("trim-agg", schema, Knob("lam", 1e-3), weights)


@pytest.fixture(scope="module")
def trees():
    return compile_store("quickstart")


@pytest.fixture(scope="module")
def routers(trees):
    network = balanced(trees, "agg+/1", 16)
    return {
        "mlp": network,
        "mlp on products": balanced(trees, "agg+prod/1", 16, 16),
        "mlp on signals": balanced(trees, schema_named("all,least(large.min_logprob)").id, 16),
        "threshold on a signal": Threshold(0.6, schema="small.min_logprob/1"),
        "mlp-lam": by_score(),
        "threshold": Threshold(0.6),
        "constant": Constant(1),
        "random": RandomRate(0.3),
        "pomdp": estimate(trees).routers([1.7e-3])[0],
        "mixture": Mixture(Threshold(0.3), network, 0.4, Knob("budget", 0.2)),
    }


@pytest.fixture(scope="module")
def stored(routers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    return {kind: artefact.save(router, folder / kind, ABOUT) for kind, router in routers.items()}


def tables_of(trees, cap=None):
    return decision_tables(trees, indices=trees.select("test")[:TREES], max_escalations=cap)


def proposal(score, tokens, terminal=False, has_answer=False):
    return {"score": score, "tokens": tokens, "terminal": terminal, "has_answer": has_answer}


def signals(trees, row, action):
    """What score tables tell of a proposal; None where they do not."""
    told = {name: float(values[row, action]) for name, values in trees.signals.items()}
    return {name: None if np.isnan(value) else value for name, value in told.items()}


def replayed(sessions, tables, together=True):
    """Walk the trees as a server would; return large tokens, escalations, steps and correctness of each."""
    trees, count = tables.trees, len(sessions)
    row, found = tables.roots.copy(), np.zeros((count, 4))
    alive = list(range(count))
    while alive:
        proposals = [
            proposal(trees.score[r, 0], trees.tokens[r, 0], trees.child[r, 0] == -1, trees.has_answer[r, 0])
            | signals(trees, r, 0)
            for r in row[alive]
        ]
        if together:
            actions = decide_together([sessions[i] for i in alive], proposals)
        else:
            actions = [sessions[i].decide(**each) for i, each in zip(alive, proposals, strict=True)]
        for i, action in zip(list(alive), actions, strict=True):
            at, child = row[i], trees.child[row[i], action]
            if action:
                told = {"terminal": child < 0, **signals(trees, at, 1)}
                sessions[i].accept(trees.score[at, 1], trees.accepted_tokens[at, 1], **told)
            else:
                sessions[i].accept()
            found[i] += [trees.tokens[at, 1] * action, action, 1, child < 0 and trees.correct[at, action] == 1]
            row[i] = child
            assert sessions[i].ended == (child < 0)
            if child < 0:
                alive.remove(i)
    return found


def evaluated(router, tables):
    if isinstance(router, Threshold | Constant | MLP):
        features = tables.in_schema(router.schema)
        totals = run_trees(tables, lambda rows, *_: router.probability(features[rows]))
    else:
        totals = run_trees(tables, router)
    return np.stack([totals[name] for name in ("large_tokens", "escalations", "steps", "correct")], axis=1)


@pytest.mark.parametrize("cap", [None, 1])
@pytest.mark.parametrize(
    "kind",
    ["mlp", "mlp on products", "mlp on signals", "mlp-lam", "threshold", "threshold on a signal", "constant", "pomdp"],
)
def test_sessions_decide_as_evaluation_does(trees, stored, kind, cap):
    tables, policy = tables_of(trees, cap), agents.load(stored[kind])
    policy = Policy(policy.router, {**policy.about, "max_escalations": cap})
    lam = 3e-3 if kind == "mlp-lam" else None
    wanted = evaluated(policy.at(lam), tables)
    found = replayed([policy.session(lam=lam) for _ in range(TREES)], tables)
    assert (found == wanted).all()
    rate = found[:, 1].sum() / found[:, 2].sum()
    assert rate > 0.05 and (kind == "constant" or rate < 0.95)
    alone = replayed([policy.session(lam=lam) for _ in range(TREES)], tables, together=False)
    assert (alone == wanted).all()


def test_a_mixture_draws_one_part_for_a_session(trees, routers, stored):
    tables, policy = tables_of(trees), agents.load(stored["mixture"])
    sessions = [policy.session(seed=seed) for seed in range(TREES)]
    second = np.array([isinstance(session.router, MLP) for session in sessions])
    assert 0.3 < second.mean() < 0.5 and {str(session.knob) for session in sessions} == {"budget=0.2"}
    found = replayed(sessions, tables)
    parts = [evaluated(part, tables) for part in (routers["mixture"].first, routers["mixture"].second)]
    assert (found == np.where(second[:, None], parts[1], parts[0])).all()
    again = [isinstance(policy.session(seed=seed).router, MLP) for seed in range(TREES)]
    assert again == second.tolist()


def test_a_random_router_draws_from_the_seed(trees, stored):
    tables, policy = tables_of(trees), agents.load(stored["random"])
    one, other, third = (
        replayed([policy.session(seed=first + i) for i in range(TREES)], tables) for first in (0, 0, 1000)
    )
    assert (one == other).all() and (one != third).any()
    assert one[:, 1].sum() / one[:, 2].sum() == pytest.approx(0.3, abs=0.04)


@dataclass(frozen=True)
class Recording:
    """Keeps the features that it is given; escalates at random."""

    schema: str
    name: str = "recording"
    knob: Knob = Knob("rate", 0.5)
    seen: list = field(default_factory=list)

    def probability(self, features):
        self.seen.append(features)
        return np.full(len(features), 0.5)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_sessions_see_what_trees_hold(trees, schema):
    router, tables = Recording(schema_named(schema).id), tables_of(trees)
    policy, features = Policy(router, ABOUT), tables.in_schema(schema)
    steps = 0
    for seed, row in enumerate(tables.roots[:80]):
        session = policy.session(seed=seed)
        while row >= 0:
            terminal = trees.child[row, 0] == -1 and trees.depth[row] < 15  # the last step ends it unasked
            action = session.decide(
                **proposal(trees.score[row, 0], trees.tokens[row, 0], terminal, trees.has_answer[row, 0]),
                **signals(trees, row, 0),
            )
            assert (router.seen[-1][0] == features[row]).all() and session.step == trees.depth[row] + 1
            large = (trees.score[row, 1], trees.tokens[row, 1]), signals(trees, row, 1)
            session.accept(*large[0], **large[1]) if action else session.accept()
            row, steps = trees.child[row, action], steps + 1
    assert steps > 250


def test_the_last_step_ends_the_solution():
    router = Recording("agg+/1")
    session = Policy(router, {"max_steps": 3}).session(seed=0)
    for step in range(3):
        assert session.step == step + 1 and not session.ended
        session.decide(**proposal(0.5, 10))
        session.accept(action=0)
    assert session.ended and [row[0, 4] for row in router.seen] == [0, 0, 1]
    with pytest.raises(ConfigError, match="ended after 3 steps"):
        session.decide(0.5, 10)


def test_what_was_not_done_can_be_said():
    policy = Policy(Constant(1), {"max_steps": 9, "max_escalations": 2})
    session = policy.session()
    assert session.decide(0.25, 10) == 1
    session.override(0)
    session.accept()
    assert (session.escalations, session.large_tokens, session.step) == (0, 0, 2)
    assert session.decide(0.5, 10) == 1
    session.accept(action=0, wasted=7)
    assert (session.escalations, session.large_tokens) == (0, 7)
    for _ in range(2):
        assert session.decide(0.5, 10) == 1
        session.accept(0.9, 11)
    assert (session.escalations, session.large_tokens) == (2, 29)
    assert session.decide(0.5, 10) == 0
    with pytest.raises(ConfigError, match="No escalation is left after 2"):
        session.override(1)
    with pytest.raises(ConfigError, match="expected 0 .* or 1"):
        session.override(2)
    session.accept(0.5, 10, terminal=True)  # the proposal's own values may be repeated; it goes on as it said
    assert not session.ended


def test_a_cap_on_large_tokens_holds_and_is_told():
    cap, seen = 50, []

    class Told(MLP):
        def probability(self, features):
            seen.append(features)
            return np.ones(len(features))

    router = Told("trim-agg", "agg/1", Knob("lam", 0.1), layers(5, 2), max_large_tokens=cap)
    session = Policy(router, {"max_steps": 9, "max_large_tokens": cap}).session()
    for left, score, tokens in ((50, 0.5, 20), (30, 0.5, 25)):
        assert session.large_tokens_left == left and session.decide(0.3, 10) == 1
        session.accept(score, tokens)
    assert session.decide(0.3, 10) == 1
    with pytest.raises(ConfigError, match="decoded 6 tokens, .* at most the 5 that are left"):
        session.accept(0.5, 6)
    session.accept(action=0, wasted=5)
    assert session.large_tokens_left == 0 and session.decide(0.3, 10) == 0
    assert [row[0, 4] for row in seen] == pytest.approx([1, 0.6, 0.1, 0]) and seen[0].shape == (1, 5)
    free = Policy(router, {"max_steps": 9}).session()
    assert free.large_tokens_left is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"score": float("nan")}, "score of a step is nan, expected a number from 0 to 1"),
        ({"score": 1.01}, "score of a step is 1.01"),
        ({"score": -1e-9}, "score of a step is -1e-09"),
        ({"score": None}, "score of a step is None"),
        ({"score": "high"}, "score of a step is 'high'"),
        ({"tokens": 0}, "tokens of a step are 0"),
        ({"tokens": -3}, "tokens of a step are -3"),
        ({"tokens": 2.5}, "tokens of a step are 2.5, expected a whole number"),
        ({"tokens": float("nan")}, "tokens of a step are nan"),
    ],
)
def test_wrong_values_are_refused_and_change_nothing(values, message):
    session = Policy(Threshold(0.9), ABOUT).session()  # which reads the score, and escalates
    good = {"score": 0.5, "tokens": 10}
    with pytest.raises(ConfigError, match=message):
        session.decide(**{**good, **values})
    assert session.decide(**good) == 1
    with pytest.raises(ConfigError, match=message if None not in values.values() else "needs score and tokens"):
        session.accept(**{**good, **values})
    session.accept(**good)
    assert session.step == 2 and session.escalations == 1


def test_calls_out_of_order_are_refused():
    policy = Policy(Threshold(0.4), ABOUT)
    session = policy.session()
    for call in (session.accept, lambda: session.override(0)):
        with pytest.raises(ConfigError, match="call decide"):
            call()
    session.decide(0.3, 5)
    with pytest.raises(ConfigError, match="still open"):
        session.decide(0.3, 5)
    with pytest.raises(ConfigError, match="needs score and tokens"):
        session.accept()
    session.accept(0.3, 5)
    session.decide(0.9, 5)
    with pytest.raises(ConfigError, match="the proposal .* is what is accepted"):
        session.accept(0.3, 5)
    session.accept()
    one, other = policy.session(), policy.session()
    with pytest.raises(ConfigError, match="1 proposals for 2 sessions"):
        decide_together([one, other], [proposal(0.5, 5)])
    with pytest.raises(ConfigError, match="still open"):
        decide_together([one, one], [proposal(0.5, 5)] * 2)
    assert decide_together([one, other], [proposal(0.5, 5), proposal(0.1, 5)]) == [0, 1]


def test_a_call_that_lacks_what_the_features_read_is_refused(routers):
    session = Policy(routers["mlp"], ABOUT).session()
    with pytest.raises(ConfigError, match=r"lacks has_answer, terminal of the proposal: trim-agg reads .*agg\+/1"):
        session.decide(score=0.5, tokens=10)
    with pytest.raises(ConfigError, match="lacks has_answer of"):
        session.decide(score=0.5, tokens=10, terminal=False)
    with pytest.raises(ConfigError, match="Nothing is known of 'has_anser' .*Did you mean 'has_answer'"):
        session.decide(score=0.5, tokens=10, terminal=False, has_anser=False)
    sessions = [Policy(routers["mlp"], ABOUT).session() for _ in range(2)]
    with pytest.raises(ConfigError, match="lacks score, terminal"):
        decide_together(sessions, [proposal(0.5, 10), {"tokens": 10, "has_answer": False}])
    assert decide_together(sessions, [proposal(0.5, 10)] * 2) == [session.decide(**proposal(0.5, 10))] * 2
    for router in (Threshold(0.6), Constant(0)):  # which read neither
        assert Policy(router, ABOUT).session().decide(score=0.7, tokens=10) == 0


@pytest.mark.parametrize(
    ("said", "terminal", "has_answer"),
    [
        ({"text": "So 3 + 4 = 7.\n\n"}, False, False),
        ({"text": r"It is $\boxed{7}$."}, True, True),
        ({"text": "It is 7.", "ended": True}, True, False),
        ({"text": "#### 7", "ended": True}, True, True),
        ({"text": "It is 7.", "terminal": True, "has_answer": True}, True, True),  # what is said counts
    ],
)
def test_the_text_of_a_proposal_tells_the_rest(said, terminal, has_answer):
    router = Recording("agg+/1")
    sessions = [Policy(router, ABOUT).session(seed=0) for _ in range(3)]
    sessions[0].decide(0.25, 40, **said)
    sessions[1].decide(0.25, 40, terminal=terminal, has_answer=has_answer)
    decide_together(sessions[2:], [{"score": 0.25, "tokens": 40, **said}])
    assert (router.seen[0] == router.seen[1]).all() and (router.seen[2] == router.seen[1]).all()
    sessions[0].accept(action=0)
    assert sessions[0].ended == terminal


@pytest.mark.parametrize("kind", ["mlp on products", "mlp-lam", "random", "pomdp", "mixture"])
def test_pickled_sessions_go_on_identically(stored, kind):
    policy, scores = agents.load(stored[kind]), np.random.default_rng(0).random((14, 40))
    sessions = [policy.session(lam=3e-3 if kind == "mlp-lam" else None, seed=seed) for seed in range(40)]

    def decisions(sessions, rows):
        found = []
        for row in rows:
            found.append(decide_together(sessions, [proposal(score, 12) for score in row]))
            for session, action in zip(sessions, found[-1], strict=True):
                session.accept(*(0.9, 12) if action else ())
        return np.array(found)

    decisions(sessions, scores[:4])
    again = pickle.loads(pickle.dumps(sessions))
    wanted = decisions(sessions, scores[4:])
    assert (decisions(again, scores[4:]) == wanted).all() and 0 < wanted.mean() < 1
    assert [each.large_tokens for each in again] == [each.large_tokens for each in sessions]


def test_settings_that_a_policy_does_not_take_are_refused(routers):
    fixed = Policy(routers["mlp"], ABOUT)
    assert fixed.lam_range is None and fixed.budget_range is None
    assert str(fixed.session(lam=1e-3).knob) == "lam=0.001"
    for asked in ({"lam": 2e-3}, {"budget": 0.2}):
        with pytest.raises(ConfigError, match="one fixed setting, lam=0.001"):
            fixed.session(**asked)
    calibrated = Policy(routers["mixture"], ABOUT)
    calibrated.session(budget=0.2)
    with pytest.raises(ConfigError, match="budget is 0.3, but .* budget=0.2"):
        calibrated.session(budget=0.3)
    span = Policy(routers["mlp-lam"], ABOUT)
    assert span.lam_range == (1e-4, 1e-1) and span.session(lam=2e-3).knob == Knob("lam", 2e-3)
    assert span.at(lam=2e-3) is span.at(lam=2e-3)
    for asked, message in (
        ({}, "every lam from 0.0001 to 0.1: name one."),
        ({"lam": 1.0}, "lam is 1; this policy was trained for 0.0001 to 0.1"),
        ({"lam": float("nan")}, "lam is nan, expected a number"),
        ({"lam": "much"}, "lam is 'much', expected a number"),
        ({"lam": 1e-2, "budget": 0.2}, "either lam or budget"),
        ({"budget": 0.2}, "does not say what each lam costs"),
    ):
        with pytest.raises(ConfigError, match=message):
            span.session(**asked)
    assert Policy(routers["mlp-lam"], {**ABOUT, "default_lam": 5e-3}).session().knob == Knob("lam", 5e-3)


def test_a_budget_becomes_a_lam(trees, routers):
    router = routers["mlp-lam"]
    validation = Validation(lambda indices: decision_tables(trees, indices=indices), trees)
    policy = Policy(router, {**ABOUT, "budgets": lam_costs(router, validation)})
    low, high = policy.budget_range
    assert low < 0.1 and high == 1.0
    lams = []
    for budget in (0.15, 0.3, 0.6):
        session = policy.session(budget=budget)
        lams.append(session.knob.value)
        spent = run(session.router, validation.choice).cost.sum() / validation.references[0].large.cost.sum()
        assert spent == pytest.approx(budget, abs=0.05)
    assert lams == sorted(lams, reverse=True)
    with pytest.raises(ConfigError, match="budget is 1.5, expected a share"):
        policy.session(budget=1.5)
    with pytest.raises(ConfigError, match="the cheapest setting of trim-agg costs"):
        policy.session(budget=low / 2)
    with pytest.raises(ConfigError, match="name one or a budget"):
        policy.session()


def test_a_budget_is_kept_where_shares_go_up_and_down(routers):
    shares = {1e-1: 0.1, 3e-2: 0.3, 1e-2: 0.2, 3e-3: 0.5}
    rows = [{"lam": lam, "share": share} for lam, share in shares.items()]
    policy = Policy(routers["mlp-lam"], {**ABOUT, "budgets": rows[::-1]})
    for budget, lam in ((0.1, 1e-1), (0.3, 3e-2), (0.5, 3e-3), (0.9, 3e-3), (0.2, (1e-1 * 3e-2) ** 0.5)):
        assert policy.session(budget=budget).knob.value == pytest.approx(lam)
    assert 3e-3 < policy.session(budget=0.4).knob.value < 3e-2


def test_policies_that_do_not_fit_are_refused(routers, tmp_path):
    for about, message in (
        ({}, "max_steps is None"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"max_steps": "9"}, "'9'"),
    ):
        with pytest.raises(ArtefactError, match=message):
            Policy(Constant(0), about)
    with pytest.raises(ArtefactError, match="max_escalations is -1"):
        Policy(Constant(0), {"max_steps": 9, "max_escalations": -1})
    with pytest.raises(ArtefactError, match="version 9 is asked for"):
        Policy(Threshold(0.5, schema="agg/9"), ABOUT)
    with pytest.raises(ArtefactError, match="takes 6 features; schema agg/1 and its knobs make 4"):
        Policy(replace(routers["mlp"], schema="agg/1"), ABOUT)
    with pytest.raises(ArtefactError, match="takes 7 features; schema agg/1 and its knobs make 5"):
        Policy(Mixture(Constant(0), replace(by_score(), schema="agg/1"), 0.5, Knob("budget", 0.1)), ABOUT)
    with pytest.raises(ArtefactError, match="made for the features"):
        Policy(Constant(0), {**ABOUT, "features": [{"name": "score"}]})
    artefact.save(Constant(0), tmp_path / "run" / "lam-1" / "policy", ABOUT)
    with pytest.raises(ArtefactError, match=r"but below it; load one of .*run/lam-1/policy"):
        agents.load(tmp_path / "run")
    with pytest.raises(ArtefactError, match="no policy here .policy.json is missing"):
        agents.load(tmp_path / "nowhere")


def test_a_policy_tells_of_itself(stored, routers):
    for kind, folder in stored.items():
        told = agents.load(folder).describe()
        assert json.loads(json.dumps(told, allow_nan=False)) == told
        assert told["max_steps"] == 16 and told["features"] and told["name"] == routers[kind].name
    told = Policy(routers["mlp-lam"], {**ABOUT, "default_lam": 1e-2, "held_out": [{"share": float("nan")}]}).describe()
    assert told["knob"] == {"name": "lam", "low": 1e-4, "high": 1e-1, "default": 1e-2}
    assert told["held_out"] == [{"share": None}]
    assert agents.load(stored["threshold"]).describe()["knob"] == {"name": "threshold", "value": 0.6}


BARE = """
import sys, time
ours = {"agents", "rollouts", "trim_env", "numpy", "cython_runtime"}  # the last is made by numpy

class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in ours or top in sys.stdlib_module_names:
            return None
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
begun = time.process_time()
import agents.deploy.policy
spent = time.process_time() - begun
actions = []
for folder in sys.argv[1:]:
    policy = agents.load(folder)
    session = policy.session(lam=policy.lam_range and 3e-3, seed=5)
    for score in (0.9, 0.1, 0.6, 0.3):
        told = {name: -score for name in session._schema.signals}
        actions.append(session.decide(score, 12, terminal=False, has_answer=False, **told))
        session.accept(*(0.8, 14) if actions[-1] else (), **told)
found = {name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names) - ours
found = sorted(name for name in found if not name.startswith("_"))
import json
print(json.dumps([actions, found, spent]))
"""


def test_loading_and_deciding_need_numpy_alone_and_are_quick(stored):
    command = [sys.executable, "-c", BARE, *map(str, stored.values())]
    done = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(2)]
    actions, others, _ = json.loads(done[0].stdout)
    assert others == [] and min(json.loads(each.stdout)[2] for each in done) < 0.5  # seconds of processor time
    wanted = []
    for folder in stored.values():
        policy = agents.load(folder)
        session = policy.session(lam=policy.lam_range and 3e-3, seed=5)
        for score in (0.9, 0.1, 0.6, 0.3):
            told = {name: -score for name in session._schema.signals}
            wanted.append(session.decide(**proposal(score, 12), **told))
            session.accept(*(0.8, 14) if wanted[-1] else (), **told)
    assert actions == wanted and 0 < sum(actions) < len(actions)


def test_the_environment_is_registered_where_gymnasium_is():
    code = "import trim_env, gymnasium; print(gymnasium.make('Trim-v0', split='test').unwrapped.reset(seed=0)[0].shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(6,)"


def test_what_no_feature_reads_need_not_be_said():
    router = Recording(schema_named("free").id)
    session = Policy(router, ABOUT).session(seed=0)
    own = {"small.min_logprob": -0.5, "small.mean_logprob": -0.25, "small.max_entropy": 1.5}
    with pytest.raises(
        ConfigError, match=r"decide\(\) lacks small.max_entropy, small.mean_logprob, small.min_logprob of"
    ):
        session.decide(tokens=7, terminal=False, has_answer=False)
    with pytest.raises(ConfigError, match="small.min_logprob of a step is nan, expected a number"):
        session.decide(tokens=7, text="a=1\n\n", **{**own, "small.min_logprob": float("nan")})
    with pytest.raises(ConfigError, match="lacks small.min_logprob of"):
        session.decide(tokens=7, text="a=1\n\n", **{**own, "small.min_logprob": None})
    for step in range(3):
        session.decide(tokens=7, text="a=1\n\n", **{**own, "small.min_logprob": -0.5 - step})
        session.accept(tokens=5, action=1) if step else session.accept(action=0)
    least = [row[0, 3] for row in router.seen]  # of accepted steps: none, the small model's, none of the large one's
    assert least == pytest.approx([-np.log(1e-4) / 3, -np.log(0.5) / 3, -np.log(0.5) / 3])
    reads = Policy(Recording("agg+/1,least(large.min_logprob)/1"), ABOUT).session(seed=0)
    reads.decide(**proposal(0.5, 5), **{"large.min_logprob": -1})
    with pytest.raises(ConfigError, match=r"accept\(\) lacks large.min_logprob of the large model's step"):
        reads.accept(0.5, 5, action=1)
    reads.accept(0.5, 5, action=1, **{"large.min_logprob": -0.1})
