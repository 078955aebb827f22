"""Run the notebooks while mkdocs builds the site, and make a page of each with its outputs.

mkdocs calls the function at the end (`hooks` in mkdocs.yml). The notebooks in docs/notebooks/ have
no outputs. A cell that fails fails the build. `mkdocs serve` runs a notebook again when it changes.
"""

import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

NOTEBOOKS = sorted((Path(__file__).parent / "notebooks").glob("*.ipynb"))
CELL_SECONDS = 300


@cache
def executed(name: str, text: str) -> tuple[str, dict[str, bytes]]:
    """Run a notebook in a folder of its own, without the network.

    Args:
        name: its file's name without the suffix.
        text: the content of the file.

    Returns:
        Its page, and the files that the page shows by their paths relative to it.
    """
    notebook = nbformat.reads(text, as_version=4)
    with TemporaryDirectory(prefix="restitch-notebook-") as folder:
        place = {"metadata": {"path": folder}}
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            resources=place,
            extra_arguments=["--log-level=ERROR"],  # a build without warnings prints nothing
        )
        # One thread, as in the tests: the models are small.
        client.execute(env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    for cell in notebook.cells:
        if cell.cell_type == "code":  # messages and warnings are no results
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    resources = {"unique_key": name, "output_files_dir": f"{name}_files"}
    exporter = MarkdownExporter(preprocessors=[CoalesceStreamsPreprocessor])
    page, made = exporter.from_notebook_node(notebook, resources)
    return page, made["outputs"]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page of each notebook."""
    for path in NOTEBOOKS:
        page, images = executed(path.stem, path.read_text(encoding="utf-8"))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
        for name, data in images.items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))
    return files
