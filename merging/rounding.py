"""One correct rounding from float64 to the types of checkpoints.

Torch casts float64 to bfloat16 and float16 through float32, which rounds twice: a value
just beside the middle of two neighbours can end at the wrong one. `round_once` rounds to
odd in between, which keeps what the second rounding needs to know.
"""

import torch
from torch import Tensor


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in `dtype`, each rounded to nearest, ties to even, exactly once."""
    if values.dtype != torch.float64 or dtype not in (torch.bfloat16, torch.float16):
        return values.to(dtype)
    near = values.to(torch.float32)
    bits = near.view(torch.int32)
    # Toward zero first; then the lowest bit says that something was cut off.
    bits -= (near.abs() > values.abs()).to(torch.int32)
    bits |= (near.to(torch.float64) != values).to(torch.int32)
    return near.to(dtype)
