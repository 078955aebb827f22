"""Secrets in the environment and in addresses never reach files or output.

Secrets are set, commands succeed or fail, and then all files of the home, the database and
artifacts of MLflow, all exports and all output are searched for them, also in the encodings of
addresses, JSON and headers.
"""

import base64
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, quote_plus
from xml.sax.saxutils import escape

import pytest

from restitch.registry.redaction import without_credentials
from tests.conftest import NewHome
from tests.shell import Done, Shell
from tests.worlds import World

# With characters that addresses, JSON and shells encode differently.
PASSWORD = 'pl4nted/pass+word="1&%'
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAPL4NTED000000001",
    "AWS_SECRET_ACCESS_KEY": "pl4nted/aws+secret=0002",
    "AWS_SESSION_TOKEN": "pl4nted//session==0003",
    "RESTITCH_WEBHOOK_SECRET": "pl4nted webhook secret 0004",
    "MLFLOW_TRACKING_PASSWORD": "pl4nted-mlflow-password-0005",
    "MLFLOW_TRACKING_TOKEN": "pl4nted-mlflow-token-0006",
    "PREFECT_API_KEY": "pnu_pl4nted0007",
    "PREFECT_API_AUTH_STRING": "admin:pl4nted-prefect-0008",
    "HF_TOKEN": "hf_pl4nted0009",
}
# The parts of an address that notifications are sent to.
NOTIFY = {"the user": "pl4ntedUser0010", "the token": "Pl4ntedToken0011", "the key": "pl4nted-0012"}
EVERY_EVENT = ["promoted", "rejected", "held", "quarantined", "rolled-back", "drop", "crashes"]


def notify_address(host: str) -> dict[str, str]:
    """The environment with an address that has secrets in every part."""
    user, token, key = NOTIFY.values()
    password = quote(PASSWORD, safe="")
    address = f"json://{user}:{password}@{host}/hooks/{token}?key={key}&+X-Token={key}"
    return {"RESTITCH_NOTIFY_URLS": f"slack://{token} {address}"}


class Echo(BaseHTTPRequestHandler):
    """A server that refuses every request, and repeats the request in its answer."""

    def _refuse(self) -> None:
        headers = " ".join(f"{name}: {value}" for name, value in self.headers.items())
        message = f"you sent {self.path} {headers} {self._basic()}"
        if "AWS4" in headers:
            body = f"<Error><Code>AccessDenied</Code><Message>{escape(message)}</Message></Error>"
        else:
            body = json.dumps({"error_code": "PERMISSION_DENIED", "message": message})
        self.send_response(403, "Forbidden")
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())

    def _basic(self) -> str:
        given = self.headers.get("Authorization", "")
        if not given.startswith("Basic "):
            return ""
        return base64.b64decode(given.removeprefix("Basic ")).decode()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = _refuse  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def echo() -> Iterator[str]:
    """Host and port of an `Echo` server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def forms(secret: str) -> Iterator[bytes]:
    """All encodings of a secret."""
    texts = {secret, quote(secret, safe=""), quote(secret), quote_plus(secret), repr(secret)[1:-1]}
    texts |= {json.dumps(secret)[1:-1], secret.partition(":")[2] or secret}
    for text in texts:
        yield text.encode()
    for text in (secret, f"user:{secret}", f":{secret}"):
        for cut in range(3):  # any position within the encoded text
            yield base64.b64encode(text.encode()[cut:])[4:-4]


def found_in(data: bytes, secrets: Mapping[str, str]) -> list[str]:
    return [name for name, secret in secrets.items() if any(f in data for f in forms(secret))]


def leaks(root: Path, shown: list[Done], secrets: Mapping[str, str]) -> list[str]:
    places = [
        f"{name} in {file.relative_to(root)}"
        for file in root.rglob("*")
        if file.is_file() and not file.is_symlink()
        for name in found_in(file.read_bytes(), secrets)
    ]
    for done in shown:
        text = f"{done.out}\n{done.err}".replace("\n", "")  # messages are wrapped
        for form in (text, f"{done.out}\n{done.err}"):
            places += [f"{name} in {text[:300]}" for name in found_in(form.encode(), secrets)]
    return places


@pytest.mark.parametrize("place", ["file", "wrapped"])
@pytest.mark.parametrize("how", ["as it is", "in an address", "in a header"])
def test_the_search_finds_planted_secrets(tmp_path: Path, place: str, how: str) -> None:
    text = {
        "as it is": f"a {PASSWORD} b",
        "in an address": f"http://user:{quote(PASSWORD, safe='')}@host",
        "in a header": base64.b64encode(f"user:{PASSWORD}".encode()).decode(),
    }[how]
    shown = []
    if place == "file":
        (tmp_path / "log").write_text(text)
    else:
        shown = [Done(0, "", text[: len(text) // 2] + "\n" + text[len(text) // 2 :])]
    assert leaks(tmp_path, shown, {"it": PASSWORD})


@pytest.mark.parametrize(
    "text",
    [
        f"connecting to postgresql://u:{PASSWORD}@db/x failed",
        f"fe_sendauth: no password supplied, tried {PASSWORD}",
        f"GET /x?p={quote(PASSWORD, safe='')}&q=1",
        f"Authorization: Basic {base64.b64encode(f'u:{PASSWORD}'.encode()).decode()}",
        "{'Authorization': 'Bearer pl4nted-mlflow-token-0006', 'X': 1}",
        "Credential=AKIAPL4NTED000000001/20260101/us-east-1",
        "the token hf_pl4nted0009 is not valid",
        "user admin, pl4nted-prefect-0008",
    ],
)
def test_known_secrets_are_redacted_in_messages(text: str) -> None:
    address = f"postgresql://u:{PASSWORD}@db/x"  # not even quoted
    environment = {**SECRETS, "MLFLOW_TRACKING_URI": address}
    redacted = without_credentials(text, environment)
    assert "***" in redacted
    assert found_in(redacted.encode(), {**SECRETS, "it": PASSWORD}) == []
    assert without_credentials(redacted, environment) == redacted


def test_messages_without_secrets_stay_unchanged() -> None:
    text = "s3://bucket/key at http://host:1/x is not authorized: user@example.org, key a=b"
    assert without_credentials(text, {"AWS_ACCESS_KEY_ID": "x", **SECRETS}) == text


def test_successful_commands_write_no_secret(
    world: World, new_home: NewHome, tmp_path: Path, echo: str
) -> None:
    shell = Shell(new_home("home").home, {**SECRETS, **notify_address(echo)})
    shown = [
        shell("init", world.line(tmp_path / "line.yaml", notify=EVERY_EVENT)),
        shell(
            *("register", "demo", "--task", world.task("colour")),
            *("--model", world.model("colour"), "--here"),
        ),
        shell("remerge", "demo"),
        shell("pin", "demo", "--reason", "for the test"),
        shell("verify", "demo"),
        shell("export", "demo", "champion", tmp_path / "out"),
        shell("report", "demo", "champion", tmp_path / "report.html"),
        shell("doctor", code=None),
        shell("status", "demo", "--json"),
        shell("history", "demo", "--json"),
    ]
    assert (tmp_path / "home" / "mlflow.db").stat().st_size > 100_000
    assert "a notification was not sent" in shown[1].err
    assert leaks(tmp_path, shown, {**SECRETS, **NOTIFY, "the password": PASSWORD}) == []


# ADDRESS contains a user and a password.
BROKEN = {
    "MLflow": {"MLFLOW_TRACKING_URI": "http://ADDRESS"},
    "Prefect": {"PREFECT_API_URL": "http://ADDRESS/api"},
    "bucket": {"RESTITCH_STORE": "s3://bucket/x", "AWS_ENDPOINT_URL": "http://ADDRESS"},
    "store": {"RESTITCH_STORE": "gs://ADDRESS/x"},
    "database": {"MLFLOW_TRACKING_URI": "postgresql+nothing://ADDRESS/mlflow"},
    "hub": {"HF_ENDPOINT": "http://ADDRESS"},
}


@pytest.mark.parametrize("how", ["away", "refusing"])
@pytest.mark.parametrize("case", BROKEN)
def test_failing_commands_write_no_secret(
    world: World, new_home: NewHome, tmp_path: Path, echo: str, case: str, how: str
) -> None:
    host = echo if how == "refusing" else "127.0.0.1:1"  # a port without a server
    address = f"user:{quote(PASSWORD, safe='')}@{host}"
    broken = {name: value.replace("ADDRESS", address) for name, value in BROKEN[case].items()}
    good = new_home("home")
    good("init", world.line(tmp_path / "line.yaml", retention=None))
    quick = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "AWS_MAX_ATTEMPTS": "1"}
    shell = Shell(good.home, {**SECRETS, **broken, **quick})
    task = ("--task", world.task("colour"), "--model", world.model("colour"))
    shown = [
        shell("init", tmp_path / "line.yaml", code=None),
        shell("register", "demo", *task, code=None),
        shell("register", "demo", *task[:2], "--model", "org/name", code=None),
        shell("remerge", "demo", code=None),
        shell("verify", "demo", code=None),
        shell("report", "demo", "champion", tmp_path / "report.html", code=None),
        shell("doctor", code=None),
        shell("webhook", "--register", f"http://{address}/webhook", code=None),
    ]
    assert any(done.code for done in shown)
    assert leaks(tmp_path, shown, {**SECRETS, "the password": PASSWORD}) == []
