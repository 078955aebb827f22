"""Check everything that restitch needs, and name the remedy of each problem.

Nothing is changed, except that one object next to the store is written to a bucket and removed.
The exit code is 6 if a check failed; warnings leave it at 0, and so does what a person paused.
"""

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from restitch.deployments.local.health import answers, is_running
from restitch.deployments.server.definitions import full_name
from restitch.deployments.server.schedules import PAUSED_IN_PREFECT, by_line, compare, plans
from restitch.merging.errors import RestitchError, Unavailable
from restitch.registry.ledger.ledger import Ledger, lines, lines_in_use
from restitch.registry.mlflow.connection import mlflow_explained
from restitch.registry.redaction import NOTIFY_VARIABLE, without_credentials
from restitch.registry.s3.client import parse_address
from restitch.registry.s3.conditional_writes import probe_conditional_writes, refusal
from restitch.registry.s3.settings import WRITER_VARIABLE, single_writer
from restitch.registry.stack import StackFile
from restitch.tasks.runtime.delivery import problems, services
from restitch.tasks.runtime.engine import engine_url
from restitch.tasks.runtime.events import api
from restitch.tasks.runtime.workspace import Workspace, workspace

Status = Literal["ok", "paused", "warning", "failed"]

# Versions that work together: name, lowest, first untested or broken one, and its effect.
VERSIONS = (
    ("prefect", "3.8.8", "3.9", "untested"),
    ("fastapi", "0.115", "0.151", "the Prefect server dies at import"),
    ("sqlalchemy", "2.0", "2.1", "cron runs are silently never created"),
    ("mlflow", "3.17", "3.18", "untested"),
    ("transformers", "5.20", "6", "untested"),
)
FREE_BYTES = 5 << 30


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        status: paused is what a person switched off, in restitch or in Prefect.
        remedy: the remedy; empty if the check passed.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Examined:
    """The results of all checks."""

    checks: tuple[Check, ...]

    @property
    def exit_code(self) -> int:
        """6 if a check failed."""
        failed = any(check.status == "failed" for check in self.checks)
        return Unavailable.exit_code if failed else 0

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"checks": [check.as_dict() for check in self.checks]}


def examine() -> Examined:
    """Run all checks; later ones depend on earlier ones."""
    space = workspace(to_write=False)
    checks: list[Check] = []
    parts = (
        *(_versions, _home, _store, _models, _device, _processes, _notifications),
        *(_mlflow, _prefect),
    )
    for part in parts:
        try:
            checks += part(space)
        except RestitchError as error:
            name = part.__name__.strip("_")
            checks.append(Check(name, "failed", error.message(), error.hint or ""))
    return Examined(tuple(checks))


def _versions(_: Workspace) -> Iterator[Check]:
    python = ".".join(map(str, sys.version_info[:3]))
    yield Check("python", "ok", python)
    for name, lowest, beyond, harm in VERSIONS:
        version = importlib.metadata.version(name)
        works = _numbers(lowest) <= _numbers(version) < _numbers(beyond)
        state = version if works else f"{version}: {harm}"
        yield _check(name, works, state, f"pip install '{name}>={lowest},<{beyond}'")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def _home(space: Workspace) -> Iterator[Check]:
    root = space.home.root
    if not root.exists():
        yield Check("home", "warning", f"{root} does not exist", "restitch init FILE makes it")
        return
    writable = os.access(root, os.W_OK | os.X_OK)
    state = str(root) if writable else f"{root} is not writable"
    yield _check("home", writable, state, "give yourself write permission")
    free = shutil.disk_usage(root).free
    text = f"{free / 1e9:.1f} GB free at {root}"
    if free >= FREE_BYTES:
        yield Check("disk", "ok", text)
    else:
        yield Check("disk", "warning", text, "free some space: a full disk stops every worker")


def _store(space: Workspace) -> Iterator[Check]:
    where = space.home.store_name
    names = [each.line for each in lines_in_use(space.objects)]
    yield Check("store", "ok", f"{where}, lines: {', '.join(names) or 'none'}")
    if space.home.store_url is None or space.home.store_is_local:
        return
    bucket, prefix = parse_address(space.home.store_url)
    if probe_conditional_writes(bucket, prefix):
        yield Check("conditional writes", "ok", "the server supports them")
        return
    refused = refusal(f"s3://{bucket}")
    if single_writer():
        remedy = f"let only one process write at a time, as {WRITER_VARIABLE} promises"
        yield Check("conditional writes", "warning", refused.summary, remedy)
    else:
        yield Check("conditional writes", "failed", refused.summary, refused.hint or "")


def _models(space: Workspace) -> Iterator[Check]:
    """Warn of tasks whose newest model does not join until a person does something."""
    for line in (each.line for each in lines_in_use(space.objects)):
        newest = {
            key.task: (key, model)
            for key, model in sorted(space.ledger(line).state().models, key=lambda one: one[0])
            if model.state not in ("retired", "forgotten")
        }
        stuck = [
            f"{key} is {model.state}"
            for key, model in newest.values()
            if model.state == "quarantined" or (model.state == "held" and model.facts.lacks_gain)
        ]
        if stuck:
            remedy = f"restitch status {line} shows the reasons and what to do"
            yield Check(f"models of {line}", "warning", ", ".join(stuck), remedy)


def _device(space: Workspace) -> Iterator[Check]:
    from restitch.modeling.device import device

    here = device()
    yield Check("device", "ok", str(here))
    for line in lines(space.objects):
        try:
            line_state = Ledger(space.objects, line).state()
        except RestitchError as error:  # the other lines are checked nevertheless
            yield Check(f"line {line}", "failed", error.message(), error.hint or "")
            continue
        if line_state.dropped is not None:
            continue
        required = line_state.spec.require_device
        if required is not None and required != here.type:
            yield Check(
                f"device of {line}",
                "warning",
                f"it requires {required}; this host has {here.type}",
                "run its workers on hosts with this device; other hosts do not need it",
            )


def _processes(space: Workspace) -> Iterator[Check]:
    for name, process in StackFile.read(space.home.root).processes.items():
        running = is_running(process)
        at = f", port {process.port}" if process.port else ""
        state = f"process {process.pid}{at if running else ' has ended'}"
        yield _check(name, running, state, f"restitch up starts it again; its log is {process.log}")


def _notifications(space: Workspace) -> Iterator[Check]:
    states = lines_in_use(space.objects)
    asking = ", ".join(state.line for state in states if state.spec.notify)
    if not asking:
        return
    found = services()
    for problem in problems(found):
        remedy = f"set {NOTIFY_VARIABLE} here and for every worker; see docs/how-to/notify.md"
        yield Check("notifications", "warning", f"lines {asking}: {problem}", remedy)
    known = [service.name for service in found if service.client is not None]
    if known:
        yield Check("notifications", "ok", f"lines {asking}: {'; '.join(known)}")


def _mlflow(space: Workspace) -> Iterator[Check]:
    uri = space.home.mlflow_uri
    shown = without_credentials(uri)
    if not uri.startswith("http"):
        yield Check("mlflow", "ok", f"{shown}; without a server, the schedule finds new models")
        return
    if not answers(f"{uri}/health"):
        yield Check("mlflow", "failed", f"{shown} does not answer", "start it: restitch up")
        return
    yield Check("mlflow", "ok", shown)
    from restitch.deployments.webhook import NAME

    try:
        with mlflow_explained(space.home):
            hooks = [hook for hook in space.mlflow.client.list_webhooks() if hook.name == NAME]
    except Unavailable as error:
        remedy = "'a webhook is not delivered' in docs/operations.md; the schedule finds new models"
        yield Check("mlflow webhook", "warning", f"cannot be listed: {error.found}", remedy)
        return
    if hooks and str(hooks[0].status).upper().endswith("ACTIVE"):
        yield Check("mlflow webhook", "ok", hooks[0].url)
    else:
        state = "disabled" if hooks else "none"
        remedy = "restitch webhook --register URL; until then the schedule finds new models"
        yield Check("mlflow webhook", "warning", state, remedy)


def _prefect(space: Workspace) -> Iterator[Check]:
    url = engine_url()
    if url is None:
        yield Check("prefect", "ok", "no server: commands do the work themselves (embedded)")
        return
    shown = without_credentials(url)
    if not answers(f"{url}/health"):
        yield Check("prefect", "failed", f"{shown} does not answer", "start it: restitch up")
        return
    yield Check("prefect", "ok", shown)
    from restitch.deployments.server.deploy import client, deployment

    pools = []
    with client() as prefect:
        for flow in ("onboard", "remerge", "assist"):
            name, found = f"deployment {flow}", deployment(prefect, full_name(flow))
            if found is None:
                yield Check(name, "failed", "missing", "restitch deploy")
                continue
            page = f"to switch it on: the page of {full_name(flow)} in Prefect"
            yield _switched(name, not found.paused, f"pool {found.work_pool_name}", page)
            pools.append(found.work_pool_name)
            if flow == "remerge":
                yield from _schedule_checks(prefect.read_deployment_schedules(found.id))
        yield from _automation_checks(prefect.read_automations())
        for pool in dict.fromkeys(pools):
            if prefect.read_work_pool(pool).is_paused:
                page = f"to switch it on: prefect work-pool resume {pool}"
                yield _switched(f"pool {pool}", False, "", page)
    for pool in dict.fromkeys(pools):
        online = ", ".join(sorted(api().online_workers(pool)))
        remedy = f"restitch up, or on a worker: prefect worker start --pool {pool}"
        yield _check(f"workers of {pool}", bool(online), online or "none online", remedy)


def _schedule_checks(schedules: list[Any]) -> Iterator[Check]:
    present, _ = by_line(schedules)
    statuses: dict[str, Status] = {"on": "ok", "none": "ok", "paused": "paused"}
    for line, plan in plans().items():
        found = compare(line, plan, present.get(line))
        status = statuses.get(found.state, "failed")
        yield Check(f"schedule of {line}", status, found.text, found.remedy)


def _automation_checks(present: list[Any]) -> Iterator[Check]:
    from uuid import uuid4

    from restitch.deployments.server.definitions import automations

    states = {one.name: one.enabled for one in present}
    for automation in automations(uuid4(), uuid4()):
        if automation.name not in states:
            yield Check(automation.name, "failed", "missing", "restitch deploy")
        else:
            page = "to switch it on: the page of automations in Prefect"
            yield _switched(automation.name, states[automation.name], "enabled", page)


def _switched(name: str, on: bool, found: str, remedy: str) -> Check:
    """A part that a person may switch off in Prefect."""
    return Check(name, "ok", found) if on else Check(name, "paused", PAUSED_IN_PREFECT, remedy)


def _check(name: str, passed: bool, found: str, remedy: str) -> Check:
    return Check(name, "ok", found) if passed else Check(name, "failed", found, remedy)
