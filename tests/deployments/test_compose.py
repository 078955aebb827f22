"""The team's set-up: its files are right, and every service's command runs and does its work.

There is no Docker here. The file is held against the schema of Compose and against the code;
the services run as processes, with a real PostgreSQL and a bucket.
"""

import json
import re
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from restitch.deployments.server.bucket import prepare
from restitch.deployments.server.definitions import SERVER_ENVIRONMENT, WORKER_ENVIRONMENT
from restitch.deployments.webhook import SECRET_VARIABLE
from restitch.merging.errors import BadInput, Unavailable
from restitch.registry.home import STORE_VARIABLE, Home, prepare_environment
from tests.deployments.compose import (
    FILE,
    FOLDER,
    HOME,
    Team,
    composed,
    example,
    filled_in,
    image_environment,
    services,
    variables_of,
)
from tests.servers import free_port, postgres_programs, postgres_server, s3_server
from tests.shell import ROOT
from tests.worlds import World

OURS = [name for name, one in services().items() if str(one["image"]).startswith("restitch-")]
WORKERS = ("worker-cpu", "worker-gpu")
FERNET_KEY = urlsafe_b64encode(bytes(range(32))).decode()


# --- the files --------------------------------------------------------------------------


def test_the_file_follows_the_schema_of_compose() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", FILE],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_services_wait_only_for_services_with_a_health_check() -> None:
    for name, service in services().items():
        for other, how in service.get("depends_on", {}).items():
            there = services()[other]
            if how["condition"] == "service_healthy":
                assert "healthcheck" in there, f"{name} waits for the health of {other}"
            else:
                assert how["condition"] == "service_completed_successfully"
                # What starts again after it has ended has never ended.
                assert there["restart"] in ("no", "on-failure"), f"{name} waits for {other}"


def test_volumes_are_declared_and_used() -> None:
    used = {
        volume.partition(":")[0]
        for service in services().values()
        for volume in service.get("volumes", ())
    }
    assert {name for name in used if re.match(r"[a-z]", name)} == set(composed()["volumes"])


def test_every_variable_is_in_the_example_and_no_secret_has_a_value() -> None:
    variables = variables_of(services())
    told = example()
    assert set(told) == set(variables)
    for name, default in variables.items():
        assert told[name] == (default or ""), name
    required = {name for name, default in variables.items() if default is None}
    secret = {n for n in variables if re.search("PASSWORD|SECRET|AUTH|KEY", n)}
    assert required == secret


def test_secrets_are_only_in_environments() -> None:
    secret = {name for name, default in variables_of(services()).items() if default is None}
    for name, service in services().items():
        rest = {key: value for key, value in service.items() if key != "environment"}
        assert not secret & set(variables_of(rest)), name


def test_ports_are_published_on_loopback_and_images_have_a_version() -> None:
    for name, service in services().items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name
        tag = str(filled_in(service["image"], {})).partition(":")[2]
        assert re.search(r"\d", tag), f"{name} would change by itself"
        assert "privileged" not in service
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_servers_and_workers_have_the_settings_that_restitch_up_gives_them() -> None:
    server = services()["prefect-server"]["environment"]
    assert SERVER_ENVIRONMENT.items() <= server.items()
    for name in WORKERS:
        worker = services()[name]["environment"]
        assert WORKER_ENVIRONMENT.items() <= worker.items()
        assert STORE_VARIABLE in worker
    for name in ("webhook", "webhook-registration"):
        assert SECRET_VARIABLE in services()[name]["environment"]
    mlflow = services()["mlflow"]["environment"]
    assert {"MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY", "MLFLOW_BACKEND_STORE_URI"} <= set(mlflow)


def test_the_gpu_is_reserved_for_the_worker_of_its_pool() -> None:
    [device] = services()["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    pools = {name: services()[name]["environment"]["RESTITCH_WORK_POOL"] for name in WORKERS}
    assert pools == {"worker-cpu": "cpu", "worker-gpu": "gpu"}
    assert not any("hostname" in service for service in services().values())
    # Only one run at a time has the device.
    assert "--limit 1" in services()["worker-gpu"]["command"][-1]


def test_the_image_sets_the_environment_that_restitch_would_set() -> None:
    expected = prepare_environment(Home(Path(HOME)), {})
    found = image_environment()
    assert found.pop("RESTITCH_HOME") == HOME
    others = {name for name in found if name.startswith(("PIP_", "PYTHON"))}
    assert {k: v for k, v in found.items() if k not in others} == expected


def test_the_image_has_every_package_and_an_unprivileged_user() -> None:
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = set(project["tool"]["setuptools"]["package-dir"].values())
    copied = set(re.findall(r"^COPY (\S+) \1$", text, re.MULTILINE))
    assert copied == folders
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert folders <= {line.removeprefix("!") for line in ignored if line.startswith("!")}
    [user] = re.findall(r"^USER (\S+)$", text, re.MULTILINE)
    assert int(user) > 0
    [python] = re.findall(r"^FROM python:([\d.]+)-", text, re.MULTILINE)
    assert python.count(".") == 2
    assert '".[team]"' in text
    assert "team" in project["project"]["optional-dependencies"]


# --- the bucket -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, s3_url: str) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": s3_url,
        "AWS_ACCESS_KEY_ID": "an-account",
        "AWS_SECRET_ACCESS_KEY": "a-password",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("account")
def test_the_bucket_is_made_once_and_nothing_is_left_in_it() -> None:
    from restitch.registry.s3.client import client

    assert "made" in prepare("s3://one/store")
    assert "exists" in prepare("s3://one/store")
    assert "Contents" not in client().list_objects_v2(Bucket="one")


@pytest.mark.usefixtures("account")
def test_a_server_that_ignores_conditions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from restitch.registry.s3.client import client

    prepare("s3://two/store")
    put = client().put_object

    def careless(*, IfNoneMatch: str = "", IfMatch: str = "", **rest: Any) -> Any:  # noqa: N803
        return put(**rest)

    monkeypatch.setattr(client(), "put_object", careless)
    with pytest.raises(Unavailable, match="ignores conditional writes"):
        prepare("s3://two/store")
    with pytest.raises(BadInput):
        prepare("s3://two")


# --- the services -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """All services, started in the order of the file and each waited for as Docker would."""
    if not postgres_programs():  # CI installs it, and fails where this was left out
        pytest.skip("PostgreSQL is not installed; on Debian: apt-get install postgresql")
    root = tmp_path_factory.mktemp("team")
    ports = {name: free_port() for name in ("PREFECT", "MLFLOW", "WEBHOOK")}
    with ExitStack() as running:
        postgres = running.enter_context(postgres_server("postgres-password"))
        s3 = running.enter_context(s3_server(root / "s3"))
        team = Team(
            root,
            {
                "POSTGRES_PASSWORD": "postgres-password",
                "PREFECT_DATABASE_PASSWORD": "prefect-password",
                "MLFLOW_DATABASE_PASSWORD": "mlflow-password",
                "PREFECT_AUTH": "team:prefect-word",
                "S3_ACCESS_KEY": "an-account",
                "S3_SECRET_KEY": "account-password",
                "WEBHOOK_SECRET": "webhook-secret-of-the-team",
                "WEBHOOK_ENCRYPTION_KEY": FERNET_KEY,
                "POSTGRES_ADDRESS": postgres,
                "S3_URL": s3,
                "GPU_DEVICE": "cpu",
                **{f"{name}_PORT": str(port) for name, port in ports.items()},
                **{f"{name}_ADDRESS": f"127.0.0.1:{port}" for name, port in ports.items()},
            },
        )
        _init(team, postgres)
        _completes(team, "bucket")
        for name in ("prefect-server", "mlflow"):
            running.enter_context(team.started(name))
        team.healthy("prefect-server")
        _completes(team, "deploy")
        running.enter_context(team.started("webhook"))
        workers = {name: {"WORKER_PORT": str(free_port())} for name in WORKERS}
        for name, port in workers.items():
            running.enter_context(team.started(name, **port))
        for name in ("webhook", "mlflow"):
            team.healthy(name)
        _completes(team, "webhook-registration")
        for name, port in workers.items():
            team.healthy(name, **port)
        yield team


def _init(team: Team, postgres: str) -> None:
    """Make the databases with the very script that PostgreSQL's image runs."""
    host, _, port = postgres.partition(":")
    given = filled_in(services()["postgres"]["environment"], team.variables)
    login = {"PGHOST": host, "PGPORT": port, "PGPASSWORD": given["POSTGRES_PASSWORD"]}
    environment = {**team.environment("postgres"), **login}
    script = FOLDER / "postgres" / "init.sh"
    subprocess.run([script], env=environment, check=True, capture_output=True)
    probe = services()["postgres"]["healthcheck"]["test"][1:]
    subprocess.run(probe, env=environment, check=True, capture_output=True)


def _completes(team: Team, service: str) -> None:
    done = team.run(service)
    assert done.returncode == 0, done.stdout + done.stderr


def _get(url: str, **headers: str) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as found:
        return json.loads(found.read())


def _prefect(team: Team, path: str, body: Any) -> Any:
    word = b64encode(team.variables["PREFECT_AUTH"].encode()).decode()
    request = urllib.request.Request(
        f"http://{team.variables['PREFECT_ADDRESS']}/api{path}",
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Basic {word}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as found:
        return json.loads(found.read())


def _keys(team: Team, prefix: str) -> list[str]:
    script = (
        "import boto3, json, sys; found = boto3.client('s3').list_objects_v2(Bucket='restitch', "
        "Prefix=sys.argv[1]); print(json.dumps([o['Key'] for o in found.get('Contents', [])]))"
    )
    found: list[str] = json.loads(team.run("bucket", "python", "-c", script, prefix).stdout)
    return found


@pytest.mark.servers
def test_doctor_finds_every_service_healthy(team: Team) -> None:
    done = team.run("worker-cpu", "restitch", "doctor", "--json")
    found = {one["name"]: one for one in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0, found
    wrong = {name for name, one in found.items() if one["status"] != "ok"}
    assert wrong <= {"disk"}, found
    assert found["deployment onboard"]["found"] == "pool gpu"
    assert found["deployment remerge"]["found"] == "pool cpu"
    assert found["mlflow webhook"]["status"] == "ok"


@pytest.mark.servers
def test_one_shot_services_may_run_again(team: Team) -> None:
    again = team.run("deploy", *team.command("deploy"), "--json")
    assert json.loads(again.stdout)["changes"] == []
    assert "unchanged" in team.run("webhook-registration").stdout
    assert "exists" in team.run("bucket").stdout


@pytest.mark.servers
def test_prefect_requires_the_password(team: Team) -> None:
    url = f"http://{team.variables['PREFECT_ADDRESS']}/api/admin/version"
    with pytest.raises(urllib.error.HTTPError) as refused:
        _get(url)
    assert refused.value.code == 401


@pytest.mark.servers
def test_mlflow_keeps_artifacts_in_the_bucket_and_checks_host_names(team: Team) -> None:
    script = (
        "import mlflow\nwith mlflow.start_run() as run:\n mlflow.log_text('of the team', 'a.txt')\n"
        "print(mlflow.artifacts.load_text(run.info.artifact_uri + '/a.txt'))"
    )
    done = team.run("webhook", "python", "-c", script)  # it has no account of the bucket
    assert "of the team" in done.stdout, done.stderr
    assert [key for key in _keys(team, "mlflow/") if key.endswith("/a.txt")]
    url = (
        f"http://{team.variables['MLFLOW_ADDRESS']}/api/2.0/mlflow/experiments/get?experiment_id=0"
    )
    assert _get(url, Host="mlflow:5000")
    with pytest.raises(urllib.error.HTTPError) as refused:
        _get(url, Host="elsewhere.example")
    assert refused.value.code == 403


@pytest.mark.servers
@pytest.mark.slow
def test_a_registration_goes_through_both_pools_to_the_champion(
    team: Team, world: World, tmp_path: Path
) -> None:
    def restitch(*words: object) -> Any:
        done = team.run("worker-cpu", "restitch", *words, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    restitch("init", world.line(tmp_path / "line.yaml"))
    files = ("--task", world.task("colour"), "--model", world.model("colour"))
    restitch("register", "demo", *files, "--wait", "--timeout", 150)
    assert restitch("show", "demo")["version"] == 1
    # The champion is there a little before the run that has made it has ended.
    completed: set[tuple[str, str]] = set()
    deadline = time.monotonic() + 60
    while not completed >= {("/", "gpu"), ("", "cpu")}:
        assert time.monotonic() < deadline, completed
        time.sleep(0.2)
        completed = {
            (run["name"].partition("/")[1], run["work_pool_name"])
            for run in _prefect(team, "/flow_runs/filter", {})
            if run["state_type"] == "COMPLETED"
        }
    assert "store/lines/demo/head.json" in _keys(team, "store/lines/")
    # No secret of the team is in what its servers and workers have written.
    secrets = [team.variables[n] for n, value in variables_of(services()).items() if value is None]
    for log in team.root.glob("*.log"):
        text = log.read_text(errors="replace")
        assert not [secret for secret in secrets if secret in text], log.name
