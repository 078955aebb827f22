"""Rows on the hub mean the same as in a folder, with and without a network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from restitch.merging.errors import BadInput
from restitch.modeling.data.hub import HubTable
from restitch.modeling.data.images import image_bytes
from tests.modeling.conftest import png
from tests.modeling.hub_server import hub

# In a process of its own, for endpoints are read at import.
CODE = """
import json, sys
from restitch.merging.errors import RestitchError
from restitch.modeling.data.task_data import TaskData
from restitch.registry.specs.task import DataSpec
path, split, modality = sys.argv[1:]
data = TaskData(DataSpec(path=path, test=split), ("no", "yes"), modality)
try:
    rows = data.rows("test")
    inputs = [rows[n].inputs[0] for n in range(len(rows))]
    shown = inputs if modality == "text" else [[i.mode, *i.size] for i in inputs]
    print(json.dumps([shown, rows.targets.tolist()]))
except RestitchError as error:
    print(json.dumps(str(error)))
"""
README = b"""---
dataset_info:
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': 'yes'
          '1': 'no'
---
"""
QUOTES = ['" a', "None", 'b "', "007", "2020-01-01"]
LINES = "".join(f"{text}\t{n % 2}\n" for n, text in enumerate(QUOTES))
JSON_LINES = "".join(json.dumps({"text": t, "label": n % 2}) + "\n" for n, t in enumerate(QUOTES))
CSV_LINES = "text,label\nNone,yes\n,no\n3.0,yes\n"


def read(
    files: dict[str, bytes],
    cache: Path,
    split: str = "test",
    modality: str = "text",
    *,
    twice: bool = False,
) -> Any:
    """What is read with a network; `twice` reads it without one, too, and with half of the caches.

    The cache of the hub is deleted for that, and the one of `datasets` stays.
    """
    found: list[Any] = []
    with hub("me/toy", files) as server:
        for offline in ("0", "1", "0") if twice else ("0",):
            if len(found) == 2:
                shutil.rmtree(cache / "hub")
            environment = {
                **os.environ,
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
                "HF_HOME": str(cache),
                "HF_DATASETS_CACHE": str(cache / "datasets"),
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_OFFLINE": offline,
            }
            arguments = [f"me/toy@{server.commit}", split, modality]
            ran = subprocess.run(
                [sys.executable, "-c", CODE, *arguments],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert ran.returncode == 0, ran.stderr
            found.append(json.loads(ran.stdout))
    assert all(one == found[0] for one in found)
    return found[0]


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("data/test.tsv", f"text\tlabel\n{LINES}", [QUOTES, [0, 1, 0, 1, 0]]),
        ("data/test.jsonl", JSON_LINES, [QUOTES, [0, 1, 0, 1, 0]]),
        ("test.csv", CSV_LINES, [["None", "", "3.0"], [1, 0, 1]]),
    ],
)
def test_text_files_are_read_as_in_a_folder(tmp_path, name, data, expected):
    assert read({name: data.encode()}, tmp_path, twice=name.endswith("tsv")) == expected


def test_names_of_classes_in_the_description_decide(tmp_path):
    files = {"README.md": README, "test.csv": b"text,label\na,0\nb,1\n"}
    assert read(files, tmp_path) == [["a", "b"], [1, 0]]


def test_a_part_of_a_split_in_text_files_is_refused(tmp_path):
    found = read({"test.csv": CSV_LINES.encode()}, tmp_path, split="test[:1]")
    assert "name a whole split" in found


def test_images_in_folders_of_classes_are_read(tmp_path):
    files = {"test/no/a.png": png(1), "test/yes/b.png": png(2)}
    assert read(files, tmp_path, modality="image", twice=True) == [[["RGB", 20, 16]] * 2, [0, 1]]


@pytest.mark.parametrize("path", ["/etc/hostname", "{cache}/../secret.png", "secret.png"])
def test_a_table_on_the_hub_names_no_file_outside_of_the_cache(tmp_path, monkeypatch, path):
    import datasets
    from huggingface_hub import constants

    (tmp_path / "secret.png").write_bytes(png(0))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    image = {"bytes": None, "path": path.format(cache=tmp_path / "cache")}
    features = datasets.Features({"image": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"image": [image]}, features)
    table = HubTable("here", dataset, tmp_path / "cache" / "snapshot")
    (value,) = table.row(0, ("image",))
    with pytest.raises(BadInput, match=r"outside of the folder|cannot be read"):
        image_bytes(value, table.root, "here")
