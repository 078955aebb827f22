"""The files of a pretrained folder next to its weights: tokenizer, image processor, configuration.

They come from the folder alone: no code in it is run, and the network is never used.
"""

from pathlib import Path
from typing import Any

from restitch.merging.errors import BadInput

_ASSETS = (
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)

# The settings for generation.
GENERATION = "generation_config.json"
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
)


def has_tokenizer(folder: Path) -> bool:
    """True if a folder holds a vocabulary."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def load_tokenizer(folder: Path) -> Any:
    """Load the folder's tokenizer.

    Raises:
        BadInput: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        # Without one, transformers makes an empty tokenizer without a warning.
        raise BadInput(
            f"{folder} has no tokenizer",
            expected=f"one of {', '.join(_VOCABULARIES)}",
            hint="give the whole folder in Hugging Face's layout",
        )
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # files of somebody else can raise any error
        raise BadInput(f"the tokenizer of {folder} cannot be read", found=error) from error


def load_image_processor(folder: Path) -> Any:
    """Load the folder's image processor for PIL: torchvision gives other pixels.

    Raises:
        BadInput: there is none, it cannot be read, or it has no variant for PIL.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(
            str(folder), backend="pil", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # files of somebody else can raise any error
        raise BadInput(
            f"the image processor of {folder} cannot be read",
            expected="a valid preprocessor_config.json",
            found=error,
        ) from error
    if getattr(processor, "backend", None) != "pil":
        raise BadInput(
            f"the image processor of {folder} has no variant for PIL",
            found=type(processor).__name__,
        )
    return processor


def asset_files(folder: Path) -> tuple[str, ...]:
    """The configuration, tokenizer and processor files of a folder, sorted."""
    return tuple(name for name in _ASSETS if (folder / name).is_file())


def language_model_files(folder: Path) -> tuple[str, ...]:
    """The files of `asset_files`, and the settings for generation."""
    more = [GENERATION] if (folder / GENERATION).is_file() else []
    return tuple(sorted([*asset_files(folder), *more]))
