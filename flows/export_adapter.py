"""Write the change of a merged version as one LoRA adapter for its base.

    the version's change, matrix by matrix --> all singular values --> a rank for each matrix
    --> the leading triplets --> adapter folder, and what it loses on every task

The ranks are chosen together: of all triplets, those with the most of the squared norm for each
stored number. What an adapter cannot hold is left out and reported: tensors that are not the weight
of a linear layer, such as biases and norms.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from restitch.flows.outcome import Outcome
from restitch.flows.output_folder import appearing, check_free
from restitch.flows.promotion.snapshot import retention_task
from restitch.flows.promotion.versions import members_of, open_version
from restitch.merging.errors import BadInput
from restitch.merging.files.edits import Edits
from restitch.merging.files.factor_file import FactorFile, FactorTensor, write_factors
from restitch.merging.files.lora_file import LoraLayer, write_lora
from restitch.merging.localize.low_rank import change_of, factors_of, squared_singular_values
from restitch.merging.numerics.factors import Factors
from restitch.merging.ranking.allotment import ranks_by_budget, ranks_by_share
from restitch.modeling.device import device
from restitch.modeling.weights import WeightLayer, weight_layers
from restitch.registry.ledger.line_state import LineState
from restitch.registry.ledger.records import MergedRecord
from restitch.registry.sources.hub_upload import check_repository, upload
from restitch.registry.specs.hub_id import is_hub_id, split_pin
from restitch.tasks.evaluate import Exam
from restitch.tasks.inputs.checkpoints import open_base, open_sparse
from restitch.tasks.inputs.live_base import LiveBase, live_base
from restitch.tasks.inputs.task_data import evaluation_split
from restitch.tasks.report.card import adapter_card, public
from restitch.tasks.report.card_fields import hub_models
from restitch.tasks.report.provenance import provenance
from restitch.tasks.report.usage import adapter_usage
from restitch.tasks.runtime.console import working
from restitch.tasks.runtime.refs import LineRef
from restitch.tasks.runtime.workspace import Workspace, workspace

# What PEFT calls the kinds of models that it knows; others need none.
_TASK_TYPES = {"causal-lm": "CAUSAL_LM", "seq2seq-lm": "SEQ_2_SEQ_LM"}


@dataclass(frozen=True)
class AdapterResult(Outcome):
    """The value of one task or benchmark, with the version and with its adapter."""

    metric: str
    count: int
    merged: float | None
    adapter: float


@dataclass(frozen=True)
class AdapterOutcome(Outcome):
    """An adapter that was written, and what it loses.

    Attributes:
        parameters: the number of stored numbers.
        ranks: by module.
        kept: the share of the squared norm of the version's whole change that the adapter holds.
        left_out: the tensors that it cannot hold, with their shares of the squared norm.
        out: the folder; None if the adapter is only on the hub.
        repository: where it is on the hub; `commit` is the address of the commit.
        results: by task.
        retention: on the general benchmark, if the line has one.
    """

    line: str
    version: int
    out: str | None
    files: tuple[str, ...]
    bytes: int
    parameters: int
    kept: float
    ranks: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, float] = field(default_factory=dict)
    results: dict[str, AdapterResult] = field(default_factory=dict)
    retention: AdapterResult | None = None
    repository: str | None = None
    commit: str | None = None


def export_adapter(
    line: str,
    version: str,
    out: Path,
    *,
    rank: int | None = None,
    keep: float | None = None,
    overwrite: bool = False,
) -> AdapterOutcome:
    """Write a merged version as a LoRA adapter.

    Args:
        line: the line's name.
        version: a number, `champion` or `candidate`.
        out: a folder that is absent or empty.
        rank: the mean rank: the adapter has as many parameters as with this rank everywhere.
        keep: the share of the squared norm to keep, instead of a rank.
        overwrite: replace a model in `out`.

    Raises:
        BadInput: there is no such version, `out` is not free, or the version changes no linear
            layer.
    """
    out = out.expanduser().absolute()
    check_free(out, overwrite)
    return _write_adapter(line, version, out, rank, keep)


def push_adapter(
    line: str,
    version: str,
    repository: str,
    out: Path | None = None,
    *,
    rank: int | None = None,
    keep: float | None = None,
    private: bool = False,
    overwrite: bool = False,
) -> AdapterOutcome:
    """Write a merged version as a LoRA adapter, and put it on the hub in one commit.

    Args:
        line: the line's name.
        version: a number, `champion` or `candidate`.
        repository: `OWNER/NAME`; it is created if it does not exist.
        out: a folder that also gets the adapter; absent or empty.
        rank: as for `export_adapter`.
        keep: as for `export_adapter`.
        private: the repository must be private.
        overwrite: replace another model in the repository, and a model in `out`.

    Raises:
        BadInput: as for `export_adapter`; the hub refuses the name, or it holds another model.
        Unavailable: the hub cannot be reached, or needs a token.
    """
    if out is not None:
        out = out.expanduser().absolute()
        check_free(out, overwrite)
    check_repository(repository, line, private=private, overwrite=overwrite, adapter=True)
    with workspace().scratch() as scratch:
        folder = scratch / "adapter" if out is None else out
        made = _write_adapter(line, version, folder, rank, keep, repository)
        message = f"Version {made.version} of line {line} as an adapter"
        with working(f"uploading to {repository}"):
            commit = upload(folder, repository, message, private=private)
    return replace(
        made, out=None if out is None else str(out), repository=repository, commit=commit
    )


def _write_adapter(
    line: str,
    version: str,
    out: Path,
    rank: int | None,
    keep: float | None,
    repository: str | None = None,
) -> AdapterOutcome:
    """Write the adapter of a version; one for the hub names no place of this machine."""
    space = workspace()
    ledger, line_state, record = open_version(line, version)
    base = open_base(LineRef(line_state.spec, line_state.base), space)
    if base.space is not None:
        raise BadInput(
            f"the versions of line {line} are (IA)\u00b3 adapters already",
            expected="a line that merges weights",
            found="a line with `space`",
            hint=f"`restitch export {line} {version} OUT` writes the adapter",
        )
    live = live_base(base, "write an adapter")
    edits = open_sparse(record.patch, space, base.checkpoint)
    layers = {
        name: layer
        for name, layer in weight_layers(live.model, live.parameters).items()
        if name in edits.names
    }
    if not layers:
        raise BadInput(
            f"version {record.version} of line {line} changes no linear layer",
            expected="a version with members",
            found=f"{len(edits.names)} changed tensors",
            hint="export the whole model instead",
        )
    with working("measuring the change") as progress:
        squares = squared_singular_values(base.checkpoint, edits, tuple(layers), device(), progress)
    costs = {name: sum(base.checkpoint.info(name).shape) for name in layers}
    if keep is None:
        budget = sum(min(rank or 0, len(squares[name])) * cost for name, cost in costs.items())
        ranks = ranks_by_budget(squares, costs, budget)
    else:
        ranks = ranks_by_share(squares, costs, keep)
    with working("decomposing the change") as progress:
        factors = dict(factors_of(base.checkpoint, edits, ranks, device(), progress))
    others = {
        name: float(change_of(base.checkpoint, edits, name).double().square().sum())
        for name in edits.names
        if name not in layers
    }
    total = sum(float(each.sum()) for each in squares.values()) + sum(others.values())
    held = sum(float(squares[name][: f.rank].sum()) for name, f in factors.items())
    with appearing(out) as folder:
        parameters = _write(folder, line_state, live, layers, factors)
        with space.scratch() as scratch:
            adapted = _as_edits(scratch / "adapter.safetensors", live, factors)
            results, retention = _measured(line_state, record, live, adapted, space)
        outcome = AdapterOutcome(
            line,
            record.version,
            str(out),
            (),
            0,
            parameters,
            held / total if total else 1.0,
            {layers[name].module: f.rank for name, f in factors.items()},
            {name: square / total for name, square in others.items() if square},
            results,
            retention,
        )
        description = record.to_json() if repository is None else public(record.to_json())
        text = json.dumps(description, indent=2, ensure_ascii=False)
        (folder / "restitch.json").write_text(text + "\n", encoding="utf-8")
        origin = provenance(line_state.base.uri, record, ledger.entries(), space.objects, "")
        source = hub_models([line_state.base.uri])
        use = adapter_usage(
            base.family.name, base.folder, source[0] if source else "BASE", repository or "."
        )
        card = adapter_card(line_state, record, outcome.as_dict(), origin, use)
        (folder / "README.md").write_text(card, encoding="utf-8")
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return replace(
        outcome,
        files=tuple(str(path.relative_to(out)) for path in files),
        bytes=sum(path.stat().st_size for path in files),
    )


def _write(
    folder: Path,
    line_state: LineState,
    live: LiveBase,
    layers: Mapping[str, WeightLayer],
    factors: Mapping[str, Factors],
) -> int:
    """Write the adapter's two files; return the number of its parameters."""
    config = adapter_config(line_state)
    adapted = {
        layers[name].module: LoraLayer(each, layers[name].transposed)
        for name, each in factors.items()
    }
    return write_lora(folder, adapted, _dtype(live, factors), config)


def adapter_config(line_state: LineState) -> dict[str, Any]:
    """The keys of an adapter's configuration that name its base and the kind of model."""
    name, pin = split_pin(line_state.base.uri)
    config: dict[str, Any] = {"base_model_name_or_path": None}
    if is_hub_id(name) and "/" in name and ":" not in name:
        config = {"base_model_name_or_path": name, "revision": pin}
    return {**config, "task_type": _TASK_TYPES.get(line_state.spec.family)}


def _as_edits(path: Path, live: LiveBase, factors: Mapping[str, Factors]) -> FactorFile:
    """The adapter's change, from factors in the type in which it stores them."""
    base, dtype = live.base.checkpoint, _dtype(live, factors)
    tensors = (
        FactorTensor(name, base.info(name).shape, factors[name], dtype)
        for name in base.names
        if name in factors
    )
    write_factors(path, tensors, metadata={})
    return FactorFile.open(path)


def _dtype(live: LiveBase, factors: Mapping[str, Factors]) -> Any:
    """The type of the base's layers, in which adapters are usually stored."""
    return live.base.checkpoint.info(next(iter(factors))).dtype


def _measured(
    line_state: LineState, record: MergedRecord, live: LiveBase, adapted: Edits, space: Workspace
) -> tuple[dict[str, AdapterResult], AdapterResult | None]:
    """The adapter's value on every task that has rows, and on the general benchmark."""
    members = [m for m in members_of(line_state, record) if evaluation_split(m.spec) is not None]
    exams = {m.task: Exam(live.base, m.spec, m.model.model, space) for m in members}
    benchmark = retention_task(line_state)
    general = None
    if benchmark is not None and evaluation_split(benchmark) is not None:
        general = Exam(live.base, benchmark, None, space)
    with live.edited(adapted), working("evaluating the adapter") as progress:
        results = {}
        for done, (task, exam) in enumerate(exams.items(), 1):
            results[task] = _result(exam, record.results[task].merged)
            progress(done, len(exams) + (general is not None))
        if general is None:
            return results, None
        kept = record.retention
        return results, _result(general, None if kept is None else kept.value)


def _result(exam: Exam, merged: float | None) -> AdapterResult:
    found = exam.take()
    return AdapterResult(exam.spec.metric, found.count, merged, found.value)
