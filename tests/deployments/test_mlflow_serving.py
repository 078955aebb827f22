"""`mlflow models serve` answers for the champion of each kind of line, on loopback."""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.error import HTTPError, URLError

import pytest
from mlflow import MlflowClient

from restitch.serving.mlflow_model import model_files
from tests.servers import free_port
from tests.serving.test_mlflow_model import version_of

pytestmark = pytest.mark.servers

# One kind answers in each run. The others have their answers in tests/serving/test_mlflow_model.py.
KINDS = (
    "causal-lm",
    *(
        pytest.param(kind, marks=pytest.mark.slow)
        for kind in ("clip", "text-encoder", "text-classifier")
    ),
)


def registered(kind: str, root: Path) -> str:
    """Register a version of a family as the champion; returns the address of MLflow."""
    version = version_of(kind, root)
    address = f"sqlite:///{root / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=address, registry_uri=address)
    experiment = client.create_experiment("demo", artifact_location=(root / "artifacts").as_uri())
    run = client.create_run(experiment).info.run_id
    folder = root / "model"
    folder.mkdir()
    for name, data in model_files(version).items():
        (folder / name).write_bytes(data)
    client.log_artifacts(run, str(folder), "restitch")
    client.create_registered_model("demo")
    client.create_model_version("demo", source=f"runs:/{run}/restitch", run_id=run)
    client.set_registered_model_alias("demo", "champion", "1")
    return address


@contextlib.contextmanager
def serving(root: Path, address: str) -> Iterator[str]:
    """Serve the champion with MLflow's command; yields the address of the server."""
    port = free_port()
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": address,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = ("models", "serve", "-m", "models:/demo@champion", "--env-manager", "local")
    with (root / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *command, "-p", str(port)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            with contextlib.suppress(URLError, ConnectionError):
                urllib.request.urlopen(f"{url}/ping", timeout=5).close()
                break
            assert server.poll() is None, (root / "serve.log").read_text()
            time.sleep(0.5)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, 15)
        server.wait(30)


def ask(url: str, request: bytes) -> Any:
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"{url}/invocations", request, headers)
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return json.load(answer)["predictions"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_server_answers_for_the_champion(kind: str, tmp_path: Path) -> None:
    with patch.dict(os.environ, {"RESTITCH_HOME": str(tmp_path / "home")}):
        address = registered(kind, tmp_path)
        with serving(tmp_path, address) as url:
            example = (tmp_path / "model" / "serving_input_example.json").read_bytes()
            (own,) = ask(url, example)
            columns = json.loads(example)["dataframe_split"]
            request: dict[str, Any] = {"dataframe_split": columns, "params": {"task": "colour"}}
            if kind == "causal-lm":
                assert own.keys() == {"text"}
                request["dataframe_split"] = {"columns": ["text"], "data": [["one"]]}
            (found,) = ask(url, json.dumps(request).encode())
            assert found.keys() == {"label", "score", "scores"}
            assert found["label"] in found["scores"]
            request["params"]["task"] = "color"
            with pytest.raises(HTTPError) as refused:
                ask(url, json.dumps(request).encode())
            assert refused.value.code == 400
            assert "did you mean 'colour'" in refused.value.read().decode()
