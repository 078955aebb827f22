"""Imports go one way only, every room is described, and nobody runs code from a model's folder."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each package may import itself and the packages in its row.
PACKAGES = {
    "merging": set(),
    "modeling": {"merging", "registry"},
    "registry": {"merging"},
    "serving": {"merging", "modeling", "registry"},
    "tasks": {"merging", "modeling", "registry", "serving"},
    "flows": {"merging", "modeling", "registry", "serving", "tasks"},
    "deployments": {"merging", "modeling", "registry", "serving", "tasks", "flows"},
    "cli": {"merging", "modeling", "registry", "serving", "tasks", "flows", "deployments"},
}

# Each room may import itself, the files at the root of its package, and the rooms in its row.
# The row of a package is for the files at its root.
ROOMS = {
    "merging": set(),
    "merging.numerics": set(),
    "merging.files": {"numerics"},
    "merging.adapters": {"numerics", "files"},
    "merging.ranking": {"numerics", "files"},
    "merging.localize": {"numerics", "files", "ranking"},
    "merging.rules": {"numerics", "files", "ranking", "localize"},
    "merging.statistics": {"files", "ranking", "localize", "rules"},
    "merging.experts": {"numerics", "files", "ranking", "rules"},
    "merging.methods": {"numerics", "files", "ranking", "rules", "statistics", "experts"},
    "merging.analysis": {"numerics", "files", "ranking", "rules", "localize"},
    "modeling": {"data", "families"},
    "modeling.data": set(),
    "modeling.families": {"data"},
    "registry": {"store", "s3"},
    "registry.store": set(),
    "registry.s3": {"store"},
    "registry.gates": set(),
    "registry.specs": {"gates"},
    "registry.ledger": {"store", "specs", "gates"},
    "registry.mlflow": {"store", "specs", "ledger"},
    "registry.sources": {"store", "s3", "specs", "ledger", "mlflow"},
    "registry.maintenance": {"store", "ledger"},
    "serving": set(),
    "tasks": {"runtime", "inputs"},
    "tasks.runtime": set(),
    "tasks.inputs": {"runtime"},
    "tasks.report": set(),
    "tasks.research": {"runtime", "inputs"},
    "flows": {"promotion", "audit", "lines", "research"},
    "flows.promotion": set(),
    "flows.api": {"promotion", "audit", "lines", "research", "storage"},
    "flows.audit": {"promotion"},
    "flows.lines": {"audit"},
    "flows.research": {"promotion", "lines"},
    "flows.research.study": {"promotion", "research"},
    "flows.storage": {"promotion", "audit", "research"},
    "deployments": set(),
    "deployments.server": set(),
    "deployments.local": {"server"},
    "cli": {"commands", "render"},
    "cli.commands": {"render"},
    "cli.render": set(),
}
# Of registry, modeling uses the descriptions of heads and data and nothing else.
MODELING_MAY_USE = {"registry.specs"}
MERGING_MAY_USE = {"torch", "numpy", "safetensors", "blake3"} | set(sys.stdlib_module_names)
ENGINE = "prefect"
# Packages without code: files that the product reads.
DATA = {"restitch.papers": "examples/papers"}
# Folders of the checkout that use the product and are no part of it.
OUTSIDE = ("playground", "benchmarks", "tests")


def modules(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, each with what it takes from a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in modules(*PACKAGES)}


def ours(path: Path) -> Iterator[str]:
    """The modules of the product that a file imports, without `restitch.`."""
    for name in imported(path):
        first, _, rest = name.partition(".")
        if first == "restitch" and rest:
            while rest not in NAMES and "." in rest:
                rest = rest.rpartition(".")[0]
            if rest in NAMES:
                yield rest


def room_of(module: str) -> str:
    """The deepest room that a module lies in."""
    path = NAMES[module]
    return ".".join(path.parent.relative_to(ROOT).parts)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_imported_one_way(package: str) -> None:
    files = modules(package)
    assert files
    for path in files:
        others = {name.partition(".")[0] for name in ours(path)} - {package}
        assert others <= PACKAGES[package], f"{path} imports {sorted(others - PACKAGES[package])}"


def test_modeling_sees_only_the_specs_of_registry() -> None:
    for path in modules("modeling"):
        rooms = {room_of(name) for name in ours(path) if name.startswith("registry")}
        assert rooms <= MODELING_MAY_USE, f"{path} imports {sorted(rooms - MODELING_MAY_USE)}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_a_package_are_imported_one_way(room: str) -> None:
    package = room.partition(".")[0]
    allowed = {package, room} | {f"{package}.{name}" for name in ROOMS[room]}
    for path in (ROOT / Path(*room.split("."))).glob("*.py"):
        inside = {room_of(name) for name in ours(path) if name.partition(".")[0] == package}
        assert inside <= allowed, f"{path} imports {sorted(inside - allowed)}"


def test_every_room_is_listed_and_described() -> None:
    rooms = {room_of(name) for name in NAMES}
    assert rooms == ROOMS.keys()
    for room in rooms:
        text = (ROOT / Path(*room.split(".")) / "__init__.py").read_text(encoding="utf-8")
        summary, _, more = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")
        assert summary, f"{room}: say what is in it"
        assert more, f"{room}: say who imports it"


def test_no_two_files_import_each_other() -> None:
    graph = {name: set(ours(path)) - {name} for name, path in NAMES.items()}
    # A package's own `__init__` is not a step on the way to one of its modules.
    TopologicalSorter(graph).prepare()


def test_nothing_is_imported_past_the_package() -> None:
    for path in modules(*PACKAGES, *OUTSIDE):
        bare = {name.partition(".")[0] for name in imported(path)} & PACKAGES.keys()
        assert not bare, f"{path} imports {sorted(bare)} without `restitch.`"
    for path in modules(*PACKAGES):
        outside = {name.partition(".")[0] for name in imported(path)} & set(OUTSIDE)
        assert not outside, f"{path} imports {sorted(outside)}, which the wheel does not hold"


def test_the_wheel_lists_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    setuptools = listed["tool"]["setuptools"]
    rooms = {f"restitch.{room}" for room in ROOMS}
    assert set(setuptools["packages"]) == {"restitch", *DATA, *rooms}
    folders = setuptools["package-dir"]
    code = {f"restitch.{name}": name for name in PACKAGES}
    assert folders == {"restitch": "restitch"} | DATA | code


def test_the_image_has_every_folder_of_the_package() -> None:
    copied = (ROOT / "deployments" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    for folder in ("restitch", *PACKAGES, *DATA.values()):
        assert f"COPY {folder} {folder}" in copied


def test_merging_needs_only_tensors() -> None:
    for path in modules("merging"):
        foreign = {name.partition(".")[0] for name in imported(path)} - MERGING_MAY_USE
        assert foreign <= {"restitch"}, f"{path} imports {sorted(foreign)}"


@pytest.mark.parametrize("package", ["modeling", "registry", "serving"])
def test_the_engine_stays_out_of_the_lower_packages(package: str) -> None:
    for path in modules(package):
        assert ENGINE not in {name.partition(".")[0] for name in imported(path)}, str(path)


def test_only_the_runtime_of_steps_sends_notifications() -> None:
    users = [
        p for p in modules(*PACKAGES) if any(n.partition(".")[0] == "apprise" for n in imported(p))
    ]
    assert {path.relative_to(ROOT).parent for path in users} == {Path("tasks/runtime")}


def test_remote_code_is_never_trusted() -> None:
    for path in modules(*PACKAGES, *OUTSIDE):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), str(path)
                assert node.value.value is False, str(path)
