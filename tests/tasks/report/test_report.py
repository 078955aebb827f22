"""The report as HTML: structure, numbers, escaping and reproducible bytes."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from restitch.tasks.report import Report, ReportInput, render
from tests.shell import ROOT
from tests.tasks import report_data as data

SVG = "http://www.w3.org/2000/svg"
VOID = {"meta", "link", "br", "img", "input", "hr"}
CASES = {
    "full": data.report_input,
    "one version of one member": lambda: data.report_input(data.task_names(1), 1),
    "sixty members": lambda: data.report_input(data.task_names(60), 100),
    "bare": data.bare_input,
    "whole task vectors": data.whole_input,
    "no members": lambda: replace(data.bare_input(()), analysis=data.analysis(())),
    "hostile": data.hostile_input,
}

MASKS = {f"{name}.svg" for name in ("jaccard", "cosine", "layers", "components", "owners")}


class Page(HTMLParser):
    """A strict HTML parser: every element must be closed, in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open
        assert self._open.pop() == tag

    def handle_data(self, text: str) -> None:
        if self._open:
            self.texts.append((self._open[-1], text))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of all elements of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        """The visible text with single spaces."""
        text = "".join(text for tag, text in self.texts if tag != "style")
        return re.sub(r"\s+", " ", text)

    @property
    def numbers(self) -> Iterator[tuple[str, str]]:
        """Path and full value of every number."""
        for attributes in self.all("span"):
            if "data-field" in attributes:
                yield str(attributes["data-field"]), str(attributes["data-value"])


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a JSON value with its path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def leaves(found: ReportInput) -> dict[str, Any]:
    """All that a number on the page may name."""
    rest = {"versions": found.versions, "changes": found.changes}
    rest |= {"acts": found.acts, "analysis": found.analysis}
    return dict(flat({**found.version, **json.loads(json.dumps(rest))}))


@dataclass(frozen=True)
class Case:
    """A report with its input."""

    found: ReportInput
    report: Report
    page: Page

    @property
    def html(self) -> str:
        """The page's text."""
        return self.report.html


@cache
def rendered(name: str) -> Case:
    """One of the cases; each is rendered once."""
    found = CASES[name]()
    report = render(found)
    return Case(found, report, Page(report.html))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return rendered(request.param)


@pytest.fixture
def full() -> Case:
    return rendered("full")


def test_every_number_equals_the_one_in_the_json(case: Case) -> None:
    found, page = case.found, case.page
    known = leaves(found)
    numbers = list(page.numbers)
    assert numbers
    for field, value in numbers:
        assert field in known, field
        assert json.dumps(known[field]) == value, field


def test_whole_task_vectors_are_not_shown_as_masks(full: Case) -> None:
    whole = rendered("whole task vectors")
    assert "there are no masks to compare" in whole.page.text
    assert {"cosine.svg"} == {n for n in full.report.plots if n in MASKS} & {*whole.report.plots}
    assert "no masks" not in full.page.text
    assert {*full.report.plots} >= MASKS


def test_the_page_has_all_measured_values(full: Case) -> None:
    found, page = full.found, full.page
    shown = {field for field, _ in page.numbers}
    measured = (
        "results.",
        "retention.",
        "gates.",
        "timings.",
        "mean_",
        "facts.tournament.contestants.",
        "specialists.bytes.",
        "kept",
        "patch_bytes",
    )
    for field, value in leaves(found).items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if field.startswith(measured) and is_number:
            assert field in shown, field


def test_the_table_of_versions_has_every_value_of_each(full: Case) -> None:
    shown = {field for field, _ in full.page.numbers}
    for place, version in enumerate(full.found.versions):
        for name in ("mean_accuracy", "mean_normalized", "retention", "general"):
            if version[name] is not None:
                assert f"versions.{place}.{name}" in shown
    heads = [text for tag, text in full.page.texts if tag == "th"]
    assert "general ability" in heads
    assert not [head for head in heads if head.startswith("top-")]


def test_numbers_have_one_format(full: Case) -> None:
    written = re.findall(r'data-value="([^"]+)">([^<]+)</span>', full.html)
    assert len(written) > 500
    for value, text in written:
        assert re.fullmatch(r"-?(\d{1,3}(,\d{3})*|\d{1,4}\.\d{4}|\d\.\de-\d\d)", text), text
        assert float(text.replace(",", "")) == pytest.approx(float(value), abs=5e-5, rel=0.05)


def test_the_page_is_valid_html_with_unique_ids_and_valid_links(case: Case) -> None:
    found, page, html = case.found, case.page, case.html
    assert html.lstrip().startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]
    assert [text for tag, text in page.texts if tag == "h1"]
    title = f"{found.version['line']}, version {found.version['version']}"
    assert ("title", title) in page.texts
    ids = [str(attributes["id"]) for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids)), "identifiers of plots are unique"
    for attributes in page.all("a"):
        target = str(attributes["href"])
        assert target.startswith("https://mlflow.example") or target[1:] in ids


def test_tables_have_captions_headers_and_full_rows(case: Case) -> None:
    tables = re.findall(r"<table>.*?</table>", case.html, re.DOTALL)
    assert tables
    for table in tables:
        one = Page(table)
        assert len(one.all("caption")) == 1
        assert all(header.get("scope") in ("col", "row") for header in one.all("th"))
        columns = sum(header["scope"] == "col" for header in one.all("th"))
        assert columns > 1
        for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL):
            cells = Page(row)
            assert len(cells.all("th")) + len(cells.all("td")) == columns


def test_every_plot_has_a_title_and_a_description(full: Case) -> None:
    page, report = full.page, full.report
    assert set(report.plots) == {
        *("results.svg", "retention.svg", "tradeoff.svg", "jaccard.svg", "cosine.svg"),
        *("layers.svg", "components.svg", "owners.svg"),
    }
    drawn = page.all("svg")
    assert len(drawn) == len(report.plots)
    for picture in drawn:
        assert picture["role"] == "img"
        named = str(picture["aria-labelledby"]).split()
        parts = {a["id"]: tag for tag, a in page.elements if a.get("id") in named}
        assert [parts[name] for name in named] == ["title", "desc"]
    descriptions = [text for tag, text in page.texts if tag == "desc"]
    assert any("eurosat" in text and "Merged" in text for text in descriptions)


def test_a_plot_in_a_file_of_its_own_needs_nothing_of_the_page(case: Case) -> None:
    for name, drawn in case.report.plots.items():
        root = ElementTree.fromstring(drawn.decode())
        assert root.tag == f"{{{SVG}}}svg", name
        assert float(root.attrib["width"]) > 0
        assert float(root.attrib["height"]) > 0
        background = root.find(f"{{{SVG}}}rect")
        assert background is not None
        assert background.attrib == {"width": "100%", "height": "100%", "fill": "white"}
        assert b"var(--" not in drawn, "variables are the page's"
        assert b"<script" not in drawn


def test_plots_use_the_colours_of_the_page(full: Case) -> None:
    html = full.html
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) <= {"#ffffff"}, "white on the strong cells"
    style = html[html.index("<style>") : html.index("</style>")]
    for name in set(re.findall(r"var\(--([a-z]+)\)", drawn)):
        assert style.count(f"--{name}: ") >= (1 if name in ("font", "width") else 3), name


def test_the_page_has_no_scripts_and_loads_nothing(case: Case) -> None:
    page, html = case.page, case.html
    policy = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    tags = {tag for tag, _ in page.elements}
    assert not tags & {
        "script",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "img",
        "foreignobject",
    }
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "action", "data"):
            target = attributes.get(name)
            if target is not None and tag != "a":
                assert re.match(r"#|data:(image/png;base64)?,", target), (tag, target[:80])
    style = html[html.index("<style>") : html.index("</style>")]
    assert "@import" not in style
    assert not re.search(r"url\((?!#)", html)


def test_text_from_others_is_escaped() -> None:
    page = rendered("hostile").page
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.text.count("<script>alert('task')</script>") > 20
    assert "</pre><script>alert('recipe')</script>" in page.text
    assert "{{ 7 * 7 }} {% raw %}" in page.text
    assert "javascript:alert('link')" in page.text
    assert not [a for a in page.all("a") if "javascript" in str(a["href"])]


def test_the_summary_compares_with_the_previous_champion(full: Case) -> None:
    page = full.page
    for message in (
        "This is the champion, the version in use. It merges 12 finetuned models.",
        "it is ▲ better on 3, ▼ worse on 2, = same on 3, unknown on 3 of 11 tasks that both have.",
        "Compared with version 29, the previous champion: Joined: svhn 1. Left: emnist 2.",
        "Replaced: cars 1 by 2. Same model with another mask: cifar100 1.",
        "▲ better: cars by 0.0312 (0.0212 to 0.0412), flowers102 by 0.0312",
        "keeps 0.9712 of the base's accuracy on imagenet (95 % interval 0.9600 to 0.9824).",
        "max_task_drop (cars) FAILED (warning only) with 0.0310 (limit 0.0200)",
    ):
        assert message in page.text, message


def test_missing_values_are_reported_as_missing() -> None:
    page = rendered("bare").page
    assert rendered("bare").report.plots == {}
    for message in (
        "neither the champion nor a candidate",
        "There is no previous champion to compare it with.",
        "Retention was not measured.",
        "The line has no gates.",
        "no data: not evaluated",
        "There are no acts on this version.",
    ):
        assert message in page.text, message
    fields = {field for field, _ in page.numbers}
    assert not [f for f in fields if f.startswith(("results.", "retention.", "mean_"))]


def test_a_long_history_lists_only_the_newest_versions() -> None:
    page = rendered("sixty members").page
    assert "The newest 60 of 100 versions, newest first" in page.text
    shown = [field for field, _ in page.numbers if re.fullmatch(r"versions\.\d+\.version", field)]
    assert len(shown) == 60


def test_the_same_input_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    script = (
        "import hashlib, sys\n"
        "from restitch.tasks.report import render\n"
        "from tests.tasks import report_data as data\n"
        "found = render(data.report_input(data.task_names(5), 6))\n"
        "whole = found.html.encode() + b''.join(found.plots.values())\n"
        "print(hashlib.sha256(whole).hexdigest(), 'matplotlib.pyplot' in sys.modules)\n"
    )
    # A user's own style and another hash seed reach nothing.
    (tmp_path / "matplotlibrc").write_text("font.size: 30\naxes.grid: True\nsvg.fonttype: path\n")
    another = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1", "MATPLOTLIBRC": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | another, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    here = render(data.report_input(data.task_names(5), 6))
    whole = here.html.encode() + b"".join(here.plots.values())
    assert done.stdout.split() == [hashlib.sha256(whole).hexdigest(), "False"]


def test_rendering_does_not_change_matplotlib_or_its_input() -> None:
    import matplotlib as mpl

    found = data.report_input(data.task_names(3), 4)
    before, settings = json.dumps(found.version), dict(mpl.rcParams)
    first = render(found)
    assert dict(mpl.rcParams) == settings
    assert json.dumps(found.version) == before
    assert render(found) == first
