"""The pages for operators match the code."""

import ast
import asyncio
import inspect
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock
from uuid import uuid4

import pytest
import yaml
from jsonschema import Draft7Validator

from restitch.cli.commands import lines, operations
from restitch.deployments.local.doctor import VERSIONS
from restitch.deployments.server.definitions import WORKER_ENVIRONMENT, automations
from tests.deployments.compose import FOLDER, services
from tests.shell import ROOT

OPERATIONS = ROOT / "docs" / "operations.md"
KUBERNETES = FOLDER / "kubernetes.md"
INDEXED_JOB = FOLDER / "kubernetes-indexed-job.yaml"
TEMPLATE = FOLDER / "kubernetes-job-template.json"


def words(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def warnings() -> list[str]:
    """The longest fixed piece of each warning in the code that runs unattended."""
    found = []
    for package in ("flows", "tasks", "deployments"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id == "warn"
                    and isinstance(node.args[0], ast.JoinedStr)
                ):
                    pieces = [
                        str(part.value).strip(" :(")
                        for part in node.args[0].values
                        if isinstance(part, ast.Constant)
                    ]
                    found.append(max(pieces, key=len))
    return [piece for piece in found if len(piece) > 4]


def test_there_are_warnings_to_explain() -> None:
    assert len(warnings()) >= 10


@pytest.mark.parametrize("piece", warnings())
def test_every_warning_is_explained(piece: str) -> None:
    start = words(piece).split(",")[0].split(";")[0]
    assert start in words(OPERATIONS.read_text(encoding="utf-8"))


def test_every_automation_and_check_is_explained() -> None:
    page = words(OPERATIONS.read_text(encoding="utf-8"))
    for wanted in automations(uuid4(), uuid4()):
        if "registered model" not in wanted.name and "new mask" not in wanted.name:
            assert f"`{wanted.name}`" in page
    for name in ("python", "home", "disk", "store", "device", *(name for name, *_ in VERSIONS)):
        assert f"`{name}`" in page


def test_the_objects_for_kubernetes_give_workers_what_compose_gives_them() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", KUBERNETES.read_text(encoding="utf-8"), re.DOTALL)
    objects = [each for block in blocks for each in yaml.safe_load_all(block)]
    by_kind = {each["kind"]: each for each in objects}
    [container] = by_kind["Deployment"]["spec"]["template"]["spec"]["containers"]
    own = {each["name"]: each.get("value") for each in container["env"]}
    assert WORKER_ENVIRONMENT.items() <= own.items()
    names = {*own, *by_kind["Secret"]["stringData"], *by_kind["ConfigMap"]["data"]}
    composed = services()["worker-gpu"]
    assert names >= set(composed["environment"]) - {"HF_TOKEN"}
    assert container["image"].startswith("restitch-gpu:")
    flags = set(re.findall(r"--[a-z-]+", composed["command"][-1]))
    assert flags == set(re.findall(r"--[a-z-]+", container["args"][0]))


def test_the_job_template_for_kubernetes_gives_a_job_with_a_gpu_and_the_settings_of_workers() -> (
    None
):
    template = json.loads(TEMPLATE.read_text(encoding="utf-8"))
    variables = template["variables"]["properties"]
    Draft7Validator.check_schema(template["variables"])
    defaults = {name: one["default"] for name, one in variables.items() if "default" in one}
    Draft7Validator(template["variables"]).validate(defaults)
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    assert used == set(variables)

    job = asyncio.run(rendered(template))
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["terminationGracePeriodSeconds"] == 60
    mounted = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    assert mounted["/var/lib/restitch/cache"] == "cache"
    assert {one["name"] for one in pod["volumes"]} == set(mounted.values())
    own = {each["name"]: each.get("value") for each in container["env"]}
    of_workers = dict(WORKER_ENVIRONMENT)
    del of_workers["PREFECT_WORKER_QUERY_SECONDS"]  # of the worker that makes the Jobs
    assert of_workers.items() <= own.items()
    assert {"RESTITCH_WORK_POOL": "gpu", "RESTITCH_DEVICE": "cuda"}.items() <= own.items()
    assert {"RESTITCH_WORKER", "PREFECT__FLOW_RUN_ID"} <= own.keys()
    page = KUBERNETES.read_text(encoding="utf-8")
    table = page[page.index("| variable | default |") : page.index("For the pool `cpu` copy")]
    assert set(re.findall(r"`([a-z_]+)`", table)) <= set(variables)


def test_the_indexed_job_for_kubernetes_is_one_remerge_with_helpers() -> None:
    job = yaml.safe_load(INDEXED_JOB.read_text(encoding="utf-8"))
    asyncio.run(check_job(job))
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] > 1
    # Only pod 0 can end the Job well, and no helper can end it badly.
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    assert spec["backoffLimitPerIndex"] == 0
    assert "backoffLimit" not in spec
    pod = spec["template"]["spec"]
    [selected] = [one["labelSelector"] for one in pod["topologySpreadConstraints"]]
    assert selected["matchLabels"] == spec["template"]["metadata"]["labels"]
    template = json.loads(TEMPLATE.read_text(encoding="utf-8"))
    of_runs = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert pod["securityContext"] == of_runs["securityContext"]
    [container], [of_run] = pod["containers"], of_runs["containers"]
    for name in ("envFrom", "volumeMounts"):
        assert container[name] == of_run[name]
    assert [one["name"] for one in pod["volumes"]] == [one["name"] for one in of_runs["volumes"]]


@pytest.mark.parametrize(("index", "command"), [(0, ["remerge"]), (1, ["assist"]), (3, ["assist"])])
def test_the_pods_of_the_indexed_job_run_commands_that_exist(
    tmp_path: Path, index: int, command: list[str]
) -> None:
    job = yaml.safe_load(INDEXED_JOB.read_text(encoding="utf-8"))
    [container] = job["spec"]["template"]["spec"]["containers"]
    said = tmp_path / "restitch"
    said.write_text('#!/bin/sh\necho "$@"\n')
    said.chmod(0o755)
    done = subprocess.run(
        [*container["command"], *container["args"]],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "JOB_COMPLETION_INDEX": str(index)},
        capture_output=True,
        text=True,
        check=True,
    )
    name, *arguments = done.stdout.split()
    assert [name] == command
    known: dict[str, Callable[..., Any]] = {
        "remerge": lines.remerge,
        "assist": operations.assist,
    }
    options = {word.removeprefix("--") for word in arguments if word.startswith("--")}
    assert options <= inspect.signature(known[name]).parameters.keys()


async def check_job(job: dict[str, Any]) -> None:
    """Read a Job with Kubernetes' own client, which drops what its models do not know."""
    from kubernetes_asyncio.client import ApiClient  # a thousand modules, for one file of tests

    async with ApiClient() as client:
        response = SimpleNamespace(data=json.dumps(job))
        read = client.deserialize(response, "V1Job")
        assert client.sanitize_for_serialization(read) == job


async def rendered(template: dict[str, Any]) -> dict[str, Any]:
    """The Job of a run."""
    from prefect.client.schemas.objects import FlowRun
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    values = KubernetesWorkerJobConfiguration.from_template_and_values
    configuration = await values(template, {}, client=AsyncMock())
    configuration.prepare_for_flow_run(FlowRun(id=uuid4(), name="a-run", flow_id=uuid4()))
    job: dict[str, Any] = configuration.job_manifest
    await check_job(job)
    return job
