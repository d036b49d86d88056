"""Figures are written once: pages quote the results files that they cite."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "results" / "README.md"


def tables_of(text):
    """Tables of a Markdown text: the text before, and by first cell and column the other cells."""
    for found in re.finditer(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in found[0].splitlines())
        yield text[: found.start()], {row[0]: dict(zip(header[1:], row[1:], strict=False)) for row in rows}


def links_of(page, text):
    files = [(page.parent / name).resolve() for name in re.findall(r"\]\(([\w./-]+\.md)[#)]", text)]
    return [file for file in files if file.parent.name == "results"]


def numbers_of(text):
    return [float(number.replace(",", "")) for number in re.findall(r"[-+]?\d[\d,]*(?:\.\d+)?", text)]


QUOTED = [
    (page, before.rsplit("\n\n", 2)[1], table) for page in PAGES for before, table in tables_of(page.read_text("utf-8"))
]
QUOTED = [each for each in QUOTED if links_of(each[0], each[1])]


@pytest.mark.parametrize(("page", "before", "table"), QUOTED, ids=lambda each: getattr(each, "name", ""))
def test_a_table_says_what_its_results_file_says(page, before, table):
    compared = 0
    for file in links_of(page, before):
        for _, source in tables_of(file.read_text("utf-8")):
            for name in table.keys() & source.keys():
                for column in table[name].keys() & source[name].keys():
                    if numbers := numbers_of(table[name][column]):
                        assert numbers == numbers_of(source[name][column]), (page.name, name, column)
                        compared += 1
    assert compared >= len(table)


def test_there_are_such_tables():
    assert {page.name for page, _, _ in QUOTED} >= {"README.md", "routers.md"}


def sections():
    parts = re.split(r"^## ", RESULTS.read_text("utf-8"), flags=re.MULTILINE)[1:]
    return [part for part in parts if links_of(RESULTS, part)]


@pytest.mark.parametrize("section", sections(), ids=lambda each: each.splitlines()[0])
def test_figures_in_words_are_those_of_the_file(section):
    """Figures of four digits or more after the point, which are copied; shorter ones may be bounds and differences."""
    there = [number for file in links_of(RESULTS, section) for number in numbers_of(file.read_text("utf-8"))]
    for text in re.findall(r"\d+\.\d{4,}", section):
        digits = len(text.split(".")[1])
        assert any(abs(abs(number) - float(text)) <= 0.5001 * 10**-digits for number in there), text


def test_the_readme_says_what_the_quickstart_found():
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    (routed, simple) = re.search(
        r"recovers? 80 % of the gap .* with (\d+) % of .* thresholds need (\d+) %", text
    ).groups()
    table = next(table for _, table in tables_of(RESULTS.read_text("utf-8")) if "16 thresholds" in table)
    for said, name in ((routed, "`ppo-agg`"), (simple, "16 thresholds")):
        assert float(said) == round(numbers_of(table[name]["CPT(80 %)"])[0])
