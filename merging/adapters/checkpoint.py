"""An adapter as a checkpoint: its tensors are computed from the base's when they are read.

`AdapterCheckpoint.read` opens the base's headers and the adapter's files. A tensor that the adapter
does not touch is the base's own, mapped; the others are computed in float32, rounded once to the
base's type, and not kept. Nothing is written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from restitch.merging.adapters.config import CONFIG, AdapterConfig, read_config
from restitch.merging.adapters.names import (
    MAGNITUDE,
    VECTOR,
    AdapterNames,
    Aliases,
    fit_names,
    sort_names,
    twice,
    vector_name,
)
from restitch.merging.adapters.updates import Part, Scale, Update, low_rank, scale
from restitch.merging.digests import canonical_json, digest_bytes
from restitch.merging.errors import BadInput, shortlist
from restitch.merging.files.checkpoint import FLOATING, Checkpoint, TensorInfo
from restitch.merging.files.plain_weights import described, is_buffer, is_factor
from restitch.merging.files.shards import CONVERT_ADAPTER, choose_shards, is_adapter_file
from restitch.merging.numerics.factors import Factors
from restitch.merging.numerics.rounding import cast, round_once
from restitch.merging.order import by_bytes
from restitch.merging.progress import Progress

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class _Change:
    """How one tensor differs from the base's.

    Attributes:
        update: applied to the base's values, or to `whole`.
        whole: the name in the adapter's file of values that replace the base's.
        vector: the name in the adapter's file of the vector of (IA)^3 that scales a matrix.
    """

    update: Update | None = None
    whole: str | None = None
    vector: str | None = None


class AdapterCheckpoint(Checkpoint):
    """A base with an adapter on it; make one with `read`.

    Attributes:
        base: the checkpoint of the base.
        config: the adapter's configuration.
        size: the bytes of the adapter's tensors.
        touched: the names of the tensors that differ from the base's, or that it lacks.
    """

    def __init__(
        self,
        path: Path,
        base: Checkpoint,
        weights: Checkpoint,
        config: AdapterConfig,
        infos: Mapping[str, TensorInfo],
        changes: Mapping[str, _Change],
        origins: Mapping[str, str],
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__(path, infos, {}, weights.files, {}, {}, base.shard_metadata, notes=notes)
        self.base = base
        self.config = config
        self.size = weights.nbytes
        self.touched = tuple(name for name in self.names if name in changes)
        self._weights = weights
        self._changes = dict(changes)
        self._origins = dict(origins)

    @classmethod
    def read(
        cls,
        folder: Path,
        base: Checkpoint,
        *,
        prefixes: Sequence[str] = (),
        where: str | None = None,
        aliases: Aliases | None = None,
    ) -> "AdapterCheckpoint":
        """Open the folder of an adapter.

        Args:
            folder: holds `adapter_config.json` and `adapter_model.safetensors`, or whole weights
                with the factors next to the frozen ones.
            base: the base that the adapter was trained on.
            prefixes: what the names of either side may have before all of them.
            where: the adapter's name in messages.
            aliases: gives other names of the base's tensors, such as those in a loaded model.

        Raises:
            BadInput: it is an adapter of another kind, is damaged, or does not fit the base.
        """
        where = where or str(folder)
        config = read_config(folder, where)
        frozen = holds_factors(folder)
        weights = _with_frozen(folder, where) if frozen else _open_weights(folder, where)
        _check_types(weights, where)
        names = sort_names(weights.names, base.names, where)
        fitted = fit_names(names, base.names, prefixes, where, aliases)
        return cls._made(folder, base, weights, config, names, fitted, where)

    @classmethod
    def _made(
        cls,
        folder: Path,
        base: Checkpoint,
        weights: Checkpoint,
        config: AdapterConfig,
        names: AdapterNames,
        fitted: Mapping[str, str],
        where: str,
    ) -> "AdapterCheckpoint":
        infos = {name: base.info(name) for name in base.names}
        changes: dict[str, _Change] = {}
        for own, stored in sorted(names.whole.items(), key=lambda item: by_bytes(item[0])):
            new, info = fitted[own], weights.info(stored)
            if new in changes:
                raise twice(where, new, f"{changes[new].whole}, {stored}")
            known = new in infos and infos[new].dtype in FLOATING
            dtype = infos[new].dtype if known else info.dtype
            infos[new] = TensorInfo(new, dtype, info.shape)
            changes[new] = _Change(whole=stored)
        problems = []
        turned = is_turned(base, otherwise=config.transposed)
        for module in sorted(names.parts, key=by_bytes):
            parts = {
                part: Part(weights.info(name).shape, partial(weights.tensor, name))
                for part, name in names.parts[module].items()
            }
            new, bias = fitted[f"{module}.weight"], fitted[f"{module}.bias"]
            made = _update(module, parts, infos[new].shape, config, turned)
            if isinstance(made, str):
                problems.append(f"{module}: {made}")
                continue
            vector = names.parts[module].get(VECTOR)
            changes[new] = replace(changes.get(new, _Change()), update=made, vector=vector)
            outputs = _of_outputs(parts, infos.get(bias))
            if outputs is not None:
                changes[bias] = replace(changes.get(bias, _Change()), update=outputs)
        if problems:
            raise BadInput(
                f"{where} does not fit its configuration and the base",
                expected="the factors that its configuration describes, of the base's shapes",
                found=f"{len(problems)} of {len(names.parts)} modules that do not fit",
                details=problems,
                hint="register an adapter that was trained on this base, saved by PEFT's "
                "save_pretrained",
            )
        origins = {name: name for name in infos if name in base}
        return cls(folder, base, weights, config, infos, changes, origins)

    def tensor(self, name: str) -> Tensor:
        """The base's own tensor, or a computed one."""
        change = self._changes.get(name)
        if change is None:
            return self.base.tensor(self._origins[name])
        info = self._infos[name]
        before = (
            self.base.tensor(self._origins[name])
            if change.whole is None
            else self._weights.tensor(change.whole)
        )
        if info.dtype not in FLOATING:
            after = before.reshape(-1)
        elif change.update is None:
            after = round_once(before.reshape(-1)[: info.numel], info.dtype)
        else:
            after = updated(before, change.update, info.dtype)[: info.numel]
        return after.view(info.shape)

    def is_known_as(self, other: Checkpoint, name: str) -> bool:
        """True for a tensor that the adapter does not touch, compared with its base."""
        origin = self._origins.get(name)
        return other is self.base and origin == name and name not in self._changes

    def factors(self, name: str) -> Factors | None:
        """The whole change of a tensor as factors; that of a convolution counts as [out, rest].

        None if the adapter does not change the tensor, or not by such a product alone.
        """
        change = self._changes.get(name)
        if change is None or change.whole is not None or change.update is None:
            return None
        return change.update.factors()

    @property
    def replaced(self) -> tuple[str, ...]:
        """The tensors that the adapter has as a whole."""
        return tuple(n for n in self.touched if self._changes[n].whole is not None)

    def check_finite(self, where: str) -> None:
        """Refuse an adapter with NaN or infinity; only its own tensors are read.

        Raises:
            BadInput: it has such numbers; names the tensors.
        """
        bad = []
        for name in self._weights.names:
            values = self._weights.tensor(name)
            if count := int((~torch.isfinite(values)).sum()):
                bad.append(f"{name}: {count} of {values.numel()}")
        if bad:
            raise BadInput(
                f"{where} holds an adapter with numbers that are not finite",
                expected="finite factors",
                found=f"NaN or infinity in {len(bad)} of {len(self._weights.names)} tensors",
                details=bad,
                hint="train the adapter again, perhaps with a smaller learning rate",
            )

    def vectors(self) -> Checkpoint:
        """The vectors of (IA)^3 as they are stored, by `names.vector_name`."""
        stored = {name: change.vector for name, change in self._changes.items()}
        vectors = {old: vector_name(name) for name, old in stored.items() if old is not None}
        return self._weights.renamed(vectors)

    def tensor_bytes(self, name: str) -> memoryview:
        """The bytes of a tensor."""
        if name not in self._changes:
            return self.base.tensor_bytes(self._origins[name])
        flat = self.tensor(name).view(-1)
        raw = flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)
        return raw.numpy().data

    def tensor_digest(self, name: str) -> str:
        """The digest of one tensor's bytes."""
        return digest_bytes(self.tensor_bytes(name))

    def listing(self, progress: Progress | None = None) -> bytes:
        """The digests of the adapter's tensors and of the base, and what its configuration says.

        Nothing is computed, and the digest of the listing is the checkpoint's digest.
        """
        if self._listing is None:
            values = {
                "adapter": self._weights.digest(progress),
                "config": self.config.used(),
                "base": self.base.digest(),
            }
            self._listing = canonical_json(values)
        return self._listing

    def renamed(
        self, mapping: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> "AdapterCheckpoint":
        """The tensors named in `mapping` under their new names; the others are left out.

        Args:
            mapping: new name by old name.
            shapes: by new name, of tensors of which only the first elements are wanted.
        """
        infos = {new: replace(self._infos[old], name=new) for old, new in mapping.items()}
        for name, shape in (shapes or {}).items():
            infos[name] = replace(infos[name], shape=shape)
        if len(set(mapping.values())) != len(mapping):
            raise ValueError("two tensors cannot have the same new name")
        return AdapterCheckpoint(
            self.path,
            self.base,
            self._weights,
            self.config,
            infos,
            {new: self._changes[old] for old, new in mapping.items() if old in self._changes},
            {new: self._origins[old] for old, new in mapping.items() if old in self._origins},
            self.notes,
        )


def updated(before: Tensor, update: Update, dtype: torch.dtype) -> Tensor:
    """The flat values after an update of the base's, computed in float32 or wider, rounded once."""
    wide = torch.float64 if torch.float64 in (before.dtype, dtype) else torch.float32
    after = update.apply(cast(before.reshape(-1), wide).view(before.shape))
    return round_once(after.view(-1), dtype)


def _open_weights(folder: Path, where: str) -> Checkpoint:
    names = sorted(path.name for path in folder.iterdir() if is_adapter_file(path.name))
    if WEIGHTS not in names:
        pickled = any(name.endswith(".bin") for name in names)
        raise BadInput(
            f"{where} holds an adapter without {WEIGHTS}",
            expected=WEIGHTS + " (opening a pickle can run code)" * pickled,
            found=shortlist(names),
            hint=CONVERT_ADAPTER if pickled else "give the whole folder of the adapter",
        )
    return Checkpoint.from_files(folder, {WEIGHTS: folder / WEIGHTS})


def holds_factors(folder: Path) -> bool:
    """True if a folder has the configuration of an adapter, and its factors among whole weights.

    A training that saves the state of the whole model writes such folders.
    """
    names = [path.name for path in folder.iterdir()]
    if [name for name in names if is_adapter_file(name)] != [CONFIG]:
        return False
    try:
        weights = _with_frozen(folder, str(folder))
    except BadInput:
        return False
    return any(is_factor(component) for name in weights.names for component in name.split("."))


def _with_frozen(folder: Path, where: str) -> Checkpoint:
    """Open whole weights with the factors of an adapter next to the frozen ones."""
    names = [path.name for path in folder.iterdir() if path.name != CONFIG]
    shards = choose_shards(where, folder, names).names
    return Checkpoint.from_files(folder, {name: folder / name for name in shards})


def _check_types(weights: Checkpoint, where: str) -> None:
    """Refuse quantized factors and weights.

    Raises:
        BadInput: there are some; names them.
    """
    other = [weights.info(name) for name in weights.names]
    other = [info for info in other if info.dtype not in FLOATING and not is_buffer(info)]
    if other:
        raise BadInput(
            f"{where} holds an adapter in a type that is not supported",
            expected="factors in float32, bfloat16, float16 or float64",
            found=f"{len(other)} of {len(weights.names)} tensors",
            details=[described(info) for info in other],
            hint="save the adapter again without quantization",
        )


def _update(
    module: str,
    parts: Mapping[str, Part],
    shape: tuple[int, ...],
    config: AdapterConfig,
    turned: bool,
) -> Update | str:
    """The change of a module's weights, or what is wrong with it."""
    if (VECTOR in parts) != (config.kind == "IA3") or (VECTOR in parts and len(parts) > 1):
        return f"{', '.join(sorted(parts))} in an adapter with peft_type {config.kind}"
    if config.kind == "IA3":
        return scale(parts[VECTOR], shape, turned)
    if (MAGNITUDE in parts) != config.dora:
        has = "has" if MAGNITUDE in parts else "lacks"
        return f"{has} {MAGNITUDE}, with use_dora: {str(config.dora).lower()}"
    rank, scaling = config.rank_of(module), config.scaling(module)
    return low_rank(parts, shape, rank, scaling, turned)


def _of_outputs(parts: Mapping[str, Part], bias: TensorInfo | None) -> Update | None:
    """The change of a bias by a vector of (IA)^3 that scales the outputs of its module."""
    if VECTOR not in parts or bias is None or parts[VECTOR].shape != (bias.numel, 1):
        return None
    return Scale(parts[VECTOR].read, bias.shape)


def is_turned(base: Checkpoint, *, otherwise: bool) -> bool:
    """True if the base's square matrices are [in, out], as those of GPT-2's layers are.

    PEFT asks for the class of a layer and corrects `fan_in_fan_out` if it is wrong. Here the biases
    of other matrices in numbered layers tell it: they have the size of a layer's output.
    """
    for name in base.names:
        *stem, last = name.split(".")
        bias = ".".join((*stem, "bias"))
        shape = base.info(name).shape
        matrix = last == "weight" and len(shape) == 2 and any(map(str.isdigit, stem))
        if matrix and shape[0] != shape[1] and bias in base:
            outputs = base.info(bias).shape
            if outputs in (shape[:1], shape[1:]):
                return outputs == shape[1:]
    return otherwise
