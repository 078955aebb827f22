"""The device that models run on."""

import os

import torch

from restitch.merging.errors import BadInput


def device() -> torch.device:
    """The worker's device: `RESTITCH_DEVICE`, by default CUDA if there is a GPU.

    Raises:
        BadInput: the variable names a device that this machine does not have.
    """
    requested = os.environ.get("RESTITCH_DEVICE", "auto")
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(requested)
    except RuntimeError as error:
        raise BadInput(
            f"RESTITCH_DEVICE={requested!r} is not a device",
            expected="auto, cpu, cuda or cuda:N",
            hint="correct or unset it",
        ) from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(
            f"RESTITCH_DEVICE={requested!r}, but CUDA is not available on this machine",
            hint="set it to auto or cpu, or run on a worker with a GPU",
        )
    return chosen
