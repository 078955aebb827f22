"""Small heads, records and stores for the tests of `registry`."""

import shutil
from pathlib import Path
from typing import Any

from restitch.merging.digests import digest_bytes
from restitch.registry.home import Home
from restitch.registry.ledger.finetuned_models import ModelRef, ModelVersion
from restitch.registry.ledger.ledger import Act, Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.records import MergedMember, MergedRecord, Retention, TaskResult
from restitch.registry.specs.line import LineSpec
from restitch.registry.specs.method import MethodSpec
from restitch.registry.specs.task import TaskSpec
from restitch.registry.store.folder import FolderStore
from restitch.registry.store.objects import ObjectStore

TIME = "2026-03-01T12:00:00.000000+00:00"


def digest(name: str) -> str:
    return digest_bytes(name.encode())


def model_ref(name: str = "model") -> ModelRef:
    return ModelRef(uri=f"/models/{name}", weights=digest(name), config=digest("config"), size=8)


def model(name: str = "model", **changes: Any) -> ModelVersion:
    return ModelVersion.model_validate({"model": model_ref(name), "registered_at": TIME, **changes})


def ready(name: str = "model") -> ModelVersion:
    return model(name, state="ready", mask=digest(f"mask {name}"), delta=digest(f"delta {name}"))


def line_spec(line: str = "line", **changes: Any) -> LineSpec:
    method = MethodSpec(name="localize-and-stitch")
    return LineSpec.model_validate(
        {"line": line, "base": "/base", "family": "clip", "method": method, **changes}
    )


def line_state(line: str = "line") -> LineState:
    return LineState(line=line, spec=line_spec(line), base=model_ref("base"))


def with_task(line_state: LineState, task: str, model: ModelVersion) -> LineState:
    if task not in line_state.tasks:
        line_state = line_state.with_task(TaskSpec(task=task))
    return line_state.with_version(task, model)


def record(
    version: int = 1, line: str = "line", tasks: tuple[str, ...] = ("a", "b"), **changes: Any
) -> MergedRecord:
    values = {
        "line": line,
        "version": version,
        "recipe": {
            "method": {"name": "localize-and-stitch", "version": 1, "settings": {"overlap": "mean"}}
        },
        "recipe_digest": digest(f"recipe {version}"),
        "patch": digest(f"patch {version}"),
        "patch_bytes": 100,
        "kept": 10,
        "members": {
            task: MergedMember(
                version=1,
                uri=f"/models/{task}",
                weights=digest(task),
                mask=digest(f"mask {task}"),
                delta=digest(f"delta {task}"),
            )
            for task in tasks
        },
        "results": {
            task: TaskResult(base=0.4, finetuned=0.8, merged=0.6, normalized=0.75) for task in tasks
        },
        "retention": Retention(task="general", value=0.45, base=0.5, ratio=0.9),
        "created_at": TIME,
    }
    return MergedRecord.model_validate(values | changes)


def ledger(root: Path, line: str = "line") -> Ledger:
    made = Ledger(ObjectStore(FolderStore(root)), line)
    made.create(line_spec(line), model_ref("base"), "tester", "a new line")
    return made


def home_with_mlflow(root: Path, template: Path) -> Home:
    """A home whose MLflow database is already migrated, which takes seconds."""
    home = Home(root)
    home.create()
    shutil.copyfile(template, root / "mlflow.db")
    return home


def done(act: Act | None) -> Act:
    """The act, which must have been one."""
    assert act is not None
    return act


def merge(ledger: Ledger, **changes: Any) -> int:
    """One more merged version, promoted."""

    def change(line_state: LineState) -> LineState:
        made = record(line_state.next_version, line_state.line, **changes)
        return line_state.with_merged(ledger.objects.put_blob(made.to_bytes()))

    act = ledger.act("merged", "tester", "because", change)
    version = done(act).line_state.newest
    assert version is not None
    ledger.act("promoted", "tester", "no gates", lambda line_state: line_state.promoted(version))
    return version
