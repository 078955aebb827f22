"""Write a merged version, or its specialist for one task, as a Hugging Face folder.

The folder appears complete or not at all, and its weights have the same bytes each time. A
specialist is the base with the part of a shared patch that the task's mask selects
(`flows.research.experts`).
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from restitch.flows.outcome import Outcome
from restitch.flows.promotion.versions import open_version
from restitch.flows.research.experts import specialists_of
from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.export import export_weights
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.records import MergedMember, MergedRecord
from restitch.registry.sizes import parse_size
from restitch.registry.store.disk import explained
from restitch.tasks.inputs.checkpoints import Base, open_base, open_sparse, open_specialist
from restitch.tasks.inputs.task_data import stored_head
from restitch.tasks.report.card import model_card, specialist_card
from restitch.tasks.report.provenance import provenance
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import Workspace, workspace


@dataclass(frozen=True)
class ExportOutcome(Outcome):
    """The files that were written.

    Attributes:
        task: the task of the specialist; None for the merged version.
    """

    line: str
    version: int
    out: str
    files: tuple[str, ...]
    bytes: int
    task: str | None = None


def export_version(
    line: str,
    version: str,
    out: Path,
    *,
    overwrite: bool = False,
    shard_size: str | None = None,
    task: str | None = None,
) -> ExportOutcome:
    """Write a merged version, or its specialist for a task.

    Args:
        line: the line's name.
        version: a number, `champion` or `candidate`.
        out: a folder that is absent or empty.
        overwrite: replace a model in `out`.
        shard_size: the size of the largest file, as "5GB"; None splits like the base.
        task: the task whose specialist is written; None for the merged version.

    Raises:
        BadInput: there is no such version or specialist, or `out` is not free.
    """
    space = workspace()
    ledger, line_state, record = open_version(line, version)
    limit = None if shard_size is None else parse_size(shard_size)
    if task is None:
        content = _Content(record.patch, record.members, record.to_json())
    else:
        content = _specialist(record, task, space)
    out = out.expanduser().absolute()
    _check_free(out, overwrite)
    base = open_base(LineRef(line_state.spec, line_state.base), space)
    with _appearing(out) as folder:
        open_weights = open_sparse if task is None else open_specialist
        edits = open_weights(content.blob, space, base.checkpoint)
        with working(f"writing {out.name}") as progress:
            export_weights(base.checkpoint, edits, folder, shard_size=limit, progress=progress)
        if base.folder.is_dir():
            for name in base.family.asset_files(base.folder):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(base.folder / name, folder / name)
        _write_heads(folder, line_state, content.members, base, space)
        text = json.dumps(content.description, indent=2, ensure_ascii=False)
        (folder / "restitch.json").write_text(text + "\n", encoding="utf-8")
        made = Checkpoint.open(folder).digest()
        origin = provenance(line_state.base.uri, record, ledger.entries(), space.objects, made)
        if task is None:
            card = model_card(line_state, record, origin)
        else:
            specialists = content.description["specialists"]
            card = specialist_card(line_state, record, task, specialists, origin)
        (folder / "README.md").write_text(card, encoding="utf-8")
    files = sorted(p for p in out.rglob("*") if p.is_file())
    return ExportOutcome(
        line,
        record.version,
        str(out),
        tuple(str(p.relative_to(out)) for p in files),
        sum(p.stat().st_size for p in files),
        task,
    )


@dataclass(frozen=True)
class _Content:
    """The edits of the base, the members whose heads are written, and `restitch.json`."""

    blob: str
    members: Mapping[str, MergedMember]
    description: dict[str, Any]


def _specialist(record: MergedRecord, task: str, space: Workspace) -> _Content:
    """The specialist of a version for a task.

    Raises:
        BadInput: the version holds no such task, or has no specialists.
    """
    where = f"version {record.version} of line {record.line}"
    if task not in record.members:
        raise BadInput(
            f"{where} holds no task {task}",
            expected=", ".join(record.members) or "a version with members",
            found=task,
            hint="choose one of these tasks, or a version that holds the task",
        )
    made = specialists_of(record, space)
    if made is None:
        raise BadInput(
            f"{where} has no specialists",
            expected="a version whose specialists were made",
            hint=f"make them with `restitch experts {record.line} {record.version}`",
        )
    part = made.tasks[task]
    description = {
        "line": record.line,
        "version": record.version,
        "version_recipe": record.recipe_digest,
        "task": task,
        "specialists": {
            "method": list(made.method),
            "settings": made.settings,
            "recipe": made.recipe,
            "members": made.members,
            "shared": None if made.shared is None else made.shared.blob,
            "specialist": part.blob,
        },
    }
    return _Content(part.blob, {task: record.members[task]}, description)


def _write_heads(
    folder: Path,
    line_state: LineState,
    members: Mapping[str, MergedMember],
    base: Base,
    space: Workspace,
) -> None:
    """Write the heads of the members' tasks, which are not part of the model."""
    for task, member in members.items():
        spec = line_state.tasks[task].spec
        if spec.head is None:
            continue
        model = line_state.tasks[task].versions[member.version].model
        record = stored_head(spec, base, model, space)
        if record is not None:
            (folder / "heads").mkdir(exist_ok=True)
            blob = space.objects.read_blob(record.blob)
            (folder / "heads" / f"{task}.safetensors").write_bytes(blob)


def _check_free(out: Path, overwrite: bool) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise BadInput(
            f"{out} is not a folder",
            expected="a folder that is absent or empty",
            hint="choose another path",
        )
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise BadInput(
            f"{out} is not empty",
            expected="a folder that is absent or empty",
            hint="choose another folder, or replace the model in it with --overwrite",
        )
    if not (out / "config.json").exists():
        raise BadInput(
            f"{out} is not replaced: it does not look like the folder of a model",
            expected="a folder with a config.json",
            hint="remove the folder yourself, or choose another one",
        )


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A temporary folder next to `out`, which replaces it when everything is written."""
    folder = out.parent / f".{out.name}.{uuid4().hex[:8]}.partial"
    try:
        with explained(out, "write"):
            out.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            yield folder
        if out.exists() and any(out.iterdir()):
            old = folder.with_suffix(".replaced")
            out.rename(old)
            folder.rename(out)
            shutil.rmtree(old)
        else:
            folder.replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
