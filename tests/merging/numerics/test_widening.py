"""bfloat16 becomes float32 by moving bits, which gives what torch's own cast gives."""

import torch

from restitch.merging.numerics.rounding import cast, cast_into


def test_every_bfloat16_is_widened_as_by_torch() -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    by_torch = torch.cat([part.to(torch.float32) for part in torch.split(every, 1 << 12)])
    out = torch.full((len(every) + 3,), 7.0)
    cast_into(out, every)
    assert torch.equal(out[:-3].view(torch.int32), by_torch.view(torch.int32))
    assert out[-3:].tolist() == [7.0] * 3
    assert torch.equal(cast(every, torch.float32).view(torch.int32), by_torch.view(torch.int32))
    apart = torch.stack([every, every]).T[:, 0]  # not one after the other in memory
    cast_into(out, apart)
    assert torch.equal(out[:-3].view(torch.int32), by_torch.view(torch.int32))
