"""Writing the parts of a world: model folders, tables of pictures, task and line files.

A part is written under a temporary name and renamed, so it is either complete or missing.
All formats are those of users: folders of `save_pretrained`, parquet with the columns
`image` and `label`, YAML with paths relative to its file.
"""

import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from playground.scenes import SIZE, Ints, Pictures
from playground.skills import Skill
from playground.training import DEVIATION, MEAN

SPLITS = ("train", "validation", "test")


@contextmanager
def part(place: Path, root: Path) -> Iterator[Path]:
    """A temporary path to write to, which is renamed to `place` at the end of the context."""
    draft = root / f".part-{place.relative_to(root).as_posix().replace('/', '-')}"
    if draft.is_dir():
        shutil.rmtree(draft)
    draft.unlink(missing_ok=True)
    yield draft
    place.parent.mkdir(parents=True, exist_ok=True)
    for path in [*draft.rglob("*"), draft]:
        _flush(path)
    draft.replace(place)
    _flush(place.parent)


def _flush(path: Path) -> None:
    """Flush to disk, so that a name never exists without its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """A folder that transformers loads: weights, configuration, tokenizer, image processor."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": SIZE, "width": SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [DEVIATION] * 3,
    }
    text = json.dumps(processor, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


def write_pictures(file: Path, pictures: Pictures, labels: Ints, names: Sequence[str]) -> None:
    """A parquet file with PNG images, as the `datasets` library writes it."""
    import pyarrow as pa
    from pyarrow import parquet

    images = [{"bytes": _png(picture), "path": None} for picture in pictures]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(names), "_type": "ClassLabel"},
    }
    schema = pa.schema(
        {"image": kind, "label": pa.int64()},
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    columns = [pa.array(images, kind), pa.array(labels, pa.int64())]
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns, schema=schema), file)


def _png(picture: Pictures) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def task_text(skill: Skill, data: str, splits: Sequence[str]) -> str:
    """The text of a task's file; `data` is relative to that file."""
    files = {split: f"{split}.parquet" for split in splits}
    return _yaml(
        {
            "task": skill.name,
            "data": {"path": data, **files, "input": "image", "label": "label"},
            "head": {"labels": list(skill.labels), "templates": list(skill.templates)},
        }
    )


def line_text(name: str, density: float) -> str:
    """The text of the line's file."""
    return _yaml(
        {
            "line": name,
            "base": "base",
            "family": "clip",
            "method": "localize-and-stitch",
            "localize": {"mode": "dataless", "density": density},
            "retention": "general.yaml",
        }
    )


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, width=100)
