"""Pretrained folders in Hugging Face's layout, read without running anything from them.

Weights come from safetensors only and become float32; code in the folder is never run and the
network never asked. Tensors keep the names that the folder's own file gives them: a model knows
for each of these names which of its live tensors it is.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.modeling.configs import read_config

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
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
)


class NamedModel(nn.Module):
    """A transformers model that knows its tensors by the names of the file it came from.

    Args:
        inner: the model.
        names: name in the file to name in `inner`.
    """

    def __init__(self, inner: nn.Module, names: Mapping[str, str]) -> None:
        super().__init__()
        self.inner: Any = inner
        self.names = dict(names)

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors by their names in the file."""
        live = live_tensors(self.inner)
        return {name: live[own] for name, own in self.names.items()}


def load_pretrained(
    folder: Path, auto_class: Any, *, prefixes: Sequence[str], required: Sequence[str]
) -> NamedModel:
    """Load a folder as a model of `auto_class`, float32 and in evaluation mode.

    Args:
        folder: config.json with model.safetensors or its shards.
        auto_class: the transformers class with `from_pretrained`.
        prefixes: what a file may carry before all of its names.
        required: globs; a tensor of the file that matches must have a place in the model.

    Raises:
        BadInput: the folder cannot be read as such a model; lists what does not fit.
    """
    import transformers

    if (folder / "adapter_config.json").is_file():
        raise BadInput(
            f"{folder} holds an adapter, which would change the weights in its file",
            hint="merge the adapter into the model and save that",
        )
    config = read_config(folder)
    file = Checkpoint.open(folder)
    # What does not fit is said below, in our words.
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        inner, report = auto_class.from_pretrained(
            str(folder),
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            # Not the configuration's choice: it may name a kernel to fetch and run. This one
            # every architecture has, and its gradients are the same bits every time.
            attn_implementation="eager",
            output_loading_info=True,
        )
    except Exception as error:  # files of somebody else: whatever their readers raise
        raise BadInput(f"{folder} cannot be loaded as a model", found=error) from error
    inner.requires_grad_(False)
    absent = sorted(name for name in report["missing_keys"] if "pooler." not in name)
    if absent:
        raise BadInput(
            f"{folder} lacks {len(absent)} tensors of its architecture",
            details=absent,
            hint="the file must hold the whole model that config.json describes",
        )
    shapes = {name: file.info(name).shape for name in file.names}
    names = match_names(shapes, live_tensors(inner), prefixes)
    lost = [n for n in shapes if n not in names and any(fnmatchcase(n, g) for g in required)]
    if lost:
        raise BadInput(
            f"{folder} has tensors that its architecture has no place for",
            details=lost,
            hint="does config.json belong to these weights?",
        )
    return NamedModel(inner, names).eval()


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name; tied tensors under each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def match_names(
    shapes: Mapping[str, Sequence[int]], live: Mapping[str, Tensor], prefixes: Sequence[str]
) -> dict[str, str]:
    """Which live tensor each name of a file is, by one common prefix on either side.

    The prefix that places most names wins; the plain names win a tie. A name without a place,
    or whose shape differs, is left out.
    """
    best: dict[str, str] = {}
    for candidate in _renamings(prefixes):
        matched = {}
        for name, shape in shapes.items():
            own = _modern(candidate(name))
            if own in live and tuple(live[own].shape) == tuple(shape):
                matched[name] = own
        if len(matched) > len(best):
            best = matched
    return best


def _renamings(prefixes: Sequence[str]) -> Iterable[Any]:
    yield lambda name: name
    for prefix in prefixes:
        yield lambda name, prefix=prefix: name.removeprefix(prefix)
        yield lambda name, prefix=prefix: prefix + name


def _modern(name: str) -> str:
    """Checkpoints from before 2019 call a norm's tensors gamma and beta."""
    stem, _, last = name.rpartition(".")
    if stem.endswith("LayerNorm") and last in ("gamma", "beta"):
        return f"{stem}.{'weight' if last == 'gamma' else 'bias'}"
    return name


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer.

    Raises:
        BadInput: there is none that can be read.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _VOCABULARIES):
        # Without one, transformers would make an empty tokenizer and say nothing.
        raise BadInput(
            f"{folder} has no tokenizer",
            expected=f"one of {', '.join(_VOCABULARIES)}",
            hint="give the whole Hugging Face folder",
        )
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # files of many formats: whatever their readers raise
        raise BadInput(f"{folder} has no tokenizer that can be read", found=error) from error


def asset_files(folder: Path) -> tuple[str, ...]:
    """Which configuration, tokenizer and processor files a folder has, sorted."""
    return tuple(name for name in _ASSETS if (folder / name).is_file())
