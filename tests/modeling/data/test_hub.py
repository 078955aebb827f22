"""Rows on the hub mean the same as in a folder, with and without a network."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from restitch.merging.errors import BadInput
from restitch.modeling.data.hub import HubTable
from restitch.modeling.data.images import image_bytes
from tests.hub_server import FakeHub, fake_hub
from tests.modeling.conftest import png

# Endpoints are read at import: one process with a network, one without, and one with half a cache.
CODE = """
import json, os
from restitch.merging.errors import RestitchError
from restitch.modeling.data.task_data import TaskData, data_digest
from restitch.registry.specs.data import DataSpec

def read(path, split, modality):
    data = TaskData(DataSpec(path=path, test=split), ("no", "yes"), modality)
    try:
        rows = data.rows("test")
        inputs = [rows[n].inputs[0] for n in range(len(rows))]
        shown = inputs if modality == "text" else [[i.mode, *i.size] for i in inputs]
        return [shown, rows.targets.tolist(), data_digest(data.spec)]
    except RestitchError as error:
        return [type(error).__name__, str(error)]

print(json.dumps([read(*one) for one in json.loads(os.environ["ASKED"])]))
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
REPOS: dict[str, dict[str, bytes]] = {
    "me/tsv": {"data/test.tsv": f"text\tlabel\n{LINES}".encode()},
    "me/jsonl": {"data/test.jsonl": JSON_LINES.encode()},
    "me/csv": {"test.csv": b"text,label\nNone,yes\n,no\n3.0,yes\n"},
    "me/names": {"README.md": README, "test.csv": b"text,label\na,0\nb,1\n"},
    "me/images": {"test/no/a.png": png(1), "test/yes/b.png": png(2)},
    "me/toy": {
        "data/train.jsonl": b'{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n',
        "data/test.jsonl": b'{"text": "c", "label": 1}\n',
        "owner_script.py": b"raise SystemExit('ran')",
    },
}
ROWS = {
    "me/tsv": [QUOTES, [0, 1, 0, 1, 0]],
    "me/jsonl": [QUOTES, [0, 1, 0, 1, 0]],
    "me/csv": [["None", "", "3.0"], [1, 0, 1]],
    "me/names": [["a", "b"], [1, 0]],  # the names of the classes decide
    "me/images": [[["RGB", 20, 16]] * 2, [0, 1]],
    "me/toy": [["c"], [1]],
}
REFUSED = {
    ("me/csv", "test[:1]"): "name a whole split",
    ("me/toy", "dev"): "'train', 'test'",
    ("me/toy:large", "test"): "Available: ['default']",
    ("me/other", "test"): "no data set me/other",
}
UNKNOWN = "a" * 40


@dataclass(frozen=True)
class Reading:
    """What is read from one hub, by repository and split.

    Attributes:
        online: with a network.
        offline: then without one; `requests` must stay empty.
        half: with a network again, after the cache of the hub was deleted, and that of `datasets`
            was not.
        files: the paths of the rows' files that were fetched.
    """

    commits: dict[str, str]
    online: dict[tuple[str, str], Any]
    offline: dict[tuple[str, str], Any]
    half: dict[tuple[str, str], Any]
    files: list[str]
    requests: list[str]


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reading]:
    cache = tmp_path_factory.mktemp("hub")
    with fake_hub() as hub:
        commits = {repo: hub.commit(repo, REPOS[repo], kind="datasets") for repo in REPOS}
        all_rows = [(repo, "test") for repo in REPOS]
        online = read(hub, cache, commits, [*all_rows, *REFUSED])
        files = [asked for asked in hub.requests if asked.endswith(".jsonl")]
        hub.requests.clear()
        commits["me/never"] = UNKNOWN
        offline = read(hub, cache, commits, [*all_rows, ("me/never", "test")], HF_HUB_OFFLINE="1")
        requests = list(hub.requests)
        shutil.rmtree(cache / "hub")
        half = read(hub, cache, commits, all_rows)
        yield Reading(commits, online, offline, half, files, requests)


def read(
    hub: FakeHub,
    cache: Path,
    commits: dict[str, str],
    asked: list[tuple[str, str]],
    **variables: str,
) -> dict[tuple[str, str], Any]:
    """Read splits of repositories at their commits, in a process of its own."""
    requests = []
    for repo, split in asked:
        modality = "image" if repo == "me/images" else "text"
        # A commit that was never fetched of a repository that was.
        path = "me/toy" if repo == "me/never" else repo
        commit = commits.get(repo, commits["me/toy"])
        requests.append([f"{path}@{commit}", split, modality])
    ran = hub.run_python(CODE, cache, ASKED=json.dumps(requests), **variables)
    assert ran.returncode == 0, ran.stderr
    return dict(zip(asked, json.loads(ran.stdout), strict=True))


@pytest.mark.parametrize("repo", ROWS)
def test_rows_are_read_as_in_a_folder(reading: Reading, repo: str) -> None:
    assert reading.online[repo, "test"][:2] == ROWS[repo]


@pytest.mark.parametrize("repo", ROWS)
def test_rows_are_the_same_offline_and_with_half_of_the_caches(reading: Reading, repo: str) -> None:
    found = reading.online[repo, "test"]
    assert reading.offline[repo, "test"] == found
    assert reading.half[repo, "test"] == found
    assert reading.requests == []


@pytest.mark.parametrize("asked", REFUSED, ids=" ".join)
def test_what_the_hub_lacks_is_named(reading: Reading, asked: tuple[str, str]) -> None:
    kind, message = reading.online[asked]
    assert kind == "BadInput"
    assert REFUSED[asked] in message


def test_a_split_is_read_at_its_commit_and_never_another(reading: Reading) -> None:
    commit = reading.commits["me/toy"]
    digest = reading.online["me/toy", "test"][2]
    assert digest["splits"]["test"]["revision"] == commit
    toy = [path for path in reading.files if "/me/toy/" in path]
    assert toy
    assert all(f"/resolve/{commit}/" in path for path in toy)
    # `datasets` alone would take the cached commit, not the requested one.
    kind, message = reading.offline["me/never", "test"]
    assert kind == "Unavailable"
    assert f"commit {UNKNOWN}" in message


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
