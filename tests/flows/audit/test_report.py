"""The report of a version of a real line: as files, and in its run in MLflow."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_end_to_end import plain
from tests.conftest import Three
from tests.flows.test_mlflow_projection import client_of
from tests.shell import Shell


def fields(page: str) -> dict[str, str]:
    """The values on the page, by their path in the JSON."""
    tags = re.findall(r"<[a-z]+ [^>]*data-field=[^>]*>", page)
    pairs = (
        (re.search(f'data-{key}="([^"]*)"', tag) for key in ("field", "value")) for tag in tags
    )
    return {field[1]: value[1] for field, value in pairs if field and value}


def run_of(shell: Shell, version: int) -> Any:
    client = client_of(shell)
    experiment = client.get_experiment_by_name("demo").experiment_id
    (run,) = client.search_runs([experiment], f"tags.`restitch.version` = '{version}'")
    return run


def test_the_page_has_the_numbers_of_show(three: Three, tmp_path: Path) -> None:
    found = three.shell.json("report", "demo", "champion", tmp_path / "out")
    assert found["files"][0] == "report.html"
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    shown = three.shell.json("show", "demo")
    values = fields(page)
    for task, result in shown["results"].items():
        for name in ("base", "finetuned", "grafted", "merged", "normalized"):
            assert values[f"results.{task}.{name}"] == repr(result[name])
        for end in ("low", "high"):
            assert values[f"results.{task}.interval.{end}"] == repr(result["interval"][end])
    for name in ("value", "base", "ratio"):
        assert values[f"retention.{name}"] == repr(shown["retention"][name])
    for act in three.shell.json("history", "demo")["acts"]:
        if 3 in act["versions"]:
            assert act["entry"][:12] in page
    for name in found["files"][1:]:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"<svg ")
    assert {"plots/results.svg", "plots/retention.svg", "plots/jaccard.svg"} <= set(found["files"])


def test_a_file_gets_the_page_without_plots(three: Three, tmp_path: Path) -> None:
    found = three.shell.json("report", "demo", 2, tmp_path / "two.html")
    assert found["files"] == ["two.html"]
    assert [path.name for path in tmp_path.iterdir()] == ["two.html"]
    three.shell("report", "demo", 2, tmp_path)
    assert (tmp_path / "report.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_the_report_is_in_the_run_of_its_version(three: Three) -> None:
    for version in (1, 2, 3):
        run = run_of(three.shell, version)
        files = {one.path for one in client_of(three.shell).list_artifacts(run.info.run_id)}
        assert {"report.html", "plots"} <= files


def test_the_report_in_mlflow_follows_later_acts(three: Three, tmp_path: Path) -> None:
    shutil.copytree(three.shell.home, tmp_path / "home")
    shell = Shell(tmp_path / "home")

    def page(version: int) -> str:
        place = Path(run_of(shell, version).info.artifact_uri.removeprefix("file://"))
        return (place / "report.html").read_text(encoding="utf-8")

    old = page(2)
    shell("rollback", "demo", 2, "--reason", "look-for-this-reason")
    assert "look-for-this-reason" not in old
    assert "look-for-this-reason" in page(2)
    assert "look-for-this-reason" in page(3)


@pytest.mark.usefixtures("without_mlflow")
def test_without_the_masks_only_their_chapter_is_missing(three: Three, tmp_path: Path) -> None:
    shutil.copytree(three.shell.home, tmp_path / "home")
    shell = Shell(tmp_path / "home")
    keys = shell.home / "store" / "keys" / "analysis"
    shutil.rmtree(keys)
    delta = shell.ledger().merged(3).members["colour"].delta
    (shell.home / "store" / "blobs" / delta).unlink()
    done = shell("report", "demo", 3, tmp_path / "page.html")
    assert "the masks of version 3 are not compared" in plain(done.err)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    merged = shell.json("show", "demo")["results"]["colour"]["merged"]
    assert fields(page)["results.colour.merged"] == repr(merged)


@pytest.mark.parametrize(
    ("version", "out", "code", "message"),
    [("9", "out", 3, "no version 9"), ("1", "file/out", 6, "file")],
)
def test_a_wrong_version_or_folder_is_refused(
    three: Three, tmp_path: Path, version: str, out: str, code: int, message: str
) -> None:
    (tmp_path / "file").write_text("")
    done = three.shell("report", "demo", version, tmp_path / out, code=code)
    assert message in plain(done.err)
