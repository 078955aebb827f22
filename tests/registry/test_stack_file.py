"""The stack file is replaced atomically, and an unreadable one means that nothing runs."""

import json
from pathlib import Path

import pytest

from restitch.registry.home import Home
from restitch.registry.stack import FILE, StackFile, StackProcess

PROCESS = StackProcess(pid=7, began=1.5, port=4200, log="/logs/prefect.log", serves="digest")
STACK = StackFile(
    prefect_api_url="http://127.0.0.1:4200/api",
    mlflow_uri="http://127.0.0.1:5000",
    webhook_url="http://127.0.0.1:4280/webhook",
    ports={"prefect": 4200},
    processes={"prefect": PROCESS},
)


def test_the_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    STACK.write(tmp_path / "home")
    assert StackFile.read(tmp_path / "home") == STACK
    StackFile().write(tmp_path / "home")
    assert StackFile.read(tmp_path / "home") == StackFile()
    assert [path.name for path in (tmp_path / "home").iterdir()] == [FILE]


def test_a_write_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    STACK.write(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("restitch.registry.stack.json.dump", full)
    with pytest.raises(OSError, match="No space left"):
        StackFile().write(tmp_path)
    assert StackFile.read(tmp_path) == STACK


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"prefect_api_url": 7}', '{"processes": {"prefect": {}}}'),
        json.dumps({"ports": {"prefect": "many"}}),
        "\udcff",
    ],
)
def test_an_unreadable_file_means_that_nothing_is_running(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_bytes(text.encode(errors="surrogateescape"))
    assert StackFile.read(tmp_path) == StackFile()


def test_a_missing_file_means_that_nothing_is_running(tmp_path: Path) -> None:
    assert StackFile.read(tmp_path / "nowhere") == StackFile()


def test_keys_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({**STACK.model_dump(), "colour": "red"}))
    assert StackFile.read(tmp_path) == STACK


def test_the_home_uses_the_mlflow_server_while_the_stack_is_up(tmp_path: Path) -> None:
    surroundings = {"RESTITCH_HOME": str(tmp_path)}
    assert Home.from_environment(surroundings).mlflow_uri == f"sqlite:///{tmp_path}/mlflow.db"
    STACK.write(tmp_path)
    assert Home.from_environment(surroundings).mlflow_uri == "http://127.0.0.1:5000"
    named = {**surroundings, "MLFLOW_TRACKING_URI": "http://mlflow.team"}
    assert Home.from_environment(named).mlflow_uri == "http://mlflow.team"
    StackFile(ports=STACK.ports).write(tmp_path)
    assert Home.from_environment(surroundings).mlflow_uri == f"sqlite:///{tmp_path}/mlflow.db"
