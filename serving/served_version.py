"""A merged version as it is served: its parts by their digests, and what reads its answers.

It is read from the store of its line once, and holds all that another machine needs to rebuild the
version: the address of the store, the base, the digest of the patch, and the heads of its tasks.
It holds no credentials: those come from the environment.
"""

import logging
import time
import uuid
from dataclasses import replace
from pathlib import Path

from restitch.merging.digests import digest_json
from restitch.merging.errors import Unavailable
from restitch.modeling.families.family import Family, get_family
from restitch.modeling.heads import head_key, listed
from restitch.registry.home import Home
from restitch.registry.ledger.finetuned_models import ModelRef, Number
from restitch.registry.ledger.ledger import Ledger
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.measurements import Digest
from restitch.registry.ledger.records import MergedRecord
from restitch.registry.ledger.versions import find_version
from restitch.registry.record import Record
from restitch.registry.sources.resolve import resolve_source
from restitch.registry.specs.head import HeadSpec
from restitch.registry.specs.line import Compute, SpaceSpec
from restitch.registry.specs.metric import MetricName
from restitch.registry.specs.task import TaskSpec
from restitch.registry.store.disk import explained, write_durably
from restitch.registry.store.objects import ObjectStore

FORMAT = 1

log = logging.getLogger("restitch")


class ServedTask(Record):
    """A task that a version answers.

    Attributes:
        columns: the columns that one of its rows has.
        head: the digest of its head in the store; None if there is none.
        spec: its question, in a family that reads prompts.
    """

    metric: MetricName
    columns: tuple[str, ...]
    head: Digest | None = None
    spec: HeadSpec | None = None


class ServedVersion(Record):
    """A merged version with all that is needed to rebuild and ask it.

    Attributes:
        store: the address of the store: an absolute path, or `s3://bucket/prefix`.
        record: the digest of its record in the store.
        created_at: when it was made, ISO in UTC.
        patch: the digest of its patch in the store.
        tasks: the tasks that it answers.
        space: of the vectors of adapters that the patch changes, if the line merges these.
    """

    format: int = FORMAT
    store: str
    line: str
    version: Number
    record: Digest
    created_at: str
    family: str
    compute: Compute
    base: ModelRef
    patch: Digest
    tasks: dict[str, ServedTask]
    space: SpaceSpec | None = None

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"version {self.version} of line {self.line}"

    @property
    def home(self) -> Home:
        """The home of this process, with the store of the version."""
        return replace(Home.from_environment(), store_url=self.store)

    def open_store(self) -> ObjectStore:
        """The store of the version.

        Raises:
            Unavailable: it cannot be reached.
        """
        if not self.store.startswith("s3://") and not Path(self.store).is_dir():
            raise Unavailable(
                f"the store of {self.name} cannot be reached",
                expected="its folder on this machine",
                found=f"no folder {self.store}",
                hint="mount it at this path; if the store has moved, `restitch remerge "
                f"{self.line} --republish` writes its new address",
            )
        return ObjectStore(self.home.open_store())


def head_inputs(
    family: Family, base: ModelRef, spec: HeadSpec, finetuned: ModelRef | None, compute: str
) -> dict[str, object]:
    """Everything that a head is built from; its digest is the head's key.

    Args:
        family: the family of the line.
        base: the base of the line.
        spec: the head, resolved.
        finetuned: the model of the task.
        compute: the type of the weights of the model that builds and uses it.
    """
    own = finetuned if family.task_heads is not None else None
    return head_key(
        family=family.name,
        version=family.version,
        base=base.weights,
        assets=base.config,
        spec=spec,
        finetuned=None if own is None else digest_json([own.weights, own.config]),
        compute=compute,
    )


def read_version(home: Home, line: str, version: str = "champion") -> ServedVersion:
    """Read a version of a line from the store of a home.

    If the store cannot be reached, the version that this home read last under the same name is
    taken, and a warning names it and the time.

    Args:
        home: the home with the store.
        line: the line's name.
        version: a number, `champion` or `candidate`.

    Raises:
        BadInput: there is no such line or version.
        Damage: its record is damaged.
        Unavailable: the store cannot be reached, and nothing was read before.
    """
    last = home.cache / "served" / f"{digest_json([home.store_name, line, version])}.json"
    try:
        served = _read(home, line, version)
    except Unavailable as error:
        found = _last_read(last)
        if found is None:
            raise
        served, read_at = found
        log.warning(
            "%s; %s is used, which was the %s of the line on %s UTC",
            error.summary,
            served.name,
            version if not version.isdigit() else f"version {version}",
            time.strftime("%Y-%m-%d %H:%M", time.gmtime(read_at)),
        )
        return served
    with explained(last, "write"):
        last.parent.mkdir(parents=True, exist_ok=True)
        partial = last.with_suffix(f".{uuid.uuid4().hex}.partial")
        write_durably(partial, served.model_dump_json().encode())
        partial.replace(last)
    return served


def served_version(home: Home, line_state: LineState, record: MergedRecord) -> ServedVersion:
    """Describe a merged version for a machine that serves it.

    Raises:
        BadInput: the base cannot be read.
    """
    family = get_family(line_state.spec.family)
    objects = ObjectStore(home.open_store())
    folder = resolve_source(line_state.base.uri, home, whole=False).local
    tasks = {}
    for task, member in sorted(record.members.items()):
        known = line_state.tasks[task]
        model = known.versions[member.version].model
        spec = known.spec
        if not spec.has_head:
            continue
        head = None
        if spec.uses_head:
            resolved = family.resolve(folder, listed(spec.head_spec))
            head = _stored_head(objects, line_state, resolved, model)
            if head is None:
                continue
        tasks[task] = ServedTask(
            metric=spec.metric,
            columns=_columns(spec),
            head=head,
            spec=None if spec.uses_head else spec.head_spec,
        )
    space = line_state.spec.space
    assert space != "adapter", "`init` names the modules"
    return ServedVersion(
        store=str(home.store_path) if home.store_is_local else str(home.store_url),
        line=record.line,
        version=record.version,
        record=record.digest,
        created_at=record.created_at,
        family=family.name,
        compute=line_state.spec.compute,
        base=line_state.base,
        patch=record.patch,
        tasks=tasks,
        space=space,
    )


def _read(home: Home, line: str, version: str) -> ServedVersion:
    if home.store_is_local and not home.store_path.is_dir():
        raise Unavailable(
            f"the store {home.store_name} cannot be reached",
            expected="its folder on this machine",
            hint="mount it at this path, or set RESTITCH_STORE to where it is",
        )
    ledger = Ledger(ObjectStore(home.open_store()), line)
    line_state = ledger.state()
    record = ledger.merged(find_version(line_state, version))
    return served_version(home, line_state, record)


def _last_read(file: Path) -> tuple[ServedVersion, float] | None:
    try:
        return ServedVersion.model_validate_json(file.read_bytes()), file.stat().st_mtime
    except (OSError, ValueError):
        return None


def _stored_head(
    objects: ObjectStore, line_state: LineState, resolved: HeadSpec, model: ModelRef
) -> str | None:
    """The digest of a task's head in the store, whichever worker built it."""
    family = get_family(line_state.spec.family)
    compute = line_state.spec.compute
    types = ("float32", "bfloat16") if compute == "auto" else (compute,)
    for each in types:
        inputs = head_inputs(family, line_state.base, resolved, model, each)
        record = objects.lookup("head", digest_json(inputs))
        if record is not None:
            return record.blob
    return None


def _columns(spec: TaskSpec) -> tuple[str, ...]:
    """The columns that a row of a task has."""
    if spec.data is None:
        return ()
    own = (spec.choices_column,) if spec.choices_column is not None else ()
    return (*spec.rows_spec.input, *own)
