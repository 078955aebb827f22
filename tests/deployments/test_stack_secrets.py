"""Planted secrets are in nothing that the servers and workers of `restitch up` write."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from tests.deployments.conftest import Stack, running_stack
from tests.hostile.test_secrets import SECRETS, leaks
from tests.worlds import World

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, world: World) -> Iterator[Stack]:
    """A stack whose every process has the secrets in its environment."""
    planted = {name: value for name, value in SECRETS.items() if not name.startswith("PREFECT_")}
    with running_stack(tmp_path_factory.mktemp("stack"), world, **planted) as found:
        yield found


def test_logs_databases_and_records_hold_none_of_them(stack: Stack) -> None:
    home = stack.shell.home
    stack.line("demo")
    shown = [
        stack.process(
            *("register", "demo", "--task", stack.world.task("colour")),
            *("--model", stack.world.model("colour"), "--wait"),
        ),
        stack.process("doctor", code=None),
    ]
    # A worker that fails, and deliveries with the right secret in the wrong places.
    deployment = stack.prefect.deployment("onboard/restitch")
    assert deployment is not None
    nothing = {"line": "demo", "task": "nothing", "version": 9}
    run = stack.prefect.create_run(deployment["id"], nothing, "fails")
    assert stack.finished(str(run["id"]))["state_type"] == "FAILED"
    own = (home / "secrets" / "webhook-secret").read_text()
    for header in ("X-MLflow-Signature", "Authorization", "X-MLflow-Delivery-Id"):
        request = urllib.request.Request(
            str(stack.file.webhook_url), json.dumps({"x": own}).encode(), {header: own}
        )
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(request)
    logs = {path.name for path in (home / "logs").glob("*.log")}
    assert logs == {
        f"{name}.log" for name in ("prefect", "mlflow", "webhook", "worker-1", "worker-2")
    }
    keys = {path.name: path.read_text() for path in (home / "secrets").iterdir()}
    assert {"webhook-secret", "webhook-encryption-key"} <= keys.keys()
    found = leaks(home, shown, {**SECRETS, **keys})
    assert [place for place in found if " in secrets/" not in place] == []
