"""The triggers and schedules of a Prefect server, and their comparison."""

import inspect
import json
from typing import Any
from uuid import uuid4

import pytest
from jinja2 import Environment

from restitch.deployments.server import entry
from restitch.deployments.server.definitions import automations, flows, full_name
from restitch.deployments.server.deploy import PREFIX, _same, _schema

ONBOARD, REMERGE = uuid4(), uuid4()


def plain(automation: Any) -> dict[str, Any]:
    values: dict[str, Any] = automation.model_dump(mode="json")
    return values


@pytest.fixture(scope="module")
def wanted() -> dict[str, dict[str, Any]]:
    found = [plain(automation) for automation in automations(ONBOARD, REMERGE)]
    assert len({automation["name"] for automation in found}) == len(found)
    return {automation["name"].removeprefix(PREFIX): automation for automation in found}


def rendered(template: Any, **names: Any) -> Any:
    """A parameter as Prefect fills it in: a JSON one keeps its type, a plain one is text."""
    if isinstance(template, dict):
        assert template["__prefect_kind"] == "json"
        assert template["value"]["__prefect_kind"] == "jinja"
        return json.loads(Environment().from_string(template["value"]["template"]).render(**names))
    return Environment().from_string(template).render(**names)


def parameters(automation: dict[str, Any], **names: Any) -> dict[str, Any]:
    (action,) = automation["actions"]
    assert action["type"] == "run-deployment"
    return {name: rendered(value, **names) for name, value in action["parameters"].items()}


@pytest.mark.parametrize(
    ("told", "version", "mlflow_version"),
    [
        ({"version": 3, "mlflow_version": None}, 3, None),
        ({"version": None, "mlflow_version": 12}, None, 12),
        ({"version": 3}, 3, None),
    ],
)
def test_a_registered_model_starts_onboard_with_integer_parameters(
    wanted: dict[str, Any], told: dict[str, Any], version: int | None, mlflow_version: int | None
) -> None:
    automation = wanted["onboard a registered model"]
    assert automation["trigger"]["expect"] == ["restitch.model.registered"]
    assert automation["actions"][0]["deployment_id"] == str(ONBOARD)
    event = {"payload": {"line": "demo", "task": "00123", **told}}
    assert parameters(automation, event=event) == {
        "line": "demo",
        "task": "00123",
        "version": version,
        "mlflow_version": mlflow_version,
    }


def test_a_mask_starts_remerge(wanted: dict[str, Any]) -> None:
    automation = wanted["merge a new mask"]
    assert automation["trigger"]["expect"] == ["restitch.mask.ready"]
    assert automation["actions"][0]["deployment_id"] == str(REMERGE)
    event = {"payload": {"line": "demo", "task": "colour", "version": 1}}
    assert parameters(automation, event=event) == {"line": "demo"}


def test_no_automation_waits_for_missing_events(wanted: dict[str, Any]) -> None:
    """Such automations write at every event, and fire more than once on a busy server."""
    assert len(wanted) == 2
    assert {one["trigger"]["posture"] for one in wanted.values()} == {"Reactive"}
    assert {one["trigger"]["within"] for one in wanted.values()} == {0}


def test_automations_compare_equal_in_any_order() -> None:
    first, second = automations(ONBOARD, REMERGE), automations(ONBOARD, REMERGE)
    assert all(_same(one, other) for one, other in zip(first, second, strict=True))
    others = automations(ONBOARD, uuid4())
    differ = [not _same(one, other) for one, other in zip(first, others, strict=True)]
    # What is about onboard alone does not change with the other deployment.
    assert differ == [False, True]


def test_the_parameters_of_a_deployment_are_those_of_its_flow() -> None:
    for flow in flows("gpu", "cpu"):
        signature = inspect.signature(getattr(entry, flow.flow))
        assert list(signature.parameters) == [*flow.required, *flow.optional]
        defaults = {n: signature.parameters[n].default for n in flow.optional}
        assert defaults == flow.optional
        schema = _schema(flow)
        assert list(schema["properties"]) == list(signature.parameters)
        assert schema["required"] == list(flow.required)
        assert hasattr(entry, flow.entrypoint.rpartition(".")[2])
        assert full_name(flow.flow) == f"{flow.flow}/restitch"


def test_each_flow_has_its_pool() -> None:
    assert [(flow.flow, flow.pool) for flow in flows("gpu", "cpu")] == [
        *(("onboard", "gpu"), ("remerge", "cpu"), ("assist", "cpu"))
    ]
