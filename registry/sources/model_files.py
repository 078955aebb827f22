"""The files of a model's folder: weights as safetensors, and the other files that are read."""

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from restitch.merging.errors import BadInput, shortlist
from restitch.merging.files.shards import CONVERT_ADAPTER, is_adapter_file

# The files that are read; the model card for the licence. `*/*` excludes subfolders, because the
# `*` of a pattern matches a slash.
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md")
SKIPPED_FILES = ("*/*", "*.fp16.*", "*.bf16.*", "*.onnx*")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
CONVERT = (
    "convert it where you trust it: AutoModel.from_pretrained(ID).save_pretrained(OUT), "
    "then use the folder OUT"
)

File = TypeVar("File")


def model_folder(uri: str, folder: Path) -> Path:
    """The folder of the weights, which MLflow's model format has in a subfolder."""
    folders = sorted({path.parent for path in folder.rglob("*.safetensors")})
    if len(folders) > 1 and folder not in folders:
        raise BadInput(
            f"{uri} contains several models",
            found=", ".join(str(one.relative_to(folder)) for one in folders),
            hint="name the folder of one of them",
        )
    return folder if folder in folders or not folders else folders[0]


def files_of(local: Path) -> dict[str, Path]:
    """The files of a folder, or the one file of a model, by name."""
    if local.is_dir():
        return {path.name: path for path in sorted(local.iterdir()) if path.is_file()}
    # A single file of weights may have any name.
    return {"model.safetensors" if local.suffix == ".safetensors" else local.name: local}


def readable_files(files: dict[str, File]) -> dict[str, File]:
    """The files of a model that are read."""
    return {n: path for n, path in files.items() if any(fnmatch(n, one) for one in MODEL_FILES)}


def check_safetensors(where: str, readable: Iterable[str], files: Iterable[str]) -> None:
    """Refuse a folder without safetensors.

    Raises:
        BadInput: there are none.
    """
    if any(name.endswith(".safetensors") for name in readable):
        return
    names = list(files)
    pickled = any(Path(name).suffix in _PICKLES for name in names)
    raise BadInput(
        f"{where} holds no safetensors",
        found=shortlist(names) or "nothing",
        hint=convert(names) if pickled else "name the folder that holds model.safetensors",
    )


def convert(names: Iterable[str]) -> str:
    """How to convert the pickles among some files to safetensors."""
    return CONVERT_ADAPTER if any(map(is_adapter_file, names)) else CONVERT
