"""Merge checkpoints once: without a line, and without anything in the store or in MLflow.

    resolve and check the models --> (masks, if the method needs them) --> merge and write,
    tensor by tensor, straight from the checkpoints --> card and recipe

The merged weights have the same bytes as those of a line with the same models, method and settings.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from restitch.flows.export import write_assets
from restitch.flows.lines.init_line import check_kept
from restitch.flows.outcome import Outcome
from restitch.flows.output_folder import appearing, check_free
from restitch.merging.errors import BadInput, CannotJoin
from restitch.merging.files.checkpoint import FLOATING, TensorInfo
from restitch.merging.files.delta import Delta, open_delta
from restitch.merging.files.export import export_weights, in_type
from restitch.merging.files.mapped_file import hashing_ahead
from restitch.merging.files.whole_weights import WholeWeights
from restitch.merging.methods.registry import get_method, method_names, resolve_settings
from restitch.merging.rules.per_matrix import computing_on
from restitch.merging.rules.stitch import DeltaMember
from restitch.modeling.device import device
from restitch.modeling.families.family import Family, get_family
from restitch.modeling.family_choice import only_family
from restitch.modeling.pretrained import load_as_saved
from restitch.modeling.remembered import remembering
from restitch.registry.home import Home
from restitch.registry.ledger.finetuned_models import ModelRef
from restitch.registry.sources.resolve import resolve_source
from restitch.registry.specs.files import merge_of
from restitch.registry.specs.line import LineSpec
from restitch.registry.specs.localize import LocalizeSpec
from restitch.registry.specs.method import MethodSpec
from restitch.registry.specs.once import MergeSpec
from restitch.registry.specs.strict_yaml import checked
from restitch.registry.specs.task import TaskSpec
from restitch.tasks.inputs.checkpoints import Base, describe_model, open_base, open_vector
from restitch.tasks.inputs.live_base import memory_explained
from restitch.tasks.localize import write_delta
from restitch.tasks.report.card import once_card
from restitch.tasks.runtime.console import say, working
from restitch.tasks.runtime.refs import LineRef, Validated
from restitch.tasks.runtime.workspace import Workspace, workspace
from restitch.tasks.validate import validate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Everything is kept: the delta of a model is the model itself.
_EVERYTHING = ("dataless", 1.0)

# Where a configuration names the type of its weights, in new and in older versions of transformers.
_TYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class MergedOnce(Outcome):
    """A model that was merged, or would be.

    Attributes:
        out: the folder; None after a dry run.
        models: by task, with its source, its digest, and what was noticed.
        tensors: the tensors that are merged; the others are the base's.
        dtype: the type of the merged weights; several if the base has several.
        base_dtype: that of the base's weights.
        read: the bytes of all checkpoints.
        written: the bytes of the merged checkpoint.
    """

    out: str | None
    base: dict[str, str]
    family: str
    method: str
    settings: dict[str, Any]
    localize: dict[str, Any]
    models: dict[str, dict[str, Any]]
    tensors: int
    dtype: str
    base_dtype: str
    read: int
    written: int
    files: tuple[str, ...] = field(default=())


class Merge:
    """A merge that was checked, and that `save` and `load` carry out.

    Attributes:
        report: what is merged, and how; after `save` also the files that were written.
    """

    def __init__(self, request: MergeSpec) -> None:
        self._request = request
        self.report = merge_as(request, None, dry_run=True)

    def save(self, out: str | Path, *, overwrite: bool = False) -> MergedOnce:
        """Write the merged model as a Hugging Face folder; the same bytes each time.

        Args:
            out: a folder that is absent or empty.
            overwrite: replace a model in `out`.

        Raises:
            BadInput: `out` is not free, or a model has changed and does not fit any more.
            Unavailable: the disk is full.
        """
        self.report = merge_as(self._request, Path(out), overwrite=overwrite)
        return self.report

    def load(self, dtype: torch.dtype | None = None) -> "PreTrainedModel":
        """The merged model in memory, as transformers loads it.

        Args:
            dtype: of the weights in memory; that of the merge by default.

        Raises:
            BadInput: as `save`.
        """
        with workspace().scratch() as scratch:
            merge_as(self._request, scratch / "merged")
            return load_as_saved(scratch / "merged", dtype)


def merge(
    base: str | Path,
    models: Mapping[str, str | Path],
    method: str,
    *,
    settings: Mapping[str, Any] | None = None,
    localize: Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    family: str | None = None,
    dtype: str | None = None,
) -> Merge:
    """Check finetuned models of one base, and how to merge them; see `restitch merge`.

    Args:
        base: the pretrained checkpoint: a folder, a hub id or an address.
        models: the finetuned models by task.
        method: the name of a merge method that needs no data.
        settings: of the method.
        localize: what is kept of each model, as in a line file; everything by default, if the
            method can merge that.
        include: globs on tensor names that add to the family's localizable tensors.
        exclude: globs on tensor names that are not merged.
        family: of the base; by default the one that fits.
        dtype: of the merged weights: `float32`, `bfloat16` or `float16`; that of the base by
            default. Each weight is rounded once from the float32 result.

    Returns:
        The merge; its `save` or `load` reads and merges the weights.

    Raises:
        BadInput: a model does not fit, or the method needs data.
    """
    request = merge_of(
        {
            "base": str(base),
            "models": {task: str(source) for task, source in models.items()},
            "method": {"name": method, "settings": dict(settings or {})},
            "localize": dict(localize or {}),
            "include": list(include),
            "exclude": list(exclude),
            "family": family,
            "dtype": dtype,
        }
    )
    with hashing_ahead(request.sources):
        return Merge(request)


def merge_as(
    request: MergeSpec, out: Path | None, *, overwrite: bool = False, dry_run: bool = False
) -> MergedOnce:
    """Merge as a file says.

    Args:
        request: the base, the models by task, and the method.
        out: a folder that is absent or empty; not used by a dry run.
        overwrite: replace a model in `out`.
        dry_run: resolve and check everything, and write nothing.

    Raises:
        BadInput: a model does not fit, or the method needs data.
    """
    if out is not None and not dry_run:
        out = out.expanduser().absolute()
        check_free(out, overwrite)
    with _own_store() as space, remembering(space.home.cache / "configurations"):
        line, models = _described(request, space)
        checked = _checked(line, models)
        _tell(checked)
        base = open_base(line, space)
        infos = [base.checkpoint.info(name) for name in base.checkpoint.names]
        dtype = _torch_type(request.dtype)
        written = [in_type(info, dtype) for info in infos]
        found = MergedOnce(
            out=None if dry_run or out is None else str(out),
            base={"source": line.base.uri, "weights": line.base.weights},
            family=line.spec.family,
            method=line.spec.method.name,
            settings=dict(line.spec.method.settings),
            localize={"mode": line.spec.localize.mode, **line.spec.localize.settings},
            models={
                task: {
                    "source": model.uri,
                    "weights": model.weights,
                    "outside_share": checked[task].outside_share,
                    "notes": list(checked[task].notes),
                }
                for task, model in models.items()
            },
            tensors=len(base.names),
            dtype=_types(written),
            base_dtype=_types(infos),
            read=line.base.size + sum(model.size for model in models.values()),
            written=sum(info.nbytes for info in written),
        )
        if dry_run or out is None:
            return found
        with appearing(out) as folder:
            _write(folder, line, base, models, space, dtype)
            recipe = {k: v for k, v in found.as_dict().items() if k not in ("out", "files")}
            text = json.dumps(recipe, indent=2, ensure_ascii=False)
            (folder / "restitch.json").write_text(text + "\n", encoding="utf-8")
            (folder / "README.md").write_text(once_card(found.as_dict()), encoding="utf-8")
    files = sorted(path for path in out.rglob("*") if path.is_file())
    names = tuple(str(path.relative_to(out)) for path in files)
    return MergedOnce(**{**found.__dict__, "files": names})


def _torch_type(name: str | None) -> torch.dtype | None:
    return None if name is None else cast("torch.dtype", getattr(torch, name))


def _types(tensors: Iterable[TensorInfo]) -> str:
    """The types of the weights among some tensors, the most frequent first."""
    types = Counter(info.dtype for info in tensors if info.dtype in FLOATING)
    return ", ".join(str(dtype).removeprefix("torch.") for dtype, _ in types.most_common())


@contextmanager
def _own_store() -> Iterator[Workspace]:
    """A workspace with the user's caches, and a store of its own that is removed afterwards."""
    home = workspace().home
    with tempfile.TemporaryDirectory(dir=home.scratch) as folder:
        yield Workspace(Home(root=home.root, store_url=str(Path(folder) / "store")))


def _described(request: MergeSpec, space: Workspace) -> tuple[LineRef, dict[str, ModelRef]]:
    """The merge as a line that nobody stores, and its models."""
    chosen = get_method(request.method.name)
    settings = resolve_settings(chosen.name, request.method.settings)
    if chosen.needs or chosen.kind != "merged":
        usable = [get_method(name) for name in method_names()]
        raise BadInput(
            f"{chosen.name} cannot merge checkpoints alone",
            expected="one of "
            + ", ".join(m.name for m in usable if not m.needs and m.kind == "merged"),
            found="it needs rows of every task" if chosen.needs else "it gives one model per task",
            hint="choose another method, or make a line with `restitch init`",
        )
    family = _family(request, space)
    base = describe_model(request.base, family, space, whole=True)
    spec = LineSpec(
        line="merge",
        base=base.uri,
        family=family.name,
        method=MethodSpec(name=chosen.name, settings=settings),
        localize=_localize(request, whole=chosen.whole),
    )
    check_kept(spec, chosen)
    line = LineRef(spec, base)
    return line, {
        task: describe_model(source, family, space, line=line)
        for task, source in request.models.items()
    }


def _family(request: MergeSpec, space: Workspace) -> Family:
    if request.family is not None:
        return get_family(request.family)
    base = resolve_source(request.base, space.home, whole=False)
    return only_family(base.local, base.uri)


def _localize(request: MergeSpec, *, whole: bool) -> LocalizeSpec:
    """What is kept of each model: everything by default, if the method can merge that."""
    mode, density = _EVERYTHING
    given = dict(request.localize)
    if not given and whole:
        given = {"mode": mode, "density": density}
    tensors = {"include": list(request.include), "exclude": list(request.exclude)}
    choice = checked(LocalizeSpec, {"mode": mode, **tensors, **given}, "localize")
    if choice.mode not in ("dataless", "subspace") or "auto" in (choice.density, choice.rank):
        raise BadInput(
            "masks cannot be found without data in this way",
            expected="localize: mode dataless with a density, or subspace with a rank",
            found=f"mode {choice.mode}, density {choice.density}, rank {choice.rank}",
            hint="make a line with `restitch init` to localize with rows of the tasks",
        )
    return choice


def _checked(line: LineRef, models: Mapping[str, ModelRef]) -> dict[str, Validated]:
    """What was noticed about each model.

    Raises:
        BadInput: one of them cannot be merged.
    """
    try:
        return {
            task: validate.body(line, TaskSpec(task=task), model) for task, model in models.items()
        }
    except CannotJoin as error:
        # There is no line that goes on without it.
        raise error.of_kind(BadInput) from error


def _tell(checked: Mapping[str, Validated]) -> None:
    """Say what was noticed about the models, and what of their changes is not merged."""
    for task, each in checked.items():
        for note in each.notes:
            say(f"{task}: {note}")
        if each.outside_share:
            names = ", ".join(name for name, _ in each.outside_tensors[:3])
            say(
                f"{task}: {each.outside_share:.1%} of its change is outside of the merged tensors "
                f"(in {names}); add them with --include"
            )


def _write(
    folder: Path,
    line: LineRef,
    base: Base,
    models: Mapping[str, ModelRef],
    space: Workspace,
    dtype: torch.dtype | None,
) -> None:
    """Merge into a folder, holding the models' files open and unchanged."""
    method, settings = get_method(line.spec.method.name), line.spec.method.settings
    choice = line.spec.localize
    whole = method.whole and (choice.mode, choice.density) == _EVERYTHING
    with ExitStack() as stack, space.scratch() as scratch:
        members = []
        for number, (task, model) in enumerate(models.items()):
            _, vector = stack.enter_context(open_vector(line, model, space))
            has_factors = any(vector.finetuned.factors(name) for name in base.names)
            delta: Delta = WholeWeights(vector.finetuned, base.names)
            if not whole or has_factors:
                file = scratch / f"{number}.delta"
                write_delta(file, line, TaskSpec(task=task), model, space)
                delta = open_delta(file, base.checkpoint)
            members.append(DeltaMember(task, delta))
        room = "room for one matrix of every member and intermediate results"
        with computing_on(device()), memory_explained(f"merge by {method.name}", room):
            edits = method(base.checkpoint, members, **settings)
            with working(f"merging {len(members)} models by {method.name}") as progress:
                export_weights(base.checkpoint, edits, folder, dtype=dtype, progress=progress)
    write_assets(base, None, folder)
    if dtype is not None:
        _name_type(folder / "config.json", str(dtype).removeprefix("torch."))


def _name_type(config: Path, dtype: str) -> None:
    """Make a configuration, and those of the parts in it, name the type of the written weights."""

    def named(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            key: dtype if key in _TYPE_KEYS and isinstance(inner, str) else named(inner)
            for key, inner in value.items()
        }

    if config.is_file():
        before = json.loads(config.read_text(encoding="utf-8"))
        if (after := named(before)) != before:
            text = json.dumps(after, indent=2, ensure_ascii=False)
            config.write_text(text + "\n", encoding="utf-8")
