"""Casts between the types of checkpoints: rounded once, and in the calling thread.

Torch casts float64 to bfloat16 and float16 through float32, which rounds twice: a value
close to the middle of two neighbours can end at the wrong one. `round_once` rounds to odd
in float32, which preserves what the second rounding needs. All work is done in pieces so
short that torch does not start other threads: on busy cores, waiting for them takes many
times longer than the work.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SERIAL = 1 << 15  # up to this many elements torch works in the calling thread
_PIECE = 1 << 18  # elements that stay in a core's cache from one step to the next


def cast_into(out: Tensor, flat: Tensor) -> None:
    """Copy `flat` to the start of `out`, both flat, with the same result as torch's casts."""
    if flat.dtype == torch.bfloat16 and out.dtype == torch.float32:
        _widen(out.view(torch.int32).numpy(), flat.view(torch.int16).numpy())
        return
    for start in range(0, flat.numel(), SERIAL):
        piece = flat[start : start + SERIAL]
        out[start : start + piece.numel()].copy_(piece)


def _widen(out: NDArray[np.int32], flat: NDArray[np.int16]) -> None:
    """bfloat16 as float32: the same bits, with zeros behind them."""
    for start in range(0, len(flat), _PIECE):
        piece = flat[start : start + _PIECE]
        wide = out[start : start + len(piece)]
        np.copyto(wide, piece)
        np.left_shift(wide, 16, out=wide)


def cast(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """A flat tensor in `dtype` by torch's own cast; exact if `dtype` is wider."""
    if flat.dtype == dtype or flat.numel() <= SERIAL:
        return flat.to(dtype)
    out = torch.empty(flat.numel(), dtype=dtype)
    cast_into(out, flat)
    return out


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Flat values in `dtype`, each rounded to nearest, ties to even, exactly once."""
    if values.dtype != torch.float64 or dtype not in (torch.bfloat16, torch.float16):
        return cast(values, dtype)
    out = torch.empty(values.numel(), dtype=dtype)
    for start in range(0, values.numel(), SERIAL):
        piece = values[start : start + SERIAL]
        out[start : start + piece.numel()] = _to_odd(piece)
    return out


def _to_odd(values: Tensor) -> Tensor:
    """float64 as float32, with the lowest bit set where the value is not exact."""
    near = values.to(torch.float32)
    bits = near.view(torch.int32)
    bits -= (near.abs() > values.abs()).to(torch.int32)  # toward zero first
    bits |= (near.to(torch.float64) != values).to(torch.int32)
    return near
