"""Tiny checkpoints, deltas and members for tests; seeded, written in milliseconds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from restitch.merging.files.checkpoint import Checkpoint
from restitch.merging.files.mask import Mask
from restitch.merging.files.sparse import SparseFile, SparseTensor, write_sparse
from restitch.merging.localize.dataless import localize_dataless
from restitch.merging.ranking.task_vector import TaskVector
from restitch.merging.rules.stitch import DeltaMember

SHAPES = {
    "embed.weight": (11, 8),
    "layers.0.attn.weight": (8, 8),
    "layers.0.norm.weight": (8,),
    "layers.1.attn.weight": (8, 8),
    "layers.1.norm.weight": (8,),
}
LOCALIZABLE = ("layers.0.attn.weight", "layers.0.norm.weight", "layers.1.attn.weight")


def base_tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The weights of a tiny model, with an integer buffer."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()
    }
    return {**tensors, "position_ids": torch.arange(5)}


def finetuned_tensors(
    base: Mapping[str, Tensor], seed: int, names: Sequence[str] = LOCALIZABLE
) -> dict[str, Tensor]:
    """The base with noise on the tensors `names`."""
    generator = torch.Generator().manual_seed(1000 + seed)
    tensors = {name: value.clone() for name, value in base.items()}
    for name in names:
        value = tensors[name]
        noise = torch.randn(value.shape, generator=generator) * 0.1
        tensors[name] = (value.float() + noise).to(value.dtype)
    return tensors


def save(folder: Path, tensors: Mapping[str, Tensor], *, shards: int = 1) -> Checkpoint:
    """A checkpoint folder, single or sharded as Hugging Face does it."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return Checkpoint.open(folder)
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[index::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return Checkpoint.open(folder)


def write_delta(path: Path, finetuned: Checkpoint, mask: Mask) -> SparseFile:
    """The sparse delta of a finetuned model under a mask."""

    def kept(name: str) -> SparseTensor:
        coordinates = mask.coordinates(name)
        flat = finetuned.tensor(name).reshape(-1)
        return SparseTensor(name, finetuned.info(name).shape, coordinates, flat[coordinates])

    write_sparse(path, (kept(name) for name in mask.names), kind="delta", metadata={})
    return SparseFile.open(path)


def member(
    folder: Path,
    base: Checkpoint,
    task: str,
    seed: int,
    *,
    density: float = 0.4,
    dtype: torch.dtype | None = None,
) -> DeltaMember:
    """A member finetuned from `base` with noise of `seed`, localized without data."""
    tensors = {name: base.tensor(name) for name in base.names}
    changed = finetuned_tensors(tensors, seed)
    if dtype is not None:
        changed = {k: v.to(dtype) if v.is_floating_point() else v for k, v in changed.items()}
    finetuned = save(folder / f"{task}-{seed}", changed)
    mask = localize_dataless(TaskVector(base, finetuned, LOCALIZABLE), density)
    return DeltaMember(task, write_delta(folder / f"{task}-{seed}.delta", finetuned, mask))
