"""The pages: links lead somewhere, and the code on the guides runs. `make site` builds them."""

import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from mkdocs.exceptions import PluginError

import restitch
from tests.docs.site import DOCS, generator
from tests.shell import ROOT, Shell
from tests.worlds import World

TOP = {path.name for path in ROOT.iterdir() if path.is_dir()}
NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))
PAGES = sorted(
    [*DOCS.rglob("*.md"), *NOTEBOOKS, *ROOT.glob("*.md"), ROOT / "deployments" / "kubernetes.md"]
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    generated = {DOCS / path for path in generator().PAGES}
    generated |= {path.with_suffix(".md") for path in NOTEBOOKS}
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            path = Path(os.path.normpath(page.parent / target))
            assert path.exists() or path in generated, target


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"([\w/.-]+\.md)$", text.partition("\nnav:")[2], re.MULTILINE))
    written = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    run = {str(page.relative_to(DOCS).with_suffix(".md")) for page in NOTEBOOKS}
    assert listed == written | run | set(generator().PAGES)


def test_a_page_that_loads_a_script_from_elsewhere_fails_the_build() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_path="index.md"))
    check = generator().on_post_page
    own = '<script src="assets/a.js"></script><a href="https://example.com/page">page</a>'
    assert check(own, page, None) == own
    with pytest.raises(PluginError, match=r"index\.md loads https://cdn\.example\.com/x\.js"):
        check(own + '<script src="https://cdn.example.com/x.js"></script>', page, None)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_has_no_outputs(notebook: Path) -> None:
    """`make site` runs it, and shows it with the outputs of that run."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


def test_the_guide_to_methods_works(tmp_path: Path) -> None:
    page = (DOCS / "how-to" / "add-a-method.md").read_text(encoding="utf-8")
    method, test = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "farthest.py").write_text(method, encoding="utf-8")
    # The page's file lies in the folder that is scanned. Here, the test imports it.
    (tmp_path / "test_farthest.py").write_text(f"import farthest\n{test}", encoding="utf-8")
    run_pytest(tmp_path)


def test_the_guide_to_gates_works(tmp_path: Path) -> None:
    page = (DOCS / "how-to" / "add-a-gate.md").read_text(encoding="utf-8")
    gate, test = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "min_mean.py").write_text(gate, encoding="utf-8")
    # As above; GATES is made when the folder is scanned.
    (tmp_path / "test_min_mean.py").write_text(
        f"import min_mean\n{test}\n"
        "from restitch.registry.gates import registry\n"
        "registry.GATES = {**registry.GATES, 'min_mean': min_mean.MinMean()}\n",
        encoding="utf-8",
    )
    run_pytest(tmp_path)


@pytest.mark.usefixtures("without_mlflow")
def test_the_guide_to_python_works(
    world: World, shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every block of the page, in order."""
    for name in ("colour", "number"):
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / "models" / name).symlink_to(world.model(name))
    (tmp_path / "models" / "base").symlink_to(world.base)
    (tmp_path / "data").symlink_to(world.root / "data")
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "how-to" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    with shell.inside(), redirect_stdout(StringIO()) as printed:
        for block in blocks:
            exec(block, names)
    lines = printed.getvalue().splitlines()
    assert {"colour ready 1", "number ready 2"} <= set(lines)
    assert "there is no line 'photos'" in lines
    assert any(line.startswith("writing exported: ") for line in lines)
    champion = names["champion"]
    assert isinstance(champion, restitch.Version)
    assert champion.number == 2


def run_pytest(folder: Path) -> None:
    """Run the tests in a folder, in a process of their own: they register methods and families."""
    # A folder of its own: the shared one of all runs is cleaned up first, which can take long.
    own = ("--basetemp", folder / "temporary")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *own, folder],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page: Path) -> None:
    made_by_the_reader = ("farthest.py", "min_mean.py", "short_text.py")
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:\w+/)+(?:[\w.]+\.(?:py|yaml))?)`", text):
        if not name.endswith(made_by_the_reader) and name.split("/")[0] in TOP:
            assert (ROOT / name).exists(), name
