"""The page in a real browser: by mouse, by keyboard, at the width of a phone, with texts that try to break it."""

import json
import re
import shlex
import time

import pytest
from browser import driver, focused, one, resize, spaced, texts, written
from made_reports import HOSTILE, made_page
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from agents.report.render import render

__all__ = ["driver"]
FLAGS = ("wrong", "rescued", "wasted", "spoiled")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return made_page(tmp_path_factory.mktemp("page"))


@pytest.fixture
def page(driver, made):
    """A freshly opened page; whatever a test does with it, it may write no error and ask nothing of the network."""
    still = {"name": "prefers-reduced-motion", "value": "reduce"}  # else clicks miss what still scrolls
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [still]})
    resize(driver, 1280, 900)
    for kind in ("browser", "performance"):
        driver.get_log(kind)
    driver.get(made.file.as_uri())
    assert driver.execute_script("localStorage.clear(); return document.documentElement.dataset.ready") == "yes"
    yield driver
    assert driver.execute_script("return window.hacked") is None
    assert [entry["message"] for entry in driver.get_log("browser")] == []
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    assert made.file.as_uri() in asked
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def ids(driver):
    return driver.execute_script("return [...document.querySelectorAll('[role=option]')].map(e => e.dataset.id)")


def selected(driver):
    found = "return document.querySelector('[role=option][aria-selected=true]')?.dataset.id ?? null"
    return driver.execute_script(found)


def choose_setting(driver, index):
    """Choose a setting by the selects of the problems, as a user does."""
    setting = driver.execute_script("return JSON.parse(document.getElementById('data').textContent).settings")[index]
    one(driver, f"#problem-method option[value='{setting['method']}']").click()
    one(driver, f"#problem-setting option[value='{index}']").click()


def read(band, c):
    """Accuracy of a curve at a cost, by straight lines, as the page should say it."""
    pairs = [(x, y) for x, y in zip(band["c"], band["accuracy"], strict=True) if y is not None]
    for (x0, y0), (x1, y1) in zip(pairs, pairs[1:], strict=False):
        if x0 <= c <= x1:
            return y0 + (y1 - y0) * ((c - x0) / (x1 - x0) if x1 > x0 else 1)
    raise AssertionError(f"no accuracy at {c}")


def test_everything_is_drawn(page, made):
    assert made.content["subject"]["rollouts"] in page.title
    for chart in ("curve", "position", "scorer"):
        assert page.execute_script(f"return document.querySelectorAll('#{chart}-chart > svg path').length") > 3
    assert texts(page, "#curve-legend .name") == [method["name"] for method in made.content["methods"]]
    rows = page.execute_script("return document.querySelectorAll('#metric-tables table.wide tbody tr').length")
    assert rows == len(made.content["tables"]["headline"]) - 1 + len(made.content["tables"]["all"]) - 1
    subject = spaced(one(page, "#subject").text)
    for word in ("test", "30 problems", "decode-only", "no cap", made.content["subject"]["date"]):
        assert word in subject
    assert "30 problems of 30" in spaced(texts(page, "#note-text")[0])
    for name in FLAGS:
        assert made.content["flags"][name] in texts(page, "#note-text")[0]


def test_curves_are_read_by_keyboard(page, made):
    cursor = one(page, "#curve-chart .cursor")
    cursor.send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * 13)
    assert cursor.get_attribute("aria-valuenow") == "13.0"
    for method, value in zip(made.content["methods"], texts(page, "#curve-legend output"), strict=True):
        if method["kind"] != "oracle":
            assert spaced(value).split(" ")[0] == f"{100 * read(method['band'], 0.13):.1f}"
            assert method["name"] in cursor.get_attribute("aria-valuetext")
    points = [
        (p["c"], m["name"], p)
        for m in made.content["methods"]
        if not m["name"].startswith("query oracle")
        for p in m["points"]
    ]
    points.sort(key=lambda each: each[0])
    cursor.send_keys(Keys.HOME, Keys.ARROW_UP)
    first = spaced(cursor.get_attribute("aria-valuetext"))
    assert f"accuracy {100 * points[0][2]['accuracy'][0]:.1f} %" in first
    assert one(page, "#curve-chart .tip").is_displayed()
    cursor.send_keys(*[Keys.ARROW_UP] * (len(points) + 3))
    last = spaced(cursor.get_attribute("aria-valuetext"))
    assert f"cost {100 * points[-1][0]:.1f} %" in last
    cursor.send_keys(Keys.ESCAPE)
    assert not one(page, "#curve-chart .tip").is_displayed()


def test_curves_are_read_by_mouse_and_lead_to_traces(page, made):
    where = page.execute_script(  # from the middle of what is seen of the chart: all of it
        """document.querySelector('#curve-chart .cursor').scrollIntoView({block: "center"});
        const mark = document.querySelectorAll('#curve-chart g.series.s0 .mark')[1].getBoundingClientRect();
        const box = document.querySelector('#curve-chart .cursor').getBoundingClientRect();
        return [mark.x + mark.width / 2 - box.x - box.width / 2, mark.y + mark.height / 2 - box.y - box.height / 2]"""
    )
    cursor, tip = one(page, "#curve-chart .cursor"), one(page, "#curve-chart .tip")
    ActionChains(page).move_to_element_with_offset(cursor, round(where[0]), round(where[1])).perform()
    method = made.content["methods"][0]
    point = method["points"][1]
    shown = spaced(tip.text)
    assert method["name"] in shown and f"accuracy {100 * point['accuracy'][0]:.1f} %" in shown
    assert f"At a cost of {100 * point['c']:.1f} %" in spaced(one(page, "#curve-legend .at").text)
    ActionChains(page).click().perform()
    chosen = next(i for i, each in enumerate(made.content["settings"]) if each["knob"] == point["knob"])
    assert one(page, "#problem-setting").get_attribute("value") == str(chosen)
    assert one(page, "#position-setting").get_attribute("value") == str(chosen)
    assert focused(page) == "problem-list"


def test_methods_are_hidden_and_shown(page):
    lines = "return document.querySelectorAll('#curve-chart > svg g.series.s1').length"
    assert page.execute_script(lines) == 1
    button = one(page, "#curve-legend button.s1")
    button.send_keys(Keys.SPACE)
    assert page.execute_script(lines) == 0 and button.get_attribute("aria-pressed") == "false"
    button.click()
    assert page.execute_script(lines) == 1


@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_filters_show_what_the_data_say(page, made, by):
    problems, settings = made.content["problems"], made.content["settings"]
    kinds = set()
    for index in (0, 2, len(settings) - 1):
        choose_setting(page, index)
        for name in ("all", *FLAGS):
            button = one(page, f"[data-filter={name}]")
            if by == "mouse":
                button.click()
            else:
                button.send_keys(Keys.ENTER)
            wanted = [p["id"] for p in problems if name == "all" or name in p["runs"][index]["flags"]]
            kinds.add((name, 0 < len(wanted) < len(problems)))
            assert ids(page) == wanted
            assert one(page, f"[data-filter={name}] .count").text == str(len(wanted))
            assert button.get_attribute("aria-pressed") == "true"
            count = spaced(one(page, "#problem-count").text)
            assert count.startswith(f"{len(wanted)} problem")
            if name != "all":
                assert f": {settings[index]['counts'][name]} (" in count
            assert (selected(page) in wanted) if wanted else selected(page) is None
    assert {(name, True) for name in ("wrong", "rescued", "wasted")} <= kinds


def test_flags_in_the_data_follow_from_their_definition(made):
    for problem in made.content["problems"]:
        small = problem["runs"][-2]
        for run in problem["runs"]:
            helped, right, alone = "1" in run["actions"], run["right"], small["right"]
            wanted = [(not right, "wrong"), (not alone and right and helped, "rescued")]
            wanted += [(helped and (alone or not right), "wasted"), (alone and not right, "spoiled")]
            assert run["flags"] == [name for holds, name in wanted if holds]


def facts(page, place):
    return [spaced(text) for text in texts(page, f"{place} .facts dd")]


@pytest.mark.parametrize("wanted", [1, 15, 40, 100])
def test_a_setting_is_recommended_for_a_budget(page, made, wanted):
    drag = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
    page.execute_script(drag, one(page, "#deploy-value"), wanted)
    method = made.content["methods"][0]
    points = [point for point in method["points"] if point["on_curve"]]
    within = [point for point in points if point["c"] <= wanted / 100]
    point = within[-1] if within else points[0]
    told = facts(page, "#deploy-result")
    assert told[0] == f"{method['name']}, {point['label']}"
    assert told[1].startswith(f"{100 * point['accuracy'][0]:.1f} % [") and f"{100 * point['c']:.1f} % [" in told[2]
    assert (len(texts(page, "#deploy-result .notice")) > 0) == (not within)
    folder = f"{made.run}/lam-{point['knob']:g}/policy"
    command = texts(page, "#deploy-command")[0]
    assert shlex.split(command)[:6] == ["python", "-m", "agents", "serve", "--policy", folder]
    assert "--prm" in command and "--models models.toml" in command


def test_a_goal_and_prices_are_moved_by_keyboard(page, made):
    goal = one(page, "#deploy-goal")
    goal.send_keys(Keys.ARROW_DOWN)
    assert goal.get_attribute("value") == "accuracy"
    value = one(page, "#deploy-value")
    value.send_keys(Keys.HOME)
    points = [point for point in made.content["methods"][0]["points"] if point["on_curve"]]
    least = float(value.get_attribute("value")) / 100
    point = next(point for point in points if point["accuracy"][0] >= least)
    assert facts(page, "#deploy-result")[0].endswith(point["label"])
    assert "At least" in value.get_attribute("aria-valuetext")
    value.send_keys(Keys.END)
    most = max(points, key=lambda point: point["accuracy"][0])
    assert facts(page, "#deploy-result")[1].startswith(f"{100 * most['accuracy'][0]:.1f} %")
    one(page, "#deploy-large-price").send_keys(Keys.END)  # 30 a million
    one(page, "#deploy-small-price").send_keys(Keys.HOME)  # nothing
    one(page, "#deploy-volume").send_keys(Keys.HOME)  # a thousand problems
    rows = [
        [spaced(text) for text in texts(page, f"#deploy-result tbody tr:nth-child({row}) td > span")] for row in (1, 2)
    ]
    alone = made.content["alone"]["large"]["large"]
    assert rows[0][2] == f"$ {0.03 * alone:.2f}" and rows[1][2] == f"$ {0.03 * most['large_tokens']:.2f}"
    assert f"$ {0.03 * (alone - most['large_tokens']):.2f} of" in facts(page, "#deploy-result")[4]
    one(page, "#deploy-large-price").send_keys(Keys.HOME)
    one(page, "#deploy-small-price").send_keys(Keys.END)  # then nothing is saved
    saved, of = facts(page, "#deploy-result")[4].split(" of ")
    assert re.fullmatch(r"\u2212\$ [\d,.]+", saved) and of == "$ 0.00"
    one(page, "#deploy-show").click()
    assert focused(page) == "problem-list"


def test_whatever_can_be_served_is_offered(page, made):
    methods = [
        {**each, "kind": "query-level"} if place == 0 else each for place, each in enumerate(made.content["methods"])
    ]
    file = made.file.with_name("field.html")
    file.write_text(render({**made.content, "methods": methods}))
    page.get(file.as_uri())
    offered = page.execute_script("return [...document.querySelectorAll('#deploy-method option')].map(e => e.value)")
    assert offered == [each["name"] for each in methods if each["kind"] in ("query-level", "threshold")]
    assert f"{made.run}/lam-" in texts(page, "#deploy-command")[0]


def test_two_routers_are_compared_on_a_problem(page, made):
    choose_setting(page, 0)
    one(page, "#problem-other option[value='2']").click()
    one(page, "#problem-order option[value=apart]").click()
    of = {
        problem["id"]: [problem["runs"][index]["actions"] for index in (0, 2)] for problem in made.content["problems"]
    }
    differ = [of[each][0] != of[each][1] for each in ids(page)]
    assert sorted(differ, reverse=True) == differ and {*differ} == {True, False}
    both = of[selected(page)]
    assert len(texts(page, ".run")) == 2 and [len(actions) for actions in both] == [
        len(texts(page, f".run:nth-child({place}) .step")) for place in (1, 2)
    ]
    parting = next(i for i, (one, other) in enumerate(zip(*both, strict=False)) if one != other)
    marked = (
        "return [...document.querySelectorAll('.run:first-child .steps > li')].findIndex(e => e.className == 'parting')"
    )
    assert page.execute_script(marked) == parting
    one(page, "#problem-list").send_keys(Keys.END)
    assert texts(page, ".parting") == [] and "Both do the same here" in one(page, "#problem-detail").text
    one(page, "#problem-order option[value=cost]").click()
    costs = {problem["id"]: problem["runs"][0]["large_tokens"] for problem in made.content["problems"]}
    listed = [costs[each] for each in ids(page)]
    assert listed == sorted(listed, reverse=True)


def test_formulas_are_drawn_and_nothing_else_of_what_models_write(page, made):
    pytest.importorskip("latex2mathml")
    drawn = made.content["maths"]["drawn"]
    assert any("\\frac" in formula for formula in drawn)
    one(page, "#problem-search").send_keys("frac")
    assert page.execute_script("return document.querySelectorAll('#problem-detail math mfrac').length") >= 1
    kinds = page.execute_script(
        "return [...document.querySelectorAll('math, math *')].flatMap(e => e.getAttributeNames())"
    )
    assert {*kinds} <= {"alttext", "class", "display"}


def test_search_narrows_the_list(page, made):
    search = one(page, "#problem-search")
    search.send_keys("What is 5?")
    assert ids(page) == ["p5 <b>5</b>"] and selected(page) == "p5 <b>5</b>"
    search.send_keys("jjkk")
    assert ids(page) == [] and "No problem" in one(page, "#problem-detail").text
    search.clear()
    search.send_keys(" ", Keys.BACKSPACE)
    assert len(ids(page)) == 30


def test_next_and_previous_by_keyboard(page, made):
    listed = [problem["id"] for problem in made.content["problems"]]
    box = one(page, "#problem-list")
    box.send_keys(Keys.HOME)
    assert selected(page) == listed[0]
    for key, place in (("j", 1), (Keys.ARROW_DOWN, 2), ("k", 1), (Keys.ARROW_UP, 0), (Keys.ARROW_UP, 0)):
        box.send_keys(key)
        assert selected(page) == listed[place]
        assert one(page, "#problem-detail h3").text == listed[place]
    outline = page.execute_script("return getComputedStyle(arguments[0]).outlineStyle", box)
    assert outline == "solid" and focused(page) == "problem-list"
    box.send_keys(Keys.END)
    assert selected(page) == listed[-1]
    inside = """const item = document.querySelector('[aria-selected=true]').getBoundingClientRect();
        const box = document.getElementById('problem-list').getBoundingClientRect();
        return item.top >= box.top - 1 && item.bottom <= box.bottom + 1"""
    assert page.execute_script(inside)
    assert not one(page, "[aria-label='Next problem (j)']").is_enabled()
    button = one(page, "[aria-label='Previous problem (k)']")
    button.send_keys(Keys.ENTER)
    assert selected(page) == listed[-2]
    ActionChains(page).send_keys(Keys.ENTER).perform()  # the focus stays on the new button
    assert selected(page) == listed[-3]


def test_a_trace_shows_every_step_and_what_was_rejected(page, made):
    choose_setting(page, 1)
    for place, problem in enumerate(made.content["problems"][:12]):
        page.execute_script("document.querySelectorAll('[role=option]')[arguments[0]].click()", place)
        run, at, expected, rejected = problem["runs"][1], 0, [], []
        for action in run["actions"]:
            small, large = problem["nodes"][at]
            taken = large if action == "1" else small
            expected.append(taken["text"])
            rejected += [small] if action == "1" else []
            at = taken.get("next")
        assert written(page, ".step > .text") == expected
        assert written(page, ".rejected del") == [each["text"] for each in rejected]
        authors = texts(page, ".author")
        assert [("L" if "large" in each else "S") for each in authors] == ["SL"[int(a)] for a in run["actions"]]
        facts = spaced(one(page, "#problem-detail .facts").text)
        assert f"{run['large_tokens']} large token" in facts
        assert f"always-large's {problem['large']['large_tokens']}" in facts
        assert ("✓ right" if run["right"] else "✗ wrong") in one(page, "#problem-detail .end").text
        for score, each in zip(texts(page, ".rejected .meter"), rejected, strict=True):
            assert score.endswith(f"{each['score']:.2f}")


@pytest.mark.parametrize("width", [360, 390, 820])
def test_narrow_screens_do_not_scroll_sideways(page, made, width):
    resize(page, width, 800)
    time.sleep(0.3)
    page.execute_script("document.querySelectorAll('details').forEach(e => { e.open = true })")
    for place in range(len(HOSTILE)):
        page.execute_script("document.querySelectorAll('[role=option]')[arguments[0]].click()", place)
        wide = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1] == width
        out = """const limit = innerWidth + 1;
            const kinds = '#problem-detail *, .chart, .controls *, header *' + (innerWidth < 700 ? ', td, th' : '');
            return [...document.querySelectorAll(kinds)]
                .filter(e => e.getBoundingClientRect().right > limit).map(e => e.outerHTML.slice(0, 80))"""
        assert page.execute_script(out) == []
    charts = page.execute_script("return [...document.querySelectorAll('.chart > svg')].map(e => e.clientWidth)")
    assert len(charts) == 3 and max(charts) <= width


def test_colours_follow_the_system_and_the_button(page):
    paper = "return getComputedStyle(document.body).backgroundColor"

    def system(scheme):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    system("light")
    light = page.execute_script(paper)
    system("dark")
    dark = page.execute_script(paper)
    assert light == "rgb(255, 255, 255)" and dark != light
    button = one(page, "#theme")
    button.click()
    assert page.execute_script(paper) == light and "light" in button.get_attribute("aria-label")
    system("light")
    button.send_keys(Keys.ENTER)
    assert page.execute_script(paper) == dark and "dark" in button.text
    page.refresh()
    assert page.execute_script(paper) == dark  # it is remembered
    one(page, "#theme").click()
    assert page.execute_script(paper) == light and "system" in one(page, "#theme").text


def test_columns_are_read_by_keyboard(page, made):
    choose_setting(page, 1)
    found = made.content["settings"][1]["positions"]
    cursor = one(page, "#position-chart .cursor")
    cursor.send_keys(Keys.HOME, Keys.ARROW_RIGHT)
    said = spaced(cursor.get_attribute("aria-valuetext"))
    assert said.startswith("Step 2, ") and f"{found['escalations'][1]} of {found['decisions'][1]} decisions" in said
    one(page, "#position-measure option[value=parts]").click()
    cursor.send_keys(Keys.END)
    said = spaced(cursor.get_attribute("aria-valuetext"))
    assert f"{100 * found['parts'][9][0]:.1f} %" in said and "of all escalations" in said
    cursor = one(page, "#scorer-chart .cursor")
    cursor.send_keys(Keys.END)
    bin_ = made.content["reliability"][0]["bins"][-1]
    said = spaced(cursor.get_attribute("aria-valuetext"))
    assert f"right: {100 * bin_['right'][0]:.1f} %" in said and f"{bin_['count']} case" in said
    ActionChains(page).move_to_element(one(page, "#position-chart .cursor")).perform()
    assert one(page, "#position-chart .tip").is_displayed()


def test_hostile_texts_are_only_text(page, made):
    for place in range(len(made.content["problems"])):
        page.execute_script("document.querySelectorAll('[role=option]')[arguments[0]].click()", place)
        assert page.execute_script("return document.querySelectorAll('main img, main iframe, main script').length") == 0
        question = written(page, "#problem-detail p.question")[0]
        assert question == made.content["problems"][place]["question"]
    assert page.execute_script("return document.styleSheets.length") == 1
    seen = {text for text in HOSTILE if any(text in problem["question"] for problem in made.content["problems"])}
    assert len(seen) == len(HOSTILE)
