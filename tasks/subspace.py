"""Keep a finetuned model as a subspace: the leading singular triplets of its task vector.

A line gives the share of each matrix's rank to keep, a budget for the bytes, or `rank: auto`, the
lowest share that recovers the finetuned model on validation rows (`tasks.recovery`). The triplets
are computed once, at the highest share; lower ones keep the first of them.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from restitch.merging.files.factor_file import (
    FactorFile,
    FactorsInfo,
    FactorTensor,
    write_factors,
)
from restitch.merging.localize.dataless import kept_count
from restitch.merging.localize.subspace import NAME, VERSION, cut, localize_subspace
from restitch.merging.numerics.bisection import geometric
from restitch.merging.ranking.score_tensors import fingerprint
from restitch.merging.ranking.task_vector import TaskVector
from restitch.modeling.device import device
from restitch.registry.ledger.finetuned_models import ModelRef
from restitch.registry.specs.localize import DEFAULT_RANK, LocalizeSpec
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.checkpoints import Base
from restitch.tasks.inputs.task_data import has_validation
from restitch.tasks.recovery import Recovery
from restitch.tasks.runtime.console import say, warn, working
from restitch.tasks.runtime.refs import WrittenDelta
from restitch.tasks.runtime.workspace import Workspace

# Shares of the rank that are tried: the lowest keeps a hundredth, or one triplet.
_LOWEST = 0.01


@dataclass(frozen=True)
class Subspace:
    """The subspace that a line keeps of one finetuned model.

    Attributes:
        recorded: the rank that validation rows chose before, to write the same bytes again.
    """

    choice: LocalizeSpec
    task: TaskSpec
    base: Base
    model: ModelRef
    space: Workspace
    recorded: int | None = None

    def __post_init__(self) -> None:
        if self.choice.rank == "auto" and not self.is_measured:
            warn(
                f"task {self.task.task} has no validation rows to choose a rank by: "
                f"using a share of {DEFAULT_RANK:.1%}"
            )

    @property
    def label(self) -> str:
        """Its name and version, for display."""
        return f"{NAME}/{VERSION}"

    @property
    def fingerprint(self) -> JsonValue:
        """Decompositions have equal bytes only with the same torch, device and threads."""
        return fingerprint(device())

    @cached_property
    def is_measured(self) -> bool:
        """True if validation rows choose the rank."""
        return self.choice.rank == "auto" and has_validation(self.task, self.base.family)

    def inputs(self) -> dict[str, Any]:
        """All that determines the subspace in addition to the models and the tensors."""
        inputs: dict[str, Any] = {"rank": self._highest, "stored": self.choice.values}
        if self.choice.budget is not None:
            inputs["budget"] = self.choice.budget
        if self.is_measured:
            inputs |= self._recovery.inputs()
        return {"localizer": {"name": NAME, "version": VERSION}, "subspace": inputs}

    def write(
        self, file: Path, vector: TaskVector, base: Base, metadata: Mapping[str, str]
    ) -> WrittenDelta:
        """Write the factors of a task vector; temporary files go to the same folder."""

        def write(tensors: Iterable[FactorTensor], to: Path = file) -> FactorsInfo:
            return write_factors(to, tensors, metadata=metadata)

        own = {name for name in vector.names if vector.finetuned.factors(name) is not None}
        if own:
            say(f"{self.task.task}: {len(own)} tensors keep the adapter's own factors, exactly")
        chooses = self.choice.budget is not None or self.is_measured
        values = "exact" if chooses else self.choice.values
        first = file.with_name("triplets.safetensors") if chooses else file
        with working(f"localizing {self.task.task}") as progress:
            found = localize_subspace(
                vector, self._highest, values, device=device(), progress=progress
            )
            info = write(found, first)
        facts: dict[str, Any] = {"calibrated_with": "nothing", "calibration_rows": 0}
        if chooses:
            triplets = FactorFile.open(first)
            ranks = [
                min(triplets.info(name).rows_and_columns)
                for name in triplets.names
                if triplets.info(name).rank is not None and name not in own
            ]
            largest = max(ranks, default=1)

            def written(rank: int) -> FactorFile:
                write(cut(triplets, own, rank / largest, self.choice.values))
                return FactorFile.open(file)

            rank, choice = self._choose(kept_count(self._highest, largest), largest, written)
            info = write(cut(triplets, own, rank / largest, self.choice.values))
            facts |= choice
            first.unlink()
        subspace = FactorFile.open(file).content_digest()
        return WrittenDelta(info.digest, subspace, info.kept, vector.coordinates, facts)

    @property
    def _highest(self) -> float:
        rank = self.choice.rank
        if rank != "auto":
            assert rank is not None
            return rank
        if not self.is_measured:
            return DEFAULT_RANK
        assert self.choice.max_rank is not None
        return self.choice.max_rank

    @property
    def _recovery(self) -> Recovery:
        assert self.choice.recovery is not None
        return Recovery(self.choice.recovery, self.task, self.base, self.model, self.space)

    def _choose(
        self, most: int, largest: int, written: Callable[[int], FactorFile]
    ) -> tuple[int, dict[str, Any]]:
        """The rank of the largest matrix to keep, within the budget, and how it was chosen."""
        facts: dict[str, Any] = {}
        if self.recorded is not None:
            return self.recorded, facts
        most = max(1, most)
        budget = self.choice.budget
        if budget is not None:
            sizes = range(1, most + 1)
            fits = bisect_right(sizes, budget, key=lambda rank: written(rank).path.stat().st_size)
            if fits == 0:
                warn(
                    f"the subspace of {self.task.task} keeps one triplet of each matrix, more than "
                    f"its budget of {budget:,} bytes"
                )
            most = max(1, fits)
            facts["budget"] = {"bytes": budget, "fits": most}
        if not self.is_measured:
            return most, facts
        recovery = self._recovery.search(
            geometric(max(1, min(most, kept_count(_LOWEST, largest))), most),
            written,
            lambda rank: rank / largest,
            "the subspace",
            "of each matrix's rank",
        )
        return int(recovery["kept"]), {**facts, "recovery": recovery}
