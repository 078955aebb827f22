"""The files around the code: licence, hooks, workflow."""

import hashlib
import re
import tomllib

import pytest
import yaml

from tests.shell import ROOT

APACHE_2_0 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def test_the_licence_is_the_whole_text_of_apache_2() -> None:
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2_0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (project["license"], project["license-files"]) == ("Apache-2.0", ["LICENSE"])


def test_the_workflow_runs_the_targets_of_ci() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step.get("run", "") for step in workflow["jobs"]["test"]["steps"]]
    ours = re.findall(r"^make (\w+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert [step.removeprefix("make ") for step in steps if step.startswith("make ")] == ours
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in ours)


@pytest.mark.parametrize("mark", ["servers", "installed"])
def test_a_suite_of_its_own_lies_in_the_folder_that_its_target_collects(mark: str) -> None:
    recipe = (ROOT / "Makefile").read_text().partition(f"\n{mark}: setup\n")[2]
    folder = ROOT / recipe.partition("\n\n")[0].split()[-1]
    marked = [p for p in (ROOT / "tests").rglob("test_*.py") if f"mark.{mark}" in p.read_text()]
    assert marked
    assert [path for path in marked if not path.is_relative_to(folder)] == []


def test_hooks_fetch_nothing() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repository["repo"] for repository in hooks["repos"]] == ["local"]
    assert all(hook["language"] == "system" for hook in hooks["repos"][0]["hooks"])


def test_the_changelog_has_a_section_for_what_is_not_released() -> None:
    assert "\n## Unreleased\n" in (ROOT / "CHANGELOG.md").read_text()
