"""Imports go one way only, and nobody runs code from a model's folder."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each package may import itself and what stands in its row.
ALLOWED = {
    "merging": set(),
    "modeling": {"merging"},
    "registry": {"merging"},
    "tasks": {"merging", "modeling", "registry"},
    "flows": {"merging", "modeling", "registry", "tasks"},
    "deployments": {"merging", "modeling", "registry", "tasks", "flows"},
    "cli": {"merging", "modeling", "registry", "tasks", "flows", "deployments"},
    "playground": {*("merging", "modeling", "registry", "tasks", "flows", "cli", "deployments")},
    "benchmarks": {
        *("merging", "modeling", "registry", "tasks", "flows", "cli", "deployments", "playground")
    },
}
MERGING_MAY_USE = {"torch", "numpy", "safetensors", "blake3"} | set(sys.stdlib_module_names)
ONLY_FOR_FLOWS = {"prefect"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    roots = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            roots.add((node.module or "").split(".")[0])
    return roots


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package: str) -> None:
    files = modules(package)
    assert files
    for path in files:
        others = (imported(path) & ALLOWED.keys()) - {package}
        assert others <= ALLOWED[package], f"{path} imports {sorted(others - ALLOWED[package])}"


def test_merging_needs_only_tensors() -> None:
    for path in modules("merging"):
        foreign = imported(path) - MERGING_MAY_USE - {"merging"}
        assert not foreign, f"{path} imports {sorted(foreign)}"


@pytest.mark.parametrize("package", ["modeling", "registry"])
def test_the_engine_stays_out_of_the_lower_layers(package: str) -> None:
    for path in modules(package):
        assert not imported(path) & ONLY_FOR_FLOWS, str(path)


def test_remote_code_is_never_trusted() -> None:
    for package in ALLOWED:
        for path in modules(package):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                    assert isinstance(node.value, ast.Constant), str(path)
                    assert node.value.value is False, str(path)
