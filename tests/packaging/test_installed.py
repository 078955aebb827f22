"""The product as users install it: into an empty environment, outside of the checkout.

`make installed` runs these tests. They install all dependencies, which takes minutes.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.worlds import World

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
DEPLOYMENTS = ROOT / "deployments"
UNIT = DEPLOYMENTS / "systemd" / "restitch.service"
LISTING = "git ls-files -z --cached --others --exclude-standard"

pytestmark = [pytest.mark.installed, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Installed:
    """An environment with restitch in it, and an empty folder to work in."""

    environment: Path
    folder: Path

    def run(self, *command: object, code: int = 0, **variables: str) -> str:
        """Run a program of the environment and return what it prints."""
        surrounding = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        done = subprocess.run(
            [str(self.environment / "bin" / str(command[0])), *map(str, command[1:])],
            cwd=self.folder,
            env=surrounding
            | {"PATH": f"{self.environment / 'bin'}:{os.environ['PATH']}"}
            | {"RESTITCH_HOME": str(self.folder / "home"), "HF_HUB_OFFLINE": "1"}
            | variables,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def restitch(self, *arguments: object, code: int = 0) -> str:
        """Run a command."""
        return self.run("restitch", *arguments, code=code)

    def json(self, *arguments: object) -> Any:
        """Run a command with `--json` and read what it prints."""
        return json.loads(self.restitch(*arguments, "--json"))


def empty_environment(folder: Path) -> Installed:
    """Make an environment that holds nothing but pip."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    (folder / "work").mkdir()
    return Installed(folder / "venv", folder / "work")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, with no build of an earlier day in it."""
    copy = tmp_path_factory.mktemp("sources")
    listed = subprocess.run(LISTING.split(), cwd=ROOT, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(sources)],
        check=True,
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in an environment of its own, with the versions that are tested together."""
    made = empty_environment(tmp_path_factory.mktemp("wheel"))
    torch = next(
        line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch==")
    )
    # Compiling all modules takes longer than installing them, and few are imported.
    made.run("pip", "install", "-q", "--no-compile", "-c", CONSTRAINTS, torch)
    made.run("pip", "install", "-q", "--no-compile", "-c", CONSTRAINTS, wheel)
    return made


def test_the_wheel_holds_restitch_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.partition("/")[0] for name in names}
    assert {f for f in folders if not f.endswith(".dist-info")} == {"restitch"}
    assert {"restitch/py.typed", "restitch/tasks/report/page.html.j2"} <= set(names)
    papers = (ROOT / "examples" / "papers").rglob("*.yaml")
    assert {f"restitch/{file.relative_to(ROOT / 'examples')}" for file in papers} <= set(names)
    sources = {
        f"restitch/{path.relative_to(ROOT)}"
        for package in (
            "merging",
            "modeling",
            "registry",
            "serving",
            "tasks",
            "flows",
            "deployments",
            "cli",
        )
        for path in (ROOT / package).rglob("*.py")
    }
    assert sources <= set(names)


def test_a_line_runs_from_the_wheel(installed: Installed, world: World) -> None:
    """A first line in one process, then the same with servers and a worker."""
    assert re.fullmatch(r"restitch \d+\.\d+\.\d+\S*\n", installed.restitch("--version"))
    assert "register" in installed.restitch("--help")
    assert "clip-b32-8" in installed.restitch("study", "paper", "--help")
    line = world.line(installed.folder / "line.yaml")
    installed.restitch("init", line)
    colour = ("--task", world.task("colour"), "--model", world.model("colour"))
    assert installed.json("register", "demo", *colour)["state"] == "ready"
    assert list(installed.json("show", "demo")["members"]) == ["colour"]
    installed.restitch("export", "demo", "champion", installed.folder / "merged")
    load = "import sys, transformers; transformers.AutoModel.from_pretrained(sys.argv[1])"
    installed.run("python", "-c", load, installed.folder / "merged")
    installed.restitch("verify", "demo")
    installed.restitch("up")
    try:
        number = ("--task", world.task("number"), "--model", world.model("number"))
        assert installed.json("register", "demo", *number, "--wait")["state"] == "ready"
        assert list(installed.json("show", "demo")["members"]) == ["colour", "number"]
    finally:
        installed.restitch("down")
    installed.restitch("verify", "demo")


def with_dependencies_of(installed: Installed, environment: Path) -> None:
    """Let pip find the dependencies in another environment, where they are installed already."""
    (packages,) = environment.glob("lib/python*/site-packages")
    (at_hand,) = installed.environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{at_hand}\n")


@pytest.fixture(scope="module")
def image(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The install lines of the Dockerfile, run in a folder that holds only what it copies."""
    made = empty_environment(tmp_path_factory.mktemp("image"))
    with_dependencies_of(installed, made.environment)
    for keyword, words in instructions(DEPLOYMENTS / "Dockerfile"):
        if keyword == "COPY":
            *sources, target = shlex.split(words)
            for source in sources:
                copied = made.folder / target / ("" if target.endswith("/") else ".")
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, made.folder / target, dirs_exist_ok=True)
                else:
                    copied.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / source, copied)
        elif keyword == "RUN" and "pip install" in words:
            script = made.environment / "bin" / "install"
            script.write_text(f"#!/bin/sh\nset -e\n{words}\n")
            script.chmod(0o755)
            made.run("install")
    return made


def instructions(dockerfile: Path) -> Iterator[tuple[str, str]]:
    """The instructions of a Dockerfile: keyword and arguments, with joined lines."""
    lines = [x for x in dockerfile.read_text().splitlines() if x and not x.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        keyword, _, words = line.partition(" ")
        yield keyword, words.strip()


def test_the_dockerfile_installs_what_compose_and_systemd_start(image: Installed) -> None:
    """Every command of the containers and of the unit file is there and takes its arguments."""
    shutil.rmtree(image.folder / "restitch")  # the installed package is asked, not the copy
    text = (DEPLOYMENTS / "compose.yaml").read_text()
    containers = re.findall(r"command: (\[\"(?:restitch|python)\".*)", text)
    unit = re.findall(r"=/opt/restitch/bin/(.*)", UNIT.read_text())
    commands = [*map(json.loads, containers), *(line.split() for line in unit)]
    assert len(commands) > 5
    for command in commands:
        if command[:2] == ["python", "-m"]:
            image.run("python", "-c", f"import {command[2]}")
        else:
            image.run(*command[:2], "--help")
    assert "restitch" in image.restitch("--version")


def test_the_systemd_page_installs_the_program_of_the_unit(
    installed: Installed, sources: Path, tmp_path: Path
) -> None:
    """Its lines run as they stand, in another folder and with the dependencies at hand."""
    place = tmp_path / "opt"
    lines = [
        line.replace("/opt/restitch", str(place))
        for page in (ROOT / "docs").rglob("*.md")
        for line in page.read_text(encoding="utf-8").splitlines()
        if re.match(r"(python3 -m venv|/opt/restitch/bin/pip install) .*", line)
        and "/opt/restitch" in line
    ]
    assert lines, "no page says how /opt/restitch is filled"
    for line in lines:
        subprocess.run(shlex.split(line), cwd=sources, check=True)
        if " -m venv " in line:
            with_dependencies_of(installed, place)
    program = place / re.findall(r"=/opt/restitch/(bin/\S+)", UNIT.read_text())[0]
    subprocess.run([program, "--version"], cwd=tmp_path, check=True)
