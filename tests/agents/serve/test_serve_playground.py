"""The playground in a real browser, before upstreams that do what a test wants: mouse, keyboard, phone, dark, Stop."""

import json
import re
import time
from importlib.resources import files

import pytest
from browser import driver, emulate, focused, one, resize, spaced, texts
from made_reports import HOSTILE
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from serve_harness import QUESTION, ROLES, Router, policy
from test_serve_asking import from_the_second_step

from agents.report.render import part
from rollouts.tinymath import generate_problems

__all__ = ["driver"]


@pytest.fixture(scope="module")
def before(upstreams):
    """A router for every budget, with the page."""
    running = Router(files("agents.demo") / "router", upstreams.urls(), playground=True, budget=0.3)
    yield running
    running.stop()


def open_page(driver, router):
    emulate(driver, prefers_reduced_motion="reduce")
    resize(driver, 1280, 900)
    for kind in ("browser", "performance"):
        driver.get_log(kind)
    driver.get(router.url.removesuffix("v1"))
    wait(driver, "return document.documentElement.dataset.ready === 'yes'")
    driver.execute_script("localStorage.clear()")


@pytest.fixture
def page(driver, before, upstreams):
    """A freshly opened page; whatever a test does with it, nothing but its own service is asked for anything."""
    upstreams.well()
    open_page(driver, before)
    own = before.url.removesuffix("v1")
    assert own in asked_for(driver)
    yield driver
    upstreams.well()
    assert driver.execute_script("return window.hacked") is None
    assert [url for url in asked_for(driver) if not url.startswith((own, "data:"))] == []
    before.idle()


def requests(driver):
    """What the browser has asked for since this was last called."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [each["params"]["request"] for each in messages if each["method"] == "Network.requestWillBeSent"]


def asked_for(driver):
    return [each["url"] for each in requests(driver)]


def wait(driver, script, *arguments, within=20):
    end = time.monotonic() + within
    while not driver.execute_script(script, *arguments):
        assert time.monotonic() < end, script
        time.sleep(0.02)


def solved(driver):
    wait(driver, "return document.getElementById('stop').disabled && document.getElementById('said').textContent")
    return spaced(one(driver, "#said").text)


def write(driver, question):
    script = "const e = document.getElementById('problem'); e.value = arguments[0]; e.dispatchEvent(new Event('input'))"
    driver.execute_script(script, question)


def compare_with(driver, side, answer, truth=None):
    """What the page shows of a solution is what the service told of it; upstreams repeat themselves."""
    trace, cards = answer["trim"]["trace"], f"#side-{side} .step"
    assert texts(driver, f"{cards} > .text") == [step["text"].strip() or "(nothing)" for step in trace]
    assert [("large" if "large" in each else "small") for each in texts(driver, f"{cards} .author")] == [
        step["author"] for step in trace
    ]
    rejected = [step for step in trace if step["rejected"] is not None]
    assert texts(driver, f"{cards} del") == [step["rejected"].strip() for step in rejected]
    shown = [(step["score"] if step["author"] == "small" else step["large_score"]) for step in trace]
    scores = texts(driver, f"{cards} > .head .meter")
    assert [each.split()[-1] for each in scores] == [f"{score:.2f}" for score in shown if score is not None]
    large = sum(step["large_tokens"] or 0 for step in trace)
    tiles = spaced(one(driver, f"#side-{side} .tiles").text)
    assert f"Large tokens\n{large}\n" in tiles
    found = answer["trim"]["answer"]
    assert f"Answer\n{found if found is not None else 'none'}" in tiles
    if truth is not None:
        assert ("✓ right" in tiles) is (found == truth) and ("✗ wrong: it is " + truth in tiles) is (found != truth)
    return large


def test_a_known_problem_is_drawn_and_solved_by_both_with_the_mouse(page, before):
    questions = {problem.question: problem.answer for problem in generate_problems("validation", 200)}
    first = one(page, "#problem").get_attribute("value")
    one(page, "#draw").click()
    question = one(page, "#problem").get_attribute("value")
    assert question != first and {question, first} <= set(questions)
    assert "Its answer is known" in one(page, "#checked").text
    one(page, "#solve").click()
    said = solved(page)
    budget = float(one(page, "#budget").get_attribute("value"))
    alone = before.chat(question, only="large", trace=True).json()
    routed = before.chat(question, budget=budget, trace=True).json()
    small = compare_with(page, "router", routed, questions[question])
    large = compare_with(page, "large", alone, questions[question])
    assert {step["author"] for step in alone["trim"]["trace"]} == {"large"}
    assert f"Saved\n{100 * (1 - small / large):.0f} %\nagainst {large}" in spaced(one(page, "#side-router").text)
    assert f"with {small} large-model token" in said and f"with {large} large-model token" in said
    assert "So far, 1 problem" in one(page, "#tally").text


def test_a_problem_is_typed_and_solved_by_keyboard(page, before):
    box = one(page, "#problem")
    assert spaced(one(page, "#budget-is").text) == "25 % of always-large's tokens"
    box.clear()
    box.send_keys(QUESTION)
    assert "not known" in one(page, "#checked").text
    ActionChains(page).send_keys(Keys.TAB, Keys.ARROW_RIGHT * 4, Keys.TAB, Keys.SPACE).perform()
    assert focused(page) == "both" and not one(page, "#both").is_selected()
    assert spaced(one(page, "#budget").get_attribute("aria-valuetext")) == "29 % of always-large's tokens"
    assert "right on held-out problems" in one(page, "#expected").text
    requests(page)
    box.send_keys(Keys.ENTER)
    said = solved(page)
    assert said.startswith("The router: ") and "right" not in said
    [sent] = requests(page)
    body = json.loads(sent["postData"])
    assert body["budget"] == 0.29 and body["messages"] == [{"role": "user", "content": QUESTION}]
    assert box.get_attribute("value") == QUESTION  # Enter solved and wrote nothing
    compare_with(page, "router", before.chat(budget=0.29, trace=True).json())
    assert not texts(page, "#side-large")
    one(page, "#solve").send_keys(Keys.ENTER)
    solved(page)
    assert focused(page) == "solve"


@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_stop_ends_the_work_upstream(page, before, upstreams, by):
    left = {each.role: len(each.lines("left")) for each in upstreams.every}
    for each in (upstreams.small, upstreams.large):
        each.mode("stall")
    one(page, "#solve").send_keys(Keys.ENTER)
    end = time.monotonic() + 10
    while before.metric("trim_requests_in_flight") < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.2)
    assert one(page, "#stop").is_enabled() and focused(page) == "stop" and not one(page, "#solve").is_enabled()
    if by == "mouse":
        one(page, "#stop").click()
    else:
        ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert solved(page) == "Stopped."
    before.idle()
    end = time.monotonic() + 5
    while any(len(each.lines("left")) <= left[each.role] for each in (upstreams.small, upstreams.large)):
        assert time.monotonic() < end, "upstreams work on"
        time.sleep(0.02)
    asked = sum(len(each.log.read_text().splitlines()) for each in upstreams.every)
    time.sleep(0.3)
    assert sum(len(each.log.read_text().splitlines()) for each in upstreams.every) == asked


def test_errors_are_said_in_words(page, before, upstreams):
    write(page, "x " * 9000)
    one(page, "#solve").click()
    assert "too long" in solved(page) and not texts(page, ".side")
    write(page, QUESTION)
    for each in (upstreams.small, upstreams.large):
        each.mode("error")
    one(page, "#solve").click()
    said = solved(page)
    assert "does not answer" in said or "Neither model answers" in said
    upstreams.well()
    before.wait_up()
    one(page, "#solve").click()
    assert solved(page).startswith("The router: ") and one(page, "#said").get_attribute("class") == ""


def test_hostile_texts_are_only_text_also_on_a_phone(page, before, upstreams):
    rows = [{"text": f"{text}\n\n", "tokens": 7, "stop_reason": "delimiter"} for text in HOSTILE]
    recorded = json.loads(upstreams.small._replies.read_text())
    for each in (upstreams.small, upstreams.large):
        each.control(recorded=rows)
    try:
        resize(page, 390, 844)
        for question in (*HOSTILE[:4], "x" * 300):
            write(page, question)
            one(page, "#solve").click()
            solved(page)
            wide = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
            assert wide[0] <= wide[1] == 390
            assert (
                page.execute_script("return document.querySelectorAll('main img, main iframe, main style').length") == 0
            )
            shown = set(texts(page, ".step > .text")) | set(texts(page, ".step del"))
            assert shown <= {text.strip() for text in HOSTILE} and len(shown) > 2
    finally:
        for each in (upstreams.small, upstreams.large):
            each.control(recorded=recorded[each.role])
    assert page.execute_script("return document.styleSheets.length") == 1


def test_colours_follow_the_system(page):
    paper = "return getComputedStyle(document.body).backgroundColor"
    for scheme in ("light", "dark"):
        emulate(page, prefers_color_scheme=scheme)
        assert (page.execute_script(paper) == "rgb(255, 255, 255)") is (scheme == "light")
    emulate(page, prefers_color_scheme="light")
    one(page, "#theme").click()
    one(page, "#theme").click()
    assert page.execute_script(paper) != "rgb(255, 255, 255)"


def test_the_page_may_load_nothing_and_takes_no_markup(before):
    answer = before.client.get("/")
    policy = dict(each.strip().split(" ", 1) for each in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'" and policy["connect-src"] == "'self'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    own = (files("agents.serve.playground") / "template" / "play.js").read_text(encoding="utf-8")
    for script in (own, part("tools.js"), part("steps.js")):
        assert not [
            word for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(") if word in script
        ]
    assert not re.findall(
        r"https?://(?!www\.w3\.org/(?:2000/svg|1998/Math/MathML)\b)", answer.text
    )  # kinds of elements


def test_a_page_before_a_fixed_policy_with_a_key_asks_for_it(driver, upstreams, folder, monkeypatch):
    monkeypatch.setenv("PLAY_KEY", "sesame")
    running = Router(folder, upstreams.urls(), playground=True, api_key_env="PLAY_KEY")
    try:
        open_page(driver, running)
        assert "asks for a key" in one(driver, "#said").text
        key = one(driver, "#key")
        key.send_keys("wrong", Keys.TAB)
        wait(driver, "return document.getElementById('said').textContent.includes('does not accept')")
        key.clear()
        key.send_keys("sesame", Keys.TAB)
        wait(driver, "return document.getElementById('said').textContent === ''")
        assert "trim-thr" in one(driver, "#subject").text and not one(driver, "#budget-box").is_displayed()
        one(driver, "#solve").click()
        assert solved(driver).startswith("The router: ")
    finally:
        running.stop()
    one(driver, "#solve").click()
    assert "cannot be reached" in solved(driver)


def test_steps_that_a_router_asked_about_are_marked_with_their_price(driver, upstreams, tmp_path):
    running = Router(policy(tmp_path, from_the_second_step("scorer")), upstreams.urls(), playground=True)
    try:
        for number in range(20):  # one with steps of both, most of which were asked about
            question = f"Let a={number}+33, b=a+49. Find b."
            answer = running.chat(question, trace=True).json()
            trace = answer["trim"]["trace"]
            if len(trace) > 3 and len({step["author"] for step in trace}) == 2:
                break
        open_page(driver, running)
        write(driver, question)
        one(driver, "#solve").click()
        solved(driver)
        compare_with(driver, "router", answer)
        steps = "document.querySelectorAll('#side-router .step')"
        marks = driver.execute_script(f"return [...{steps}].map(e => e.querySelector('.asked')?.textContent)")
        paid = [f"? asked: {step['asked_tokens']} tokens read" for step in trace[1:]]
        assert len(paid) > 2 and [each and spaced(each) for each in marks] == [None, *paid]
        told = f"Asked\n{len(paid)} of {len(trace)}\n{answer['trim']['asked_tokens']} tokens read"
        assert told in spaced(one(driver, "#side-router .tiles").text)
        assert driver.execute_script("return document.querySelectorAll('#side-router .unscored').length") == sum(
            (step["score"] if step["author"] == "small" else step["large_score"]) is None for step in trace
        )
        assert not texts(driver, "#side-large .asked")
        assert "asks for score" in one(driver, "#subject").text
    finally:
        running.stop()


def test_without_a_playground_there_is_no_page_and_no_model_alone(router):
    assert router.client.get("/").status_code == 404
    answer = router.chat(only="large")
    assert answer.status_code == 400 and "--playground" in answer.json()["error"]["message"]


@pytest.mark.parametrize("role", ROLES[:2])
def test_one_model_alone_asks_nobody_else(before, role):
    answer = before.chat(only=role).json()
    spent = answer["usage"]["models"]
    other = {"small": "large", "large": "small"}[role]
    assert spent[other]["requests"] == spent["scorer"]["requests"] == 0 < spent[role]["requests"]
    assert spent[role]["discarded_tokens"] == 0 and answer["trim"]["escalations"] == 0
