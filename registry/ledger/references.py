"""References in a store: line states, the trail and records name blobs by their digests.

A `Reference` says what a blob is and what depends on it, so that damage can be reported with its
consequences and repaired. `digests_in` finds every digest and address in a JSON value,
for garbage collection, which must not remove too much.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from restitch.registry.ledger.finetuned_models import ModelRef, ModelVersion
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.records import Entry, MergedRecord

# record: of a merged version. result: an evaluation. manifest: the list of a model's files.
# listing: the digests of the tensors of a model in a bucket. statistic: what a method needs of a
# member in addition to its delta. experts: the list of a version's specialists. expert: one part.
Role = Literal[
    "record",
    "patch",
    "delta",
    "result",
    "manifest",
    "file",
    "listing",
    "attached",
    "statistic",
    "experts",
    "expert",
]

# The kind of the keys of stored specialists, by the recipe of their version.
SPECIALISTS = "specialists"

# The list of the objects that a purge removes, in the digests of its act.
PURGED = "objects"

# The prefix of a statistic's kind in the digests of an act.
STATISTIC = "statistic."

# A copy of a model in the store, by the digest of the list of its files.
COPY_SCHEME = "store://"
S3_SCHEME = "s3://"
MLFLOW_SCHEMES = ("models:/", "runs:/", "mlflow-artifacts:/")

_DIGEST = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


@dataclass(frozen=True, order=True)
class Reference:
    """Why a blob is in the store.

    Attributes:
        digest: of the blob.
        owner: what depends on it, such as "version 3", "colour 1" or "the base".
        weights: of a result the evaluated weights, such as "grafted"; of a file its name; of a
            statistic its name in the recipe.
        task: the task of the result or delta.
        number: of the merged version or of the task's model.
    """

    digest: str
    role: Role
    line: str
    owner: str
    weights: str = ""
    task: str = ""
    number: int = 0

    @property
    def of_version(self) -> bool:
        """True if a merged version refers to it."""
        return self.owner.startswith("version ")

    def __str__(self) -> str:
        name = {
            "record": "the record",
            "patch": "the patch",
            "statistic": f"the {self.weights}",
            "delta": f"the delta of {self.task}" if self.of_version else "the delta",
            "result": f"the evaluation of {self.weights} on {self.task}",
            "manifest": "the list of files",
            "listing": "the digests of the tensors",
            "file": f"the file {self.weights}",
            "attached": f"the file {self.weights}",
            "experts": "the list of the specialists",
            "expert": f"the specialist of {self.task}"
            if self.task
            else "the shared part of the specialists",
        }[self.role]
        return f"{name} of {self.owner} ({self.line})"


def of_line_state(line_state: LineState) -> Iterator[Reference]:
    """The blobs that a line's state refers to itself, without those of purged models."""
    line = line_state.line
    yield from _of_source(line_state.base, line, "the base")
    for number, record in line_state.versions.items():
        yield Reference(record, "record", line, f"version {number}", number=number)
    for key, model in line_state.models:
        if model.facts.purged is None:
            yield from of_model(line, key.task, key.version, model)


def of_purged_models(line_state: LineState) -> Iterator[Reference]:
    """The blobs that the purged models of a line had."""
    for key, model in line_state.models:
        if model.facts.purged is not None:
            yield from of_model(line_state.line, key.task, key.version, model)


def of_model(line: str, task: str, number: int, model: ModelVersion) -> Iterator[Reference]:
    """The blobs of a finetuned model: its copy, delta, statistics and evaluations."""
    owner = f"{task} {number}"
    yield from _of_source(model.model, line, owner)
    if model.model.uri.startswith(S3_SCHEME):
        yield Reference(model.model.weights, "listing", line, owner, model.model.uri)
    if model.delta is not None:
        yield Reference(model.delta, "delta", line, owner, task=task, number=number)
    for kind, digest in model.facts.statistics.items():
        yield Reference(digest, "statistic", line, owner, f"{kind}/{task}", task, number)
    for name, result in model.facts.results.items():
        yield Reference(result.blob, "result", line, owner, name, task, number)


def _of_source(model: ModelRef, line: str, owner: str) -> Iterator[Reference]:
    if model.uri.startswith(COPY_SCHEME):
        yield Reference(model.uri.removeprefix(COPY_SCHEME), "manifest", line, owner)


def of_acts(entries: Iterable[Entry]) -> Iterator[Reference]:
    """The deltas and statistics that acts have made; models may not refer to them any more."""
    for entry in entries:
        if entry.kind == "purged" and PURGED in entry.digests:
            owner = f"act {entry.sequence}"
            yield Reference(entry.digests[PURGED], "attached", entry.line, owner, "purged.json")
        if "delta" in entry.digests:
            owner = f"act {entry.sequence}"
            yield Reference(entry.digests["delta"], "delta", entry.line, owner)
            for name, digest in entry.digests.items():
                if name.startswith(STATISTIC):
                    kind = name.removeprefix(STATISTIC)
                    yield Reference(digest, "statistic", entry.line, owner, kind)


def of_record(record: MergedRecord) -> Iterator[Reference]:
    """The blobs that the record of a merged version refers to."""
    line, owner, number = record.line, f"version {record.version}", record.version
    yield Reference(record.patch, "patch", line, owner, number=number)
    for task, member in record.members.items():
        yield Reference(member.delta, "delta", line, owner, task=task, number=member.version)
    for name, digest in record.statistics.items():
        task = name.partition("/")[2]
        yield Reference(digest, "statistic", line, owner, name, task, number)
    for task, result in record.results.items():
        for name, digest in result.evaluations.items():
            yield Reference(digest, "result", line, owner, name, task, number)
    if record.retention is not None:
        for name, digest in record.retention.evaluations.items():
            task = record.retention.task
            yield Reference(digest, "result", line, owner, f"{name} (retention)", task, number)
    for name, digest in record.files.items():
        yield Reference(digest, "attached", line, owner, name)


def of_manifest(data: bytes, manifest: Reference) -> Iterator[Reference]:
    """The blobs of a model's files.

    Raises:
        ValueError: it is not a list of files.
    """
    values = json.loads(data)
    if not isinstance(values, dict):
        raise ValueError("not an object")  # noqa: TRY004
    for name, digest in values.get("files", {}).items():
        yield Reference(str(digest), "file", manifest.line, manifest.owner, str(name))


def of_experts(data: bytes, experts: Reference) -> Iterator[Reference]:
    """The parts of a version's specialists.

    Raises:
        ValueError: it is not a list of specialists.
    """
    try:
        values = json.loads(data)
        parts = {task: str(part["blob"]) for task, part in values["tasks"].items()}
        if values["shared"] is not None:
            parts[""] = str(values["shared"]["blob"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a list of specialists: {error!r}") from error
    for task, digest in parts.items():
        yield replace(experts, digest=digest, role="expert", task=task)


def digests_in(value: Any) -> Iterator[str]:
    """Every digest and every address of a stored model in a JSON value."""
    if isinstance(value, str):
        yield from _DIGEST.findall(value)
        if value.startswith((COPY_SCHEME, *MLFLOW_SCHEMES)):
            yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from digests_in(key)
            yield from digests_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from digests_in(inner)
