"""The layout of a sparse file: its sections, and the table of each tensor's slices of them.

`sparse` writes and reads files with it. A table is checked against the actual sections before
anything relies on it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from restitch.merging.files.checkpoint import FLOATING
from restitch.merging.files.coordinate_codec import encoded_size
from restitch.merging.files.header import DTYPE_NAMES, DTYPES, count_elements
from restitch.merging.files.quantized import STEP_DTYPE, step_count
from restitch.merging.files.value_codec import packed_size
from restitch.merging.order import by_bytes

FORMATS = ("1", "2", "3", "4")
POSITIONS, FACTORS, STEPS, CODES, PACKED = "positions", "factors", "steps", "codes", "packed"
PACKED_DTYPE = torch.bfloat16
FACTOR_DTYPE = torch.bfloat16  # weights of a mean: 8 bits are precise enough

_DTYPES = {
    FACTORS: FACTOR_DTYPE,
    STEPS: STEP_DTYPE,
    CODES: torch.int8,
    POSITIONS: torch.uint8,
    PACKED: torch.uint8,
}


@dataclass(frozen=True)
class KeptInfo:
    """A tensor of a sparse file: type and shape of the whole, and its number of kept weights."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    kept: int

    @property
    def numel(self) -> int:
        """The number of elements of the whole tensor."""
        return count_elements(self.shape)


@dataclass(frozen=True)
class SectionSlices:
    """The slices of the sections that hold a tensor's coordinates, values, factors and steps.

    Attributes:
        code: of the coordinates.
        others: the number of high bytes that are not frequent, if the values are packed.
    """

    code: str
    positions: slice
    values: slice
    factors: slice
    steps: slice
    others: int | None = None


def rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """The number of row factors and column factors; all that shares the first index is a row."""
    rows = shape[0] if shape else 1
    return rows, count_elements(shape[1:])


def section_dtype(section: str) -> torch.dtype:
    """The element type of a section."""
    return _DTYPES[section] if section in _DTYPES else DTYPES[section.removeprefix("values.")]


def section_order(section: str) -> tuple[int, int, str]:
    """The sort key of sections: wide types first, so that all are aligned."""
    rank = list(_DTYPES).index(section) + 1 if section in _DTYPES else 0
    return -section_dtype(section).itemsize, rank, section


def valid_steps(steps: Tensor) -> bool:
    """True if all steps are finite and at least 0."""
    return bool((steps >= 0).all()) and bool(torch.isfinite(steps).all())


def valid_factors(factors: Tensor) -> bool:
    """True if all factors are finite and positive."""
    return bool((factors > 0).all()) and bool(torch.isfinite(factors).all())


def read_table(
    text: str, *, quantized: bool
) -> tuple[dict[str, KeptInfo], dict[str, SectionSlices]]:
    """The tensors of a table and the slices of each; `ValueError` if the table is not valid."""
    infos: dict[str, KeptInfo] = {}
    parts: dict[str, SectionSlices] = {}
    ends: dict[str, int] = {}

    def following(section: str, size: int) -> slice:
        begin = ends.get(section, 0)
        ends[section] = begin + size
        return slice(begin, begin + size)

    for (kind, extents, count, code), name in table_rows(text):
        dtype, packed, text_of_others = kind.partition(":")
        others = parse_size(text_of_others) if packed else None
        shape = tuple(parse_size(extent) for extent in extents.split("x")) if extents else ()
        kept = parse_size(count)
        if count_elements(shape) >= 1 << 63:
            raise ValueError(f"{name!r} has more elements than a tensor can have")
        infos[name] = KeptInfo(name, DTYPES[dtype], shape, kept)
        parts[name] = SectionSlices(
            code,
            following(POSITIONS, encoded_size(code, kept, count_elements(shape))),
            following(PACKED, packed_size(kept, others))
            if others is not None
            else following(CODES if quantized else dtype, kept),
            following(FACTORS, sum(rows_and_columns(shape))),
            following(STEPS, step_count(shape)),
            others,
        )
    return infos, parts


def table_rows(text: str) -> Iterator[tuple[list[str], str]]:
    """The fields of each row of a table, and its name; `ValueError` unless names are in order."""
    rows = json.loads(text)
    if not isinstance(rows, list):
        raise ValueError("the table is not a list")  # noqa: TRY004
    last: bytes | None = None
    for row in rows:
        *fields, name = str(row).split(" ", 4)
        if last is not None and by_bytes(name) <= last:
            raise ValueError(f"{name!r} is not in name order")
        last = by_bytes(name)
        yield fields, name


def parse_size(text: str) -> int:
    """A number from a table; ValueError if it is not a whole number of at least 0."""
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"{text!r} is not a size")
    return int(text)


def check_sections(
    infos: Mapping[str, KeptInfo],
    parts: Mapping[str, SectionSlices],
    sections: Mapping[str, Tensor],
    version: str,
) -> None:
    """Raise `ValueError` if the sections of a file are not those of its table and format."""
    quantized = version == FORMATS[2]
    with_factors = FACTORS in sections if quantized else version == FORMATS[1]
    if any(part.others is not None for part in parts.values()) != (version == FORMATS[3]):
        raise ValueError(f"format {version} with other values than it has")
    need: dict[str, tuple[torch.dtype, int]] = {POSITIONS: (torch.uint8, 0)}
    for name, info in infos.items():
        if info.dtype not in FLOATING:
            raise ValueError(f"{name!r} has a type that is not floating point")
        part = parts[name]
        if part.others is not None and info.dtype != PACKED_DTYPE:
            raise ValueError(f"{name!r} has packed values of type {info.dtype}")
        need[POSITIONS] = (torch.uint8, part.positions.stop)
        if quantized:
            need[CODES] = (torch.int8, part.values.stop)
            need[STEPS] = (STEP_DTYPE, part.steps.stop)
        elif part.others is not None:
            need[PACKED] = (torch.uint8, part.values.stop)
        else:
            need[f"values.{DTYPE_NAMES[info.dtype]}"] = (info.dtype, part.values.stop)
        if with_factors:
            need[FACTORS] = (FACTOR_DTYPE, part.factors.stop)
    found = {name: (section.dtype, section.numel()) for name, section in sections.items()}
    if found != need:
        raise ValueError(f"sections {found}, but the table requires {need}")
