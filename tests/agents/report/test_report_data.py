"""What the page says is what the trees say: paths, positions, calibration and traces against walks by hand."""

import base64
import hashlib
import json
import re
import time
from dataclasses import replace

import numpy as np
import pytest
from handmade import ScriptedScorer, problem
from made_reports import HOSTILE, made_page, saved_run, score_router
from made_stores import PROBLEMS, finished
from scripted_thinking import ThinkingWriter, splitting

import evaluate as evaluate_command
from agents.evaluation.bootstrap import Estimate
from agents.evaluation.suite import EvaluateConfig, evaluate
from agents.evaluation.table import MethodSummary
from agents.evaluation.walk import decision_shares, run
from agents.report.gather import gather
from agents.report.maths import PATTERN, formulas
from agents.report.positions import positions
from agents.report.reliability import reliability, scorer_reliability
from agents.report.render import embedded, render, write
from agents.report.routers import setting as setting_of
from agents.report.routers import shown_routers, spread_out
from agents.report.traces import Traced, choose, flags, problem_record
from agents.report.walks import ANSWERED, CUT_OFF, Paths, follow
from agents.routers import artefact
from agents.routers.artefact import Artefact
from agents.routers.base import Constant, Knob, Mixture, RandomRate, Threshold
from agents.routers.mlp import ConditionedMLP
from rollouts.errors import ConfigError
from rollouts.text.steps import LARGE, SMALL
from rollouts.trees.compile import compile_store
from rollouts.trees.grow import load_trees
from trim_env.tables import decision_tables

NAMES = "http://www.w3.org/"  # of kinds of elements: nothing is asked there


class EverySecond:
    """Escalates at the second, fourth, ... decision of an episode: it needs its state for that."""

    name = "every-second"
    schema = "agg/1"
    knob = Knob("rate", 0.5)

    def start(self, n):
        return np.zeros((n, 1))

    def decide(self, features, state):
        return (state[:, 0] % 2 == 1).astype(float), state

    def accept(self, state, actions, scores, tokens):
        return state + 1


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("report") / "s")


@pytest.fixture(scope="module")
def trees(store):
    return compile_store(store)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return made_page(tmp_path_factory.mktemp("page"))


def by_trees(tables):
    """The problem of each tree, and one resample."""
    _, problems = np.unique(tables.trees.problem[tables.indices], return_inverse=True)
    return problems, np.ones((1, problems.max() + 1))


def by_hand(store, decide):
    """Walk every tree of a store without compiled arrays; `decide(step number, score)` says whether to escalate."""
    scorer = ScriptedScorer()
    for tree in load_trees(store, PROBLEMS, 2, None):
        node, path = tree.root, []
        while True:
            small = node.proposals[SMALL]
            up = decide(len(path), scorer.of(tree.problem.question, (*node.steps, small.text)))
            step = node.proposals[LARGE if up else SMALL]
            path.append((up, step, small))
            if step.terminal:
                break
            node = next(n for n in tree.nodes.values() if n.steps == (*node.steps, step.text))
        yield tree, path


CASES = [
    (Threshold(0.5), lambda step, score: score < np.float32(0.5)),
    (EverySecond(), lambda step, score: step % 2 == 1),
    (Constant(1), lambda step, score: True),
]


@pytest.mark.parametrize(("router", "decide"), CASES, ids=lambda each: getattr(each, "name", ""))
def test_paths_are_those_walked_by_hand(store, trees, router, decide):
    paths = follow(router, decision_tables(trees, None))
    walked = list(by_hand(store, decide))
    assert len(walked) == len(paths.rows) == 12
    for (tree, path), rows, actions, right, tokens in zip(
        walked, paths.rows, paths.actions, paths.correct, paths.large_tokens, strict=True
    ):
        assert actions[actions >= 0].tolist() == [int(up) for up, _, _ in path]
        assert (rows >= 0).sum() == len(path)
        assert tokens == sum(step.tokens for up, step, _ in path if up)
        assert right == ("{7}" in path[-1][1].text), tree.problem.id


@pytest.mark.parametrize("caps", [{}, {"max_escalations": 1}, {"max_large_tokens": 6}], ids=str)
@pytest.mark.parametrize("router", [Threshold(0.6), EverySecond(), Constant(1)], ids=lambda each: each.name)
def test_paths_agree_with_the_evaluation_under_every_cap(trees, router, caps):
    tables = decision_tables(trees, "train", **caps)
    paths, outcomes = follow(router, tables), run(router, tables)
    problem = np.unique(trees.problem[tables.indices], return_inverse=True)[1]
    replicas, escalations = np.bincount(problem), (paths.actions == 1).sum(axis=1)
    for found, expected in (
        (paths.correct, outcomes.correct),
        (paths.large_tokens, outcomes.large_tokens),
        (escalations, outcomes.escalations),
        (paths.steps, outcomes.steps),
    ):
        assert np.allclose(np.bincount(problem, found) / replicas, expected)
    if "max_large_tokens" in caps and router.name == "always-large":
        assert (paths.actions == CUT_OFF).any() and (paths.large_tokens <= 6).all()
    if "max_escalations" in caps:
        assert escalations.max() == 1


@pytest.mark.parametrize("by", [SMALL, LARGE])
def test_where_one_model_writes_every_answer_nothing_is_decided_there(tmp_path, by):
    """Before, whoever answers was asked in vain as an escalation, and no page could be made."""
    problems = [problem(f"p{i}", ("validation", "test")[i % 2]) for i in range(40)]
    store = finished(tmp_path / "s", kind=ThinkingWriter, problems=problems, splitting=splitting(answer_by=by))
    trees = compile_store(store)
    tables = decision_tables(trees, "test")
    for router in (Constant(0), Constant(1), Threshold(0.5)):
        paths = follow(router, tables)
        for rows, actions in zip(paths.rows, paths.actions, strict=True):
            for row, action in zip(rows[rows >= 0], actions[rows >= 0], strict=True):
                assert (action == ANSWERED) == ((trees.tokens[row] == 0).any()), router.name
    assert [decision_shares(Constant(action), tables)["escalated"] for action in (0, 1)] == [0, 1]
    assert positions(follow(Constant(0), tables), *by_trees(tables))["escalations"] == [0] * paths.rows.shape[1]
    config = EvaluateConfig((saved_run(tmp_path / "run", store, (0.5,)),), str(store.path))
    page = gather(config, evaluate(config))
    assert page["alone"]["small"]["large"] == pytest.approx(follow(Constant(0), tables).large_tokens.mean())
    for record in page["problems"]:
        always_small, always_large = record["runs"][-2:]
        assert "3" in always_small["actions"] and "3" in always_large["actions"]
        assert "wasted" not in always_small["flags"]


def test_a_router_that_draws_has_no_path(trees):
    with pytest.raises(ConfigError, match="random draws its actions"):
        follow(RandomRate(0.5), decision_tables(trees, None))


def made_paths(actions, correct=None, tokens=None):
    """Paths from strings of actions; rows are made up."""
    longest = max(map(len, actions))
    grid = np.array([[int(a) for a in each.ljust(longest, "9")] for each in actions])
    grid = np.where(grid == 9, -1, grid)
    count = len(actions)
    return Paths(
        np.where(grid >= 0, np.arange(grid.size).reshape(grid.shape), -1),
        grid.astype(np.int8),
        np.zeros(count, bool) if correct is None else np.array(correct, bool),
        np.zeros(count, np.int64) if tokens is None else np.array(tokens),
    )


def test_positions_count_escalations_step_by_step():
    paths = made_paths(["01", "0110", "10", "0"])
    weights = np.array([[1.0, 0.0], [0.0, 1.0]])
    found = positions(paths, np.array([0, 0, 1, 1]), weights)
    assert found["decisions"] == [4, 3, 1, 1]
    assert found["escalations"] == [1, 2, 1, 0]
    assert [each.value for each in found["share"]] == [1 / 4, 2 / 3, 1, 0]
    assert [each.value for each in found["per_100"]] == [25, 50, 25, 0]
    # one resample is problem 0 alone (0 of 2 escalated at step 1), the other problem 1 alone (1 of 2)
    assert (found["share"][0].low, found["share"][0].high) == pytest.approx((0.0125, 0.4875))
    parts = [each.value for each in found["parts"]]
    # "01": its second step lies at 0.75; "0110": at 0.375 and 0.625; "10": at 0.25
    assert parts == pytest.approx([0, 0, 0.25, 0.25, 0, 0, 0.25, 0.25, 0, 0])
    never = positions(made_paths(["00"]), np.array([0]), np.ones((3, 1)))
    assert np.isnan([each.value for each in never["parts"]]).all() and never["share"][0] == Estimate(0, 0, 0, 0)


def test_reliability_of_known_scores():
    scores = np.array([0.05, 0.05, 0.35, 0.95, 1.0, 0.95])
    right = np.array([False, True, False, True, True, False])
    problem = np.array([0, 1, 0, 1, 0, 1])
    found = reliability("made", "up?", scores, right, problem, np.array([[0.5, 0.5], [1.0, 0.0]]))
    assert [(each["low"], each["count"]) for each in found["bins"]] == [(0.0, 2), (0.3, 1), (0.9, 3)]
    shares = [each["right"] for each in found["bins"]]
    assert [each.value for each in shares] == pytest.approx([0.5, 0.0, 2 / 3])
    assert (shares[0].low, shares[0].high) == pytest.approx((0.0125, 0.4875))
    assert found["error"] == pytest.approx((2 * 0.45 + 0.35 + 3 * (0.9666667 - 2 / 3)) / 6)
    assert found["auc"] == pytest.approx(
        np.mean([(s > o) + 0.5 * (s == o) for s in scores[right] for o in scores[~right]])
    )


def test_the_scorer_is_judged_on_the_small_models_solutions(store, trees):
    labels = np.array([["2" not in trees.proposal(row, action) for action in (0, 1)] for row in range(trees.nodes)])
    tables = decision_tables(trees, None)
    small = follow(Constant(0), tables)
    problem = np.unique(trees.problem[tables.indices], return_inverse=True)[1]
    weights = np.full((1, 6), 1 / 6)
    assert [each["name"] for each in scorer_reliability(trees, small, problem, weights)] == ["solution", "least"]
    steps, solution, least = scorer_reliability(replace(trees, label=labels.astype(np.int8)), small, problem, weights)
    scorer, expected = ScriptedScorer(), {"steps": [], "solution": [], "least": []}
    for tree, path in by_hand(store, lambda step, score: False):
        texts = [step.text for _, step, _ in path]
        right = "{7}" in texts[-1]
        scores = [scorer.of(tree.problem.question, tuple(texts[: i + 1])) for i in range(len(texts))]
        expected["steps"] += [(s, not any("2" in t for t in texts[: i + 1])) for i, s in enumerate(scores)]
        expected["solution"] += [(s, right) for s in scores]
        expected["least"].append((min(scores), right))
    for found in (steps, solution, least):
        pairs = np.array(expected[found["name"]], np.float32).astype(float)
        assert found["count"] == len(pairs) == sum(each["count"] for each in found["bins"])
        for each in found["bins"]:
            inside = pairs[(pairs[:, 0] >= each["low"]) & (pairs[:, 0] < each["high"])]
            assert each["count"] == len(inside) and each["right"].value == pytest.approx(inside[:, 1].mean())


def test_flags_say_what_they_are_defined_as():
    small = made_paths(["00"] * 6, [False, False, True, True, True, False])
    routed = made_paths(["01", "01", "01", "01", "00", "00"], [True, False, True, False, True, False])
    found = {name: which.tolist() for name, which in flags(routed, small).items()}
    assert found == {
        "wrong": [False, True, False, True, False, True],
        "rescued": [True, False, False, False, False, False],
        "wasted": [False, True, True, True, False, False],
        "spoiled": [False, False, False, True, False, False],
    }
    cut = flags(made_paths(["2"], [False]), made_paths(["0"], [False]))
    assert cut["wasted"][0] and not cut["rescued"][0]


def test_traces_replay_the_walk(store, trees):
    tables = decision_tables(trees, None)
    routers = [router for router, _ in CASES]
    paths = [follow(router, tables) for router in (*routers, Constant(0))]
    small, large = paths[-1], paths[2]
    traced = Traced(trees, tables.indices, paths, [flags(each, small) for each in paths], small, large)
    for which, (_, decide) in enumerate(CASES):
        for position, (tree, walked) in enumerate(by_hand(store, decide)):
            record = json.loads(json.dumps(problem_record(traced, position, {"p1": "seven"})))
            assert (record["id"], record["replica"]) == (tree.problem.id, tree.replica)
            assert record["question"] == tree.problem.question
            assert record["answer"] == ("seven" if tree.problem.id == "p1" else None)
            at, trace = 0, record["runs"][which]
            for action, (up, step, proposal) in zip(trace["actions"], walked, strict=True):
                own, other = record["nodes"][at]
                assert int(action) == up
                assert own["text"] == proposal.text.strip("\n") and own["tokens"] == proposal.tokens
                taken = other if up else own
                assert taken["text"] == step.text.strip("\n") and taken["label"] is None
                at = taken.get("next")
            assert at is None and taken["stop"] == walked[-1][1].stop_reason.value
            assert trace["right"] == taken["right"] == ("{7}" in step.text)
            assert trace["large_tokens"] == sum(step.tokens for up, step, _ in walked if up)
            assert record["large"]["large_tokens"] == large.large_tokens[position]


def test_what_no_router_saw_is_not_on_the_page(trees):
    tables = decision_tables(trees, None)
    small, large = follow(Constant(0), tables), follow(Constant(1), tables)
    record = problem_record(Traced(trees, tables.indices, [small], [flags(small, small)], small, large), 0, {})
    assert len(record["nodes"]) == small.steps[0]
    assert all(other is None for _, other in record["nodes"])


def test_problems_are_drawn_once_each(trees):
    indices = decision_tables(trees, None).indices
    drawn = choose(trees, indices, 4, seed=1)
    assert len(drawn) == 4 and drawn == choose(trees, indices, 4, seed=1)
    assert len(set(trees.problem[indices[drawn]].tolist())) == 4
    assert (trees.replica[indices[drawn]] == 0).all()
    assert len({tuple(choose(trees, indices, 2, seed=s)) for s in range(20)}) > 3
    assert len(choose(trees, indices, 99, seed=0)) == 6 and choose(trees, indices, 0, seed=0) == []


def summary(name, knobs):
    points = tuple(type("Point", (), {"knob": knob})() for knob in knobs)
    fields = dict.fromkeys(MethodSummary.__dataclass_fields__, None)
    return MethodSummary(**{**fields, "name": name, "points": points})


def test_routers_that_are_shown():
    methods = {
        "trim-agg": [Artefact(score_router(t)) for t in (0.1, 0.2)],
        "mixed": [Artefact(Mixture(Constant(0), Threshold(0.4), 0.3, Knob("budget", 0.2)))],
    }
    knobs = [item.router.knob.value for item in methods["trim-agg"]]
    summaries = [summary("trim-agg", knobs), summary("mixed", [0.2]), summary("trim-thr", np.linspace(0, 1, 16))]
    shown = shown_routers(methods, [*summaries, summary("random", [0.5])], most=3)
    assert [(each.method, each.knob) for each in shown] == [
        *(("trim-agg", knob) for knob in knobs),
        ("mixed", 0.2),
        ("mixed", 0.2),
        *(("trim-thr", pytest.approx(knob)) for knob in (0, 8 / 15, 1)),
        ("always-small", None),
        ("always-large", None),
    ]
    assert shown[0].router is methods["trim-agg"][0].router
    assert "for 70 % of problems" in shown[2].label and shown[3].router == Threshold(0.4)
    assert spread_out([1, 2, 3], 5) == [1, 2, 3] and spread_out(list(range(16)), 6) == [0, 3, 6, 9, 12, 15]


def test_a_page_counts_what_it_shows(page):
    content, shown = page.content, page.content["problems"]
    assert content["sampling"]["shown"] == len(shown) == 30 and content["subject"]["trees"] == 60
    trees = compile_store(page.store)
    tables = decision_tables(trees, "test")
    for i, setting in enumerate(content["settings"]):
        assert setting["counts"]["wrong"] >= sum("wrong" in problem["runs"][i]["flags"] for problem in shown)
        if setting["method"] == "trim-agg":
            outcomes = run(score_router(round(0.01 / setting["knob"], 6)), tables)
            assert setting["counts"]["wrong"] == pytest.approx(60 * (1 - outcomes.correct.mean()))
    assert content["settings"][-2]["counts"]["rescued"] == 0
    assert content["settings"][-1]["share"] == 1 and content["settings"][-2]["share"] == 0
    first = content["settings"][content["first"]]
    assert first["method"] == "trim-agg"
    traced = {each["knob"] for each in content["settings"] if each["method"] == "trim-agg"}
    assert traced == {point["knob"] for point in content["methods"][0]["points"]}


def test_traces_that_do_not_fit_are_left_out_and_counted(page):
    from agents.evaluation.suite import evaluate

    config = EvaluateConfig((page.run,), str(page.store))
    found = evaluate(config)
    size = len(json.dumps(page.content["problems"][0], ensure_ascii=False).encode())
    small = gather(replace(config, report_problems=20), found, trace_bytes=3 * size)
    assert 1 <= small["sampling"]["shown"] < small["sampling"]["wanted"] == 20
    assert len(small["problems"]) == small["sampling"]["shown"]
    none = gather(replace(config, report_problems=0), found)
    assert none["problems"] == [] and none["sampling"]["wanted"] == 0
    with pytest.raises(ConfigError, match="--report-problems is -1"):
        replace(config, report_problems=-1)


@pytest.mark.parametrize("unit", [r"\[", r"\(", "$", r"$\$", r"\$", "$$a", r"\boxed{", r"\boxed{{a}", r"\[a\\[2pt]"])
def test_formulas_that_never_end_cost_no_more_than_their_length(unit):
    """Before, 16,000 characters took more than a second."""
    began = time.process_time()
    re.findall(PATTERN, "$" + unit * (200_000 // len(unit)))
    assert time.process_time() - began < 1.0
    assert re.findall(PATTERN, unit * 9 + r"\[ a \\[2pt] b \] \(c\)")[-2:] == [r"\[ a \\[2pt] b \]", r"\(c\)"]


def test_formulas_are_read_and_other_dollars_are_not():
    pytest.importorskip("latex2mathml")
    texts = [
        r"so \(x^2\) and \[ \begin{aligned} a &= b \end{aligned} \] give $\frac12$ or \boxed{\frac{1}{2}}",
        r"she paid $5 and $6, $3,$4; $ x $; $\nonsense{3}$ \(\href{javascript:alert(1)}{x}\) $\frac{1$",
        "$" + "{" * 500 + "}" * 400 + "$",
    ]
    found = formulas(texts)
    assert r"\(x^2\)" in found and r"$\frac12$" in found and found[r"\boxed{\frac{1}{2}}"][1][1][0] == "boxed"
    assert not [formula for formula in found if "5" in formula or "nonsense" in formula]
    assert "javascript" not in json.dumps(list(found.values()))
    assert found[r"$\frac12$"] == ["math", ["mrow", ["mfrac", ["mn", "1"], ["mn", "2"]]]]


@pytest.mark.parametrize("high", [0.01234567, 0.012])
def test_the_command_for_the_end_of_a_range_stays_in_it(high):
    """Before, six digits of it could lie beyond, which the service refuses."""
    weights = {"0.weight": np.zeros((2, 5), np.float32), "0.bias": np.zeros(2, np.float32)}
    router = ConditionedMLP("r", "agg/1", 4e-4, high, weights)
    command = setting_of([Artefact(router, {}, "mlp", "place")], high, "scorer")["serve"].split()
    assert router.holds(float(command[command.index("--lam") + 1]))


def test_thresholds_of_ones_own_are_no_baseline(page, tmp_path):
    about = {"rollouts": {"store": "s", "hash": compile_store(page.store).meta["hash"]}, "cost": "decode-only"}
    artefact.save(Threshold(0.4), tmp_path / "mine" / "policy", about)
    config = EvaluateConfig((tmp_path / "mine",), str(page.store), report_problems=2)
    content = gather(config, evaluate(config))
    kinds = {method["name"]: method["kind"] for method in content["methods"]}
    assert kinds["trim-thr"] == "trained" and kinds["trim-thr (swept)"] == "threshold"
    own, swept = (next(m for m in content["methods"] if m["name"] == name)["points"] for name in kinds if "thr" in name)
    assert own[0]["label"] == "threshold=0.4" and f"--policy {tmp_path}/mine/policy --models" in own[0]["serve"]
    assert {point["serve"] for point in swept} == {None}


def test_data_cannot_leave_its_block():
    nasty = [*HOSTILE, {"</SCRIPT >": "<!--<script>"}]
    text = embedded(nasty)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == nasty


def test_the_page_is_whole_and_lets_nothing_else_run(page):
    text = page.file.read_text(encoding="utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 1 and text.count("</script>") == 2 and "window.hacked = 1</script>" not in text
    for kind, inside in (("script", scripts[0]), ("style", re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1])):
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(data) == page.content
    outside = text.replace(data, "")
    assert set(re.findall(r"https?://[^\s\"']+", outside)) == {NAMES + "2000/svg", NAMES + "1998/Math/MathML"}
    assert "$data" not in outside and "$style" not in outside
    assert render(page.content) == text


def test_a_folder_that_cannot_be_written_is_named(page, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="taken/report.html: the page cannot be written here"):
        write(page.content, tmp_path / "taken")


def test_the_flag_writes_the_page(page, tmp_path, capsys):
    store = page.store
    arguments = [str(page.run), "--rollouts", str(store), "--out", str(tmp_path / "out")]
    assert evaluate_command.main([*arguments, "--report", "page", "--report-problems", "5"]) == 0
    file = tmp_path / "out" / "page" / "report.html"
    assert str(file) in capsys.readouterr().out
    assert file.stat().st_size < 3e6 and "p" in file.read_text(encoding="utf-8")
    written = re.search(r'id="data">(.*?)</script>', file.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert len(json.loads(written)["problems"]) == 5
    assert evaluate_command.main(arguments) == 0 and not (tmp_path / "out" / "report.html").exists()
