"""A line and its versions as Python objects: what the commands do, without YAML and a terminal."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from restitch.flows.audit.diff import diff
from restitch.flows.audit.queries import HistoryFilter, history, why
from restitch.flows.decisions import Decision, promote, restore, retire, rollback
from restitch.flows.evaluate import EvaluateOutcome, evaluate_version
from restitch.flows.export import ExportOutcome, export_version
from restitch.flows.lines.init_line import init_line
from restitch.flows.promotion.versions import open_version
from restitch.flows.register import RegisterOutcome, register
from restitch.flows.remerge import RemergeOutcome, remerge
from restitch.flows.research.compare import Comparison, compare
from restitch.flows.storage.verify import Verification, verify
from restitch.modeling.pretrained import load_as_saved
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.records import MergedRecord
from restitch.registry.specs.files import task_of
from restitch.registry.specs.task import TaskSpec
from restitch.serving.served_version import read_version
from restitch.serving.version_folder import version_folder
from restitch.tasks.runtime.workspace import workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Line:
    """A line of this process's `RESTITCH_HOME`.

    Every method does what the command of the same name does, and raises the same errors. Nothing is
    kept in the object: each call reads the line's state again.

    Args:
        name: the line's name.

    Raises:
        BadInput: there is no such line, or it was dropped.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        workspace().ledger(name)

    @classmethod
    def create(cls, line: Path | Mapping[str, Any]) -> "Line":
        """Make a line, or update it as `restitch init` does.

        Args:
            line: the line file, or its keys, such as `{"line": "photos", "base": ..., ...}`.
                Relative paths among keys start at the working directory.
        """
        return cls(init_line(line).line)

    @property
    def state(self) -> LineState:
        """The line's settings, tasks, models and pointers, as stored now."""
        return workspace().ledger(self.name).state()

    @property
    def champion(self) -> "Version":
        """The version in use.

        Raises:
            BadInput: there is none yet.
        """
        return self.version("champion")

    def version(self, version: str | int) -> "Version":
        """A merged version.

        Args:
            version: a number, `champion` or `candidate`.

        Raises:
            BadInput: there is no such version.
        """
        _, _, record = open_version(self.name, str(version))
        return Version(self.name, record)

    def register(
        self,
        task: Path | TaskSpec | Mapping[str, Any],
        model: str | Path,
        *,
        merge: bool = True,
        replace_task: bool = False,
        copy: bool = False,
        here: bool = False,
        wait: bool = False,
        timeout: float | None = None,
        accepted: Mapping[str, str] | None = None,
    ) -> RegisterOutcome:
        """Register a finetuned model; without workers, also onboard it and remerge.

        Args:
            task: the task's file, or its keys, such as `{"task": "sst2", "data": {...}}`.
            model: a folder, a hub id or an address.
            merge: remerge after onboarding.
            replace_task: allow the description of the task to change.
            copy: copy the model's files into the store.
            here: do the work in this process even if there are workers.
            wait: with workers, return when the model is in the champion or was refused.
            timeout: the seconds to wait at most.
            accepted: checks to switch off for this model, each with the reason.
        """
        return register(
            self.name,
            task_of(task) if isinstance(task, Mapping) else task,
            str(model),
            merge=merge,
            replace_task=replace_task,
            copy=copy,
            here=here,
            wait=wait,
            timeout=timeout,
            accepted=accepted,
        )

    def remerge(self, *, force: bool = False) -> RemergeOutcome:
        """Bring the merged model up to date."""
        return remerge(self.name, force)

    def history(self, selection: HistoryFilter | None = None) -> dict[str, Any]:
        """The acts of the line, newest first."""
        return history(self.name, selection or HistoryFilter())

    def compare(self, methods: Sequence[str] = (), *, tune: bool = False) -> Comparison:
        """Merge the members by other methods and measure the results.

        Args:
            methods: their names; all that fit by default.
            tune: choose each method's coefficient on validation rows.
        """
        return compare(self.name, methods=tuple(methods), tuned=tune)

    def diff(self, first: str | int, second: str | int) -> dict[str, Any]:
        """What differs between two versions."""
        return diff(self.name, str(first), str(second))

    def why(self, task: str) -> dict[str, Any]:
        """Why the champion holds the model of a task, or does not."""
        return why(self.name, task)

    def verify(self) -> Verification:
        """Rebuild every version and compare it with what was recorded."""
        return verify(self.name)

    def rollback(self, version: str | int, reason: str) -> Decision:
        """Make an earlier version the champion."""
        return rollback(self.name, str(version), reason)

    def promote(self, version: str | int, reason: str) -> Decision:
        """Make a version the champion although a gate blocks it."""
        return promote(self.name, str(version), reason)

    def retire(self, task: str, reason: str, *, merge: bool = True) -> Decision:
        """Take a task out of the merged model."""
        return retire(self.name, task, reason, merge=merge)

    def restore(self, task: str, reason: str = "", *, merge: bool = True) -> Decision:
        """Take a retired task back."""
        return restore(self.name, task, reason, merge=merge)

    def __repr__(self) -> str:
        return f"Line({self.name!r})"


class Version:
    """A merged version of a line.

    Attributes:
        line: the line's name.
        record: its members, method, results and digests.
    """

    def __init__(self, line: str, record: MergedRecord) -> None:
        self.line = line
        self.record = record

    @property
    def number(self) -> int:
        """Its number in the line."""
        return self.record.version

    @cached_property
    def folder(self) -> Path:
        """A Hugging Face folder with it in this machine's cache; do not write to it.

        Raises:
            Damage: its patch is damaged.
        """
        return version_folder(read_version(workspace().home, self.line, str(self.number)))

    def load(self, dtype: torch.dtype | None = None, task: str | None = None) -> "PreTrainedModel":
        """The merged model in memory, in evaluation mode, as transformers loads it.

        Args:
            dtype: of the weights; that of the base by default.
            task: load the model for this task: the merged model with the task's head as a whole
                classifier, or the task's specialist; as `restitch export --task`.

        Raises:
            BadInput: the version has no such task.
            Damage: its patch is damaged.
        """
        if task is None:
            return load_as_saved(self.folder, dtype)
        with workspace().scratch() as scratch:
            self.export(scratch / "model", task=task)
            return load_as_saved(scratch / "model", dtype)

    def export(
        self,
        out: str | Path,
        *,
        overwrite: bool = False,
        shard_size: str | None = None,
        task: str | None = None,
    ) -> ExportOutcome:
        """Write it as a Hugging Face folder."""
        return export_version(
            self.line,
            str(self.number),
            Path(out),
            overwrite=overwrite,
            shard_size=shard_size,
            task=task,
        )

    def evaluate(self) -> EvaluateOutcome:
        """Measure it on the test rows of all its tasks."""
        return evaluate_version(self.line, str(self.number))

    def __repr__(self) -> str:
        return f"Version({self.line!r}, {self.number})"
