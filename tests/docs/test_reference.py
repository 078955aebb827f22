"""The generated reference is complete."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import restitch
import restitch.cli.main  # the commands
from restitch.cli.app import app
from restitch.merging.methods.registry import method_names
from restitch.registry.specs.base import Spec
from restitch.registry.specs.line import LineSpec
from restitch.registry.specs.task import TaskSpec
from tests.docs.site import DOCS, generator
from tests.shell import ROOT

PRODUCT = ("merging", "modeling", "registry", "serving", "tasks", "flows", "deployments", "cli")


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return generator()


def test_every_command_has_a_section(reference: ModuleType) -> None:
    page = reference.commands()
    for one in app.registered_commands:
        if not one.hidden:
            assert one.callback is not None
            name = one.name or one.callback.__name__.replace("_", "-")
            assert f"\n## restitch {name}\n" in page
    for group in app.registered_groups:
        assert group.typer_instance is not None
        assert f"\n## restitch {group.typer_instance.info.name} " in page


@pytest.mark.parametrize(("kind", "spec"), [("line", LineSpec), ("task", TaskSpec)])
def test_every_key_is_described(reference: ModuleType, kind: str, spec: type[Spec]) -> None:
    page = reference.keys(kind)
    assert set(spec.model_fields) <= set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    for row in re.findall(r"^\| `.*", page, re.MULTILINE):
        assert row.rsplit("|", 2)[1].strip(), f"no meaning: {row}"


def test_every_method_is_in_the_table_of_settings(reference: ModuleType) -> None:
    page = reference.method_settings()
    assert re.findall(r"^\| `([\w-]+)`", page, re.MULTILINE) == method_names()


def test_every_exit_code_is_explained(reference: ModuleType) -> None:
    page = reference.exit_codes()
    codes = re.findall(r"^\| `(\d+)`", page, re.MULTILINE)
    assert codes == ["0", "2", "3", "4", "5", "6", "7", "130"]


def test_every_public_name_is_explained(reference: ModuleType) -> None:
    page = reference.python()
    for name in restitch.__all__:
        assert f"\n## restitch.{name}\n" in page
    for name in ("create", "register", "champion", "history"):
        assert f"\n### Line.{name}\n" in page
    assert "Line.register(task: Path | TaskSpec" in page
    assert "- `model`: a folder, a hub id or an address." in page
    assert "restitch.flows" not in page


def test_the_variables_are_those_of_the_code() -> None:
    table = yaml.safe_load((DOCS / "environment.yaml").read_text(encoding="utf-8"))
    known = {one["name"] for variables in table.values() for one in variables}
    used = {name for file in _sources() for name in re.findall(r"RESTITCH_[A-Z0-9_]+", file)}
    assert {name for name in known if name.startswith("RESTITCH_")} == used


def _sources() -> Iterator[str]:
    files: list[Path] = []
    for package in PRODUCT:
        for suffix in ("*.py", "*.yaml", "Dockerfile", "*.service"):
            files += (ROOT / package).rglob(suffix)
    return (file.read_text(encoding="utf-8") for file in files)
