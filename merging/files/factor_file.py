"""The factor file: a member's task vector as a subspace, two factors per matrix.

Format 1 is a safetensors file of kind `factors`. Its table `restitch.tensors` is a JSON list of
"TYPE SHAPE RANK SCALE NAME" in name order. A matrix has a left factor (rows x rank) and a right
one (rank x columns), row by row, whose product times SCALE is its task vector; all that shares the
first index of a tensor is a row. Other tensors have the rank `-` and hold their task vector. TYPE
is the type of the stored numbers, which lie in the section `values.TYPE` one tensor after the
other. Of type I8 are factors in 8 bits: `codes`, and in `steps` one bfloat16 per column of the left
and per row of the right factor. The bytes are a function of the content alone.
"""

import json
import math
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from restitch.merging.digests import digest_bytes
from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import FLOATING, Checkpoint
from restitch.merging.files.header import DTYPE_NAMES, DTYPES, count_elements, write_header
from restitch.merging.files.sparse import damage, write_sections
from restitch.merging.files.sparse_layout import parse_size, table_rows
from restitch.merging.numerics.bitwise import as_integers
from restitch.merging.numerics.factors import STEP_DTYPE, Factors, from_8_bits, in_8_bits
from restitch.merging.numerics.rounding import cast, round_once
from restitch.merging.order import by_bytes

FORMAT = "1"
KIND = "factors"
CODES, STEPS = "codes", "steps"

_TYPES = {CODES: torch.int8, STEPS: STEP_DTYPE}
_NO_RANK = "-"
_DENSE = "1.0"


@dataclass(frozen=True)
class FactorTensor:
    """One tensor to write.

    Attributes:
        shape: of the whole tensor.
        vector: its task vector, as factors or as a tensor of this shape.
        dtype: the type of the stored numbers; int8 for factors in 8 bits.
    """

    name: str
    shape: tuple[int, ...]
    vector: Factors | Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class FactorInfo:
    """A tensor of a factor file.

    Attributes:
        dtype: the type of the stored numbers.
        shape: of the whole tensor.
        rank: of its factors; None if the task vector itself is stored.
        scale: the factor of their product.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    rank: int | None
    scale: float

    @property
    def numel(self) -> int:
        """The number of elements of the whole tensor."""
        return count_elements(self.shape)

    @property
    def rows_and_columns(self) -> tuple[int, int]:
        """The shape as a matrix; all that shares the first index is a row."""
        return self.shape[0], count_elements(self.shape[1:])

    @property
    def kept(self) -> int:
        """The number of stored numbers."""
        return self.numel if self.rank is None else self.rank * sum(self.rows_and_columns)


@dataclass(frozen=True)
class FactorsInfo:
    """A written file: its size, its digest, and the number of numbers that it keeps."""

    bytes: int
    digest: str
    kept: int


def write_factors(
    path: Path, tensors: Iterable[FactorTensor], *, metadata: Mapping[str, str]
) -> FactorsInfo:
    """Write a factor file atomically and durably; tensors of rank 0 are omitted.

    Args:
        path: the file to write; its folder must exist.
        tensors: sorted by name, with finite numbers.
        metadata: more text for the metadata.
    """
    table: list[str] = []
    kept = 0
    last = b""
    with ExitStack() as stack:
        spools: dict[str, IO[bytes]] = {}

        def spool(section: str, data: Tensor) -> None:
            if section not in spools:
                spools[section] = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
            flat = data.contiguous().view(-1).view(torch.uint8)
            spools[section].write(flat.numpy().data)

        for tensor in tensors:
            name = by_bytes(tensor.name)
            if table and name <= last:
                raise ValueError(f"{tensor.name!r} is not in name order")
            info = _info_of(tensor)
            if info.rank == 0:
                continue
            last = name
            for section, data in _parts(tensor):
                spool(section, data)
            kept += info.kept
            table.append(_row(info))
        order = sorted(spools, key=_section_order)
        sections = [
            (section, _section_type(section), (spools[section].tell() // _itemsize(section),))
            for section in order
        ]
        own = {
            "restitch.format": FORMAT,
            "restitch.kind": KIND,
            "restitch.tensors": json.dumps(table, separators=(",", ":"), ensure_ascii=False),
        }
        header = write_header(sections, dict(sorted({**metadata, **own}.items())))
        size, digest = write_sections(path, header, [spools[section] for section in order])
    return FactorsInfo(bytes=size, digest=digest, kept=kept)


def _info_of(tensor: FactorTensor) -> FactorInfo:
    vector = tensor.vector
    factors = vector if isinstance(vector, Factors) else None
    rank, scale = (None, 1.0) if factors is None else (factors.rank, factors.scale)
    info = FactorInfo(tensor.name, tensor.dtype, tensor.shape, rank, scale)
    if factors is not None:
        found = (factors.left.shape[0], factors.right.shape[1])
        fits = len(tensor.shape) > 1 and found == info.rows_and_columns
    else:
        assert isinstance(vector, Tensor)
        fits = tuple(vector.shape) == tensor.shape
    known = tensor.dtype in FLOATING or (tensor.dtype == torch.int8 and factors is not None)
    if not fits or not known or not math.isfinite(scale):
        raise ValueError(f"{tensor.name!r} has a task vector that does not fit it")
    return info


def _parts(tensor: FactorTensor) -> list[tuple[str, Tensor]]:
    """The sections of a tensor with what each holds of it."""
    vector = tensor.vector
    if isinstance(vector, Tensor):
        return [(_values(tensor.dtype), vector.to(tensor.dtype))]
    sides = (vector.left, vector.right)
    if tensor.dtype != torch.int8:
        return [(_values(tensor.dtype), side.to(tensor.dtype)) for side in sides]
    left, left_steps = in_8_bits(vector.left.float())
    right, right_steps = in_8_bits(vector.right.float().mT)
    return [(CODES, left), (CODES, right.mT), (STEPS, left_steps), (STEPS, right_steps)]


def _row(info: FactorInfo) -> str:
    shape = "x".join(map(str, info.shape))
    rank = _NO_RANK if info.rank is None else str(info.rank)
    return f"{DTYPE_NAMES[info.dtype]} {shape} {rank} {info.scale!r} {info.name}"


def _values(dtype: torch.dtype) -> str:
    return f"values.{DTYPE_NAMES[dtype]}"


def _section_type(section: str) -> torch.dtype:
    return _TYPES[section] if section in _TYPES else DTYPES[section.removeprefix("values.")]


def _itemsize(section: str) -> int:
    return _section_type(section).itemsize


def _section_order(section: str) -> tuple[int, str]:
    """Wide types first, so that all sections are aligned."""
    return -_itemsize(section), section


@dataclass(frozen=True)
class _Places:
    """Where the numbers of a tensor begin in its section, and its steps."""

    values: int
    steps: int


class FactorFile:
    """A mapped factor file; make one with `open`. It is an `Edits`: it adds the task vector.

    Attributes:
        names: the tensors that finetuning changed, sorted.
        total: the number of stored numbers.
    """

    kind = "delta"

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, str],
        infos: Mapping[str, FactorInfo],
        places: Mapping[str, _Places],
        sections: Mapping[str, Tensor],
    ) -> None:
        self.path = path
        self.metadata = dict(metadata)
        self.names = tuple(infos)
        self.total = sum(info.kept for info in infos.values())
        self._infos = dict(infos)
        self._places = dict(places)
        self._sections = dict(sections)

    @classmethod
    def open(cls, path: Path) -> "FactorFile":
        """Open a factor file and check its table."""
        path = Path(path)
        file = Checkpoint.open(path)
        metadata = {k: v for k, v in file.metadata.items() if not k.startswith("restitch.")}
        version, kind = (file.metadata.get(f"restitch.{key}") for key in ("format", "kind"))
        if (version, kind) != (FORMAT, KIND):
            raise BadInput(
                f"{path} is not a factor file of a known format",
                expected=f"restitch.format {FORMAT}, restitch.kind {KIND}",
                found=f"format {version}, kind {kind}",
                hint="use the version of restitch that wrote the file, or a newer one",
            )
        try:
            infos, places, need = _read_table(file.metadata["restitch.tensors"])
            sections = {name: file.tensor(name) for name in file.names}
            found = {name: (part.dtype, part.numel()) for name, part in sections.items()}
            if found != need:
                raise ValueError(  # noqa: TRY301
                    f"sections {found}, but the table requires {need}"
                )
        except (KeyError, ValueError, RecursionError) as err:
            raise damage(path, "a valid factor file", str(err)) from err
        return cls(path, metadata, infos, places, sections)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def info(self, name: str) -> FactorInfo:
        """Shape, rank, scale and stored type of a tensor."""
        return self._infos[name]

    def low_rank(self, name: str) -> Factors | None:
        """The factors of a tensor, mapped or restored from 8 bits; None if it has none."""
        info, place = self._infos[name], self._places[name]
        if info.rank is None:
            return None
        rows, columns = info.rows_and_columns
        section = CODES if info.dtype == torch.int8 else _values(info.dtype)
        numbers = self._sections[section][place.values : place.values + info.kept]
        left = numbers[: rows * info.rank].view(rows, info.rank)
        right = numbers[rows * info.rank :].view(info.rank, columns)
        if info.dtype == torch.int8:
            steps = self._sections[STEPS][place.steps : place.steps + 2 * info.rank]
            left = from_8_bits(left, steps[: info.rank])
            right = from_8_bits(right.mT, steps[info.rank :]).mT
        if not (bool(torch.isfinite(left).all()) and bool(torch.isfinite(right).all())):
            raise damage(self.path, "finite factors", f"{name}: NaN or infinity")
        return Factors(left, right, info.scale)

    def difference(self, name: str) -> Tensor:
        """The task vector of a tensor, in its shape: float32, or the stored type if it is wider."""
        info, factors = self._infos[name], self.low_rank(name)
        if factors is not None:
            return factors.product().view(info.shape)
        begin = self._places[name].values
        stored = self._sections[_values(info.dtype)][begin : begin + info.numel]
        if not bool(torch.isfinite(stored).all()):
            raise damage(self.path, "a finite task vector", f"{name}: NaN or infinity")
        wide = torch.float64 if info.dtype == torch.float64 else torch.float32
        return stored.to(wide).view(info.shape)

    def apply(self, name: str, flat: Tensor) -> None:
        """Add the task vector to a flat copy of the base's tensor, and round once.

        Computed in float32, or in the type of the tensor or of the task vector if it is wider, as
        an adapter's weights are. Weights that it does not change keep their bits.
        """
        if flat.shape != (self._infos[name].numel,):
            raise ValueError(f"{name!r} has {self._infos[name].numel} elements, not {flat.numel()}")
        difference = self.difference(name).view(-1)
        wide = torch.promote_types(flat.dtype, difference.dtype)
        after = round_once(cast(flat, wide) + cast(difference, wide), flat.dtype)
        changed = difference.numpy() != 0
        np.copyto(as_integers(flat), as_integers(after), where=changed)

    def content_digest(self) -> str:
        """The digest of the subspace alone: the table and the numbers, without the metadata."""
        rows = [_row(info) for info in self._infos.values()]
        parts: list[Any] = [
            [section, digest_bytes(data.view(torch.uint8).numpy().data)]
            for section, data in sorted(self._sections.items())
        ]
        return digest_bytes(json.dumps([rows, parts]).encode())


def _read_table(
    text: str,
) -> tuple[dict[str, FactorInfo], dict[str, _Places], dict[str, tuple[torch.dtype, int]]]:
    """The tensors of a table, where each lies, and the sections that it requires."""
    infos: dict[str, FactorInfo] = {}
    places: dict[str, _Places] = {}
    ends: dict[str, int] = {}
    for (dtype, extents, rank, scale), name in table_rows(text):
        shape = tuple(parse_size(extent) for extent in extents.split("x")) if extents else ()
        if count_elements(shape) >= 1 << 63:
            raise ValueError(f"{name!r} has more elements than a tensor can have")
        kept_rank = None if rank == _NO_RANK else parse_size(rank)
        info = FactorInfo(name, DTYPES[dtype], shape, kept_rank, float(scale))
        is_code = info.dtype == torch.int8
        if kept_rank is None:
            valid = info.dtype in FLOATING and scale == _DENSE
        else:
            valid = len(shape) > 1 and kept_rank > 0 and (is_code or info.dtype in FLOATING)
        if (
            not valid
            or not math.isfinite(info.scale)
            or _row(info) != " ".join((dtype, extents, rank, scale, name))
        ):
            raise ValueError(f"{name!r} has a row that is not valid")
        section = CODES if is_code else _values(info.dtype)
        places[name] = _Places(ends.get(section, 0), ends.get(STEPS, 0))
        ends[section] = ends.get(section, 0) + info.kept
        if is_code:
            ends[STEPS] = ends.get(STEPS, 0) + 2 * int(kept_rank or 0)
        infos[name] = info
    return infos, places, {name: (_section_type(name), end) for name, end in ends.items()}
