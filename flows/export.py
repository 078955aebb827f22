"""Write a merged version, or a model of it for one task, as a Hugging Face folder.

The folder appears complete or not at all, and its weights have the same bytes each time. In a
family whose tasks have heads of their own, the model for one task is the merged model with the
task's head, as a whole classifier; elsewhere it is the task's specialist: the base with the part of
a shared patch that the task's mask selects (`flows.research.experts`). A line that merges the
vectors of (IA)^3 adapters is written as one adapter.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from restitch.flows.export_adapter import adapter_config
from restitch.flows.outcome import Outcome
from restitch.flows.output_folder import appearing, check_free
from restitch.flows.promotion.versions import open_version
from restitch.flows.research.experts import specialists_of
from restitch.merging.adapters.checkpoint import WEIGHTS
from restitch.merging.adapters.vectors import VectorSpace, write_vectors
from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.edits import Edits, RenamedEdits, edited
from restitch.merging.files.export import Previous, export_weights
from restitch.merging.files.sparse import SparseFile
from restitch.merging.progress import Progress
from restitch.modeling.families.family import get_family
from restitch.modeling.heads import Head
from restitch.modeling.weights import weight_layers
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.records import MergedMember, MergedRecord
from restitch.registry.sizes import parse_size
from restitch.registry.sources.hub_upload import check_repository, upload
from restitch.serving.version_folder import copy_assets
from restitch.tasks.export import export_shared
from restitch.tasks.inputs.checkpoints import Base, open_base, open_sparse, open_specialist
from restitch.tasks.inputs.heads import head_file
from restitch.tasks.inputs.live_base import live_base
from restitch.tasks.report.card import model_card, public, specialist_card
from restitch.tasks.report.provenance import provenance
from restitch.tasks.report.usage import usage
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import Workspace, workspace


@dataclass(frozen=True)
class ExportOutcome(Outcome):
    """The files that were written.

    Attributes:
        task: the task that the model is for; None for the merged version.
        specialist: whether the model is the task's specialist.
        out: the folder; None if the model is only on the hub.
        repository: where it is on the hub; `commit` is the address of the commit.
    """

    line: str
    version: int
    out: str | None
    files: tuple[str, ...]
    bytes: int
    task: str | None = None
    specialist: bool = False
    repository: str | None = None
    commit: str | None = None


def export_version(
    line: str,
    version: str,
    out: Path,
    *,
    overwrite: bool = False,
    shard_size: str | None = None,
    task: str | None = None,
    specialist: bool = False,
    with_workers: bool = False,
) -> ExportOutcome:
    """Write a merged version, or a model of it for one task.

    Args:
        line: the line's name.
        version: a number, `champion` or `candidate`.
        out: a folder that is absent or empty.
        overwrite: replace a model in `out`.
        shard_size: the size of the largest file, as "5GB"; None splits like the base.
        task: write the model for this task; None writes the merged version.
        specialist: with `task`, take the task's specialist also in a family whose tasks have heads
            of their own.
        with_workers: idle workers write files of the merged version into the store, from where this
            process takes them.

    Raises:
        BadInput: there is no such version, task or specialist, or `out` is not free; workers cannot
            write this model.
    """
    model = open_export(line, version, task=task, specialist=specialist)
    limit = None if shard_size is None else parse_size(shard_size)
    _check_shards(model, limit)
    out = out.expanduser().absolute()
    check_free(out, overwrite)
    if with_workers:
        _check_shared(model)
    with appearing(out) as folder:
        model.write(folder, limit, title=out.name, with_workers=with_workers)
    return outcome_of(model, out)


def push_version(
    line: str,
    version: str,
    repository: str,
    out: Path | None = None,
    *,
    private: bool = False,
    overwrite: bool = False,
    shard_size: str | None = None,
    task: str | None = None,
    specialist: bool = False,
) -> ExportOutcome:
    """Write a merged version, or a model of it for one task, and put it on the hub in one commit.

    Args:
        line: the line's name.
        version: a number, `champion` or `candidate`.
        repository: `OWNER/NAME`; it is created if it does not exist.
        out: a folder that also gets the model; absent or empty.
        private: the repository must be private.
        overwrite: replace another model in the repository, and a model in `out`.
        shard_size: the size of the largest file, as "5GB"; None splits like the base.
        task: write the model for this task; None writes the merged version.
        specialist: see `export_version`.

    Raises:
        BadInput: as for `export_version`; the hub refuses the name, or it holds another model.
        Unavailable: the hub cannot be reached, or needs a token.
    """
    limit = None if shard_size is None else parse_size(shard_size)
    if out is not None:
        out = out.expanduser().absolute()
        check_free(out, overwrite)
    _, line_state, _ = open_version(line, version)
    adapter = line_state.spec.space is not None
    check_repository(repository, line, private=private, overwrite=overwrite, adapter=adapter)
    model = open_export(line, version, task=task, specialist=specialist)
    _check_shards(model, limit)
    with model.space.scratch() as scratch:
        folder = scratch / "model" if out is None else out
        with appearing(folder) as building:
            model.write(building, limit, title=repository, name=repository)
        whose = "" if task is None else f" for {task}"
        message = f"Version {model.record.version} of line {line}{whose}"
        with working(f"uploading to {repository}"):
            commit = upload(folder, repository, message, private=private)
        found = outcome_of(model, folder)
    return replace(
        found, out=None if out is None else str(out), repository=repository, commit=commit
    )


def _check_shards(model: "ExportedModel", limit: int | None) -> None:
    """Refuse a size of shards for an adapter, which has one file.

    Raises:
        BadInput: there is a size, and the model is an adapter.
    """
    if model.base.space is not None and limit is not None:
        raise BadInput(
            f"the versions of line {model.record.line} are adapters, which have one file",
            expected="no size of shards",
            found=f"--shard-size of {limit:,} bytes",
            hint="leave it out",
        )


def _check_shared(model: "ExportedModel") -> None:
    """Refuse workers for a model that is no merged version as a whole.

    Raises:
        BadInput: the model is for one task, or an adapter.
    """
    if model.task is not None or model.base.space is not None:
        what = "adapters" if model.task is None else f"models for one task, such as {model.task}"
        raise BadInput(
            "workers write the files of whole merged versions only",
            expected="a version of a line of models, without --task",
            found=what,
            hint="leave out --with-workers",
        )


def outcome_of(model: "ExportedModel", out: Path) -> ExportOutcome:
    """The files of a model that was written into a folder."""
    files = sorted(p for p in out.rglob("*") if p.is_file())
    return ExportOutcome(
        model.record.line,
        model.record.version,
        str(out),
        tuple(str(p.relative_to(out)) for p in files),
        sum(p.stat().st_size for p in files),
        model.task,
        model.specialist,
    )


def open_export(
    line: str, version: str, *, task: str | None = None, specialist: bool = False
) -> "ExportedModel":
    """Find what an export of a version, or of a model of it for one task, writes.

    Args:
        line: the line's name.
        version: a number, `champion` or `candidate`.
        task: the task that the model is for; None takes the merged version.
        specialist: with `task`, take the task's specialist also in a family whose tasks have heads
            of their own.

    Raises:
        BadInput: there is no such version, task or specialist.
    """
    space = workspace()
    ledger, line_state, record = open_version(line, version)
    has_own_head = get_family(line_state.spec.family).task_heads is not None
    if specialist and task is None:
        raise BadInput("a specialist is for one task", expected="the name of a task")
    specialist = task is not None and (specialist or not has_own_head)
    content = _content(line_state, record, task, specialist, space)
    base = open_base(LineRef(line_state.spec, line_state.base), space)
    head = None
    if task is not None and has_own_head:
        head = _own_head(line_state, record, task, base, space)
    return ExportedModel(space, ledger, line_state, record, base, content, task, specialist, head)


@dataclass(frozen=True)
class ExportedModel:
    """A version, or a model of it for one task, that can be written as a folder.

    Attributes:
        task: the task that the model is for; None for the merged version.
        specialist: whether the model is the task's specialist.
    """

    space: Workspace
    ledger: Ledger
    line_state: LineState
    record: MergedRecord
    base: Base
    content: "_Content"
    task: str | None
    specialist: bool
    head: Head | None

    def edits(self) -> Edits:
        """The differences from the base.

        Raises:
            Damage: the file is missing or altered.
        """
        opened = open_specialist if self.specialist else open_sparse
        return opened(self.content.blob, self.space, self.base.checkpoint)

    def edit_digests(self) -> dict[str, str]:
        """The digests of what the patch of a merged version holds, by tensor.

        Raises:
            Damage: the file is missing or altered.
        """
        patch = SparseFile.open(self.space.objects.blob_path(self.record.patch))
        return {name: patch.tensor_digest(name) for name in patch.names}

    def write(
        self,
        folder: Path,
        shard_size: int | None = None,
        *,
        title: str,
        name: str | None = None,
        previous: Previous | None = None,
        with_workers: bool = False,
    ) -> tuple[Checkpoint, tuple[str, ...]]:
        """Write all files into an existing folder.

        Args:
            folder: the folder.
            shard_size: bytes of tensors per file; None keeps the base's files.
            title: the name of the folder for the user.
            name: the repository on the hub that the folder is for; nothing in it then names a place
                or a process of this machine.
            previous: an earlier export, whose unchanged files are taken.
            with_workers: idle workers write files, of a whole merged version.

        Returns:
            The written checkpoint, and the files that were taken.
        """
        base, edits = self.base, self.edits()
        with working(f"writing {title}") as progress:
            taken: tuple[str, ...] = ()
            if base.space is not None:
                _write_vectors(base, base.space, edits, self.line_state, folder)
            elif with_workers:
                line = LineRef(self.line_state.spec, self.line_state.base)
                export_shared(line, self.content.blob, shard_size, folder, self.space)
            elif self.head is None:
                taken = export_weights(
                    base.checkpoint,
                    edits,
                    folder,
                    shard_size=shard_size,
                    previous=previous,
                    progress=progress,
                )
            else:
                _write_classifier(base, edits, self.head, folder, shard_size, progress)
        if base.space is None:
            write_assets(base, self.head, folder)
        if self.head is None:
            _write_heads(folder, self.line_state, self.content.members, base, self.space)
        description = self.content.description if name is None else public(self.content.description)
        text = json.dumps(description, indent=2, ensure_ascii=False)
        (folder / "restitch.json").write_text(text + "\n", encoding="utf-8")
        if base.space is None:
            made = Checkpoint.open(folder)
        else:
            made = Checkpoint.from_files(folder, {WEIGHTS: folder / WEIGHTS})
        (folder / "README.md").write_text(self._card(made.digest(), name or "."), encoding="utf-8")
        return made, taken

    def _card(self, weights: str, name: str) -> str:
        """The model card; `weights` is the digest of the written checkpoint."""
        line_state, record = self.line_state, self.record
        origin = provenance(
            line_state.base.uri, record, self.ledger.entries(), self.space.objects, weights
        )
        classifier = self.head is not None
        use = None
        if self.base.space is None:
            use = usage(self.base.family.name, self.base.folder, name, classifier=classifier)
        if self.task is not None and self.specialist:
            specialists = self.content.description["specialists"]
            return specialist_card(line_state, record, self.task, specialists, origin, use)
        return model_card(line_state, record, origin, self.task, use)


@dataclass(frozen=True)
class _Content:
    """The edits of the base, the members whose heads are written, and `restitch.json`."""

    blob: str
    members: Mapping[str, MergedMember]
    description: dict[str, Any]


def _content(
    line_state: LineState,
    record: MergedRecord,
    task: str | None,
    specialist: bool,
    space: Workspace,
) -> _Content:
    """What is written for a version, or for one of its tasks.

    Raises:
        BadInput: the version holds no such task, or has no specialists.
    """
    if task is None:
        return _Content(record.patch, record.members, record.to_json())
    where = f"version {record.version} of line {record.line}"
    if task not in record.members:
        raise BadInput(
            f"{where} holds no task {task}",
            expected=", ".join(record.members) or "a version with members",
            found=task,
            hint="choose one of these tasks, or a version that holds the task",
        )
    if specialist:
        return _specialist(line_state, record, task, space)
    members = {task: record.members[task]}
    return _Content(record.patch, members, {**record.to_json(), "task": task})


def _specialist(
    line_state: LineState, record: MergedRecord, task: str, space: Workspace
) -> _Content:
    """The specialist of a version for a task that it holds.

    Raises:
        BadInput: the version has no specialists.
    """
    where = f"version {record.version} of line {record.line}"
    made = specialists_of(record, space)
    if made is None:
        family = line_state.spec.family
        alone = "--task" if get_family(family).task_heads is None else "--specialist"
        raise BadInput(
            f"{where} has no specialists",
            expected="a version whose specialists were made",
            found=f"family {family}: without specialists, all tasks have the same merged model"
            + ("" if alone == "--task" else ", each with its own head"),
            hint=f"leave out {alone} for the merged model, or make specialists with"
            f" `restitch experts {record.line} {record.version}`",
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


def _own_head(
    line_state: LineState, record: MergedRecord, task: str, base: Base, space: Workspace
) -> Head:
    """The head of a task's member, read from its finetuned model.

    Raises:
        BadInput: the classes of the task are not known.
    """
    spec, member = line_state.tasks[task].spec, record.members[task]
    model = line_state.tasks[task].versions[member.version].model
    stored = head_file(spec, base, model, space)
    if stored is None:
        raise BadInput(
            f"the classes of task {task} are not known",
            expected="a task whose description has labels",
            hint=f"add `head: labels` to its file: `restitch task {record.line} --task FILE"
            " --replace-task`",
        )
    return Head.from_bytes(stored)


def _write_classifier(
    base: Base, edits: Edits, head: Head, folder: Path, limit: int | None, progress: Progress
) -> None:
    """Write the merged encoder and a task's head as the weights of one whole classifier."""
    heads = base.family.task_heads
    assert heads is not None
    names = heads.whole_names(base.folder, base.checkpoint)
    export_weights(
        base.checkpoint.renamed(names),
        RenamedEdits(edits, names),
        folder,
        shard_size=limit,
        extra=head.tensors,
        progress=progress,
    )


def _write_vectors(
    base: Base, space: VectorSpace, edits: Edits, line_state: LineState, folder: Path
) -> None:
    """Write merged vectors as an (IA)^3 adapter, with the names of the model that peft loads."""
    live = live_base(base, "write an adapter")
    layers = weight_layers(live.model, live.parameters)
    modules = {each.weight: layers[each.weight].module for each in space.modules.values()}
    vectors = {name: edited(base.checkpoint, edits, name) for name in base.checkpoint.names}
    write_vectors(folder, space, vectors, modules, adapter_config(line_state))


def write_assets(base: Base, head: Head | None, folder: Path) -> None:
    """Write the base's configuration, tokenizer and processor; a head adds its classes."""
    copy_assets(base.folder, base.family, folder)
    if head is not None and base.folder.is_dir() and base.family.task_heads is not None:
        values = base.family.task_heads.whole_config(base.folder, head.spec.classes)
        text = json.dumps(values, indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")


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
        model = line_state.tasks[task].versions[member.version].model
        stored = head_file(spec, base, model, space)
        if stored is not None:
            (folder / "heads").mkdir(exist_ok=True)
            (folder / "heads" / f"{task}.safetensors").write_bytes(stored)
