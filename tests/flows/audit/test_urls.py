"""Addresses of a version: MLflow is asked with credentials, and addresses have none."""

import json
import threading
from base64 import b64encode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from restitch.flows.audit.urls import links, mlflow_run

DIGEST = "ab" * 32


class FakeMlflow:
    """A server that records its requests and their logins."""

    def __init__(self) -> None:
        self.logins: list[str | None] = []
        self.searched: list[object] = []
        self.runs = [{"info": {"run_id": "run-1"}}]
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer({"experiment": {"experiment_id": "7"}})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                fake.searched.append(json.loads(body))
                self._answer({"runs": fake.runs} if fake.runs else {})

            def _answer(self, found: object) -> None:
                fake.logins.append(self.headers.get("Authorization"))
                data = json.dumps(found).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.server.server_port}"


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMlflow]:
    fake = FakeMlflow()
    thread = threading.Thread(target=fake.server.serve_forever)
    thread.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{fake.place}")
    yield fake
    fake.server.shutdown()
    thread.join()
    fake.server.server_close()


def test_the_run_of_a_version_is_found_by_its_digest(mlflow: FakeMlflow) -> None:
    found = mlflow_run("demo", DIGEST)
    assert found is not None
    assert found.startswith(f"http://{mlflow.place}/#/experiments/7/runs/run-1")
    (search,) = mlflow.searched
    assert search == {
        "experiment_ids": ["7"],
        "filter": f"tags.`restitch.digest` = '{DIGEST}'",
    }


def test_a_login_in_the_address_is_used_but_not_shown(
    mlflow: FakeMlflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:secret-word@{mlflow.place}")
    found = links("demo", DIGEST, {})["mlflow"]
    assert found is not None
    assert "secret-word" not in found
    assert set(mlflow.logins) == {f"Basic {b64encode(b'ann:secret-word').decode()}"}


@pytest.mark.parametrize(
    ("variables", "login"),
    [
        ({"MLFLOW_TRACKING_TOKEN": "a-token"}, "Bearer a-token"),
        (
            {"MLFLOW_TRACKING_USERNAME": "ann", "MLFLOW_TRACKING_PASSWORD": "word"},
            f"Basic {b64encode(b'ann:word').decode()}",
        ),
    ],
)
def test_a_login_in_mlflows_variables_is_used(
    mlflow: FakeMlflow, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], login: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert mlflow_run("demo", DIGEST) is not None
    assert set(mlflow.logins) == {login}


def test_a_run_that_is_not_there_yet_has_no_address(mlflow: FakeMlflow) -> None:
    mlflow.runs = []
    assert mlflow_run("demo", DIGEST) is None


@pytest.mark.parametrize(
    "address", ["http://user:word@127.0.0.1:9", "http://[bad", "sqlite:///mlflow.db"]
)
def test_a_server_that_does_not_answer_gives_no_link(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert links("demo", DIGEST, {"flow_run": "one"})["mlflow"] is None
