"""Load pretrained folders in Hugging Face's layout, without running anything from them.

Weights come from safetensors only and get one type; code in the folder is never run and the
network never used. Tensors keep their names in the folder's own file: a model maps each of these
names to one of its live tensors.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from restitch.merging.errors import BadInput
from restitch.merging.files.checkpoint import Checkpoint
from restitch.modeling.configs import read_config
from restitch.modeling.joined_tensors import (
    JoinedTensor,
    converts_tensors,
    joined_tensors,
    pieces_of,
)
from restitch.modeling.pretrained_files import load_tokenizer
from restitch.modeling.tensor_names import live_tensors, match_names, matched_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Not the configuration's choice, which may name a kernel to fetch and run. Every architecture has
# this one, and its gradients are the same bits every time.
_ATTENTION = "eager"
_IN_A_BLOCK = re.compile(r"\.\d+\.")


class NamedModel(nn.Module):
    """A transformers model, and its tensors' names in its file with those in `inner`.

    Args:
        inner: the model.
        names: the names of the tensors in the file with those in the model.
        folder: the folder of both.
        joined: parameters of the model that several tensors of the file make up, whose names in it
            are left out of `names`.
    """

    def __init__(
        self,
        inner: nn.Module,
        names: Mapping[str, str],
        folder: Path,
        joined: Sequence[JoinedTensor] = (),
    ) -> None:
        super().__init__()
        self.inner: Any = inner
        self.names = dict(names)
        self.folder = folder
        self.joined = tuple(joined)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of its folder, to write texts with."""
        return load_tokenizer(self.folder)

    @classmethod
    def of(cls, model: nn.Module) -> "NamedModel":
        """A model that a family loaded."""
        assert isinstance(model, cls)
        return model

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors by their names in the file."""
        live = live_tensors(self.inner)
        found = {name: live[own] for name, own in self.names.items()}
        for joined in self.joined:
            found |= joined.pieces()
        return found


def load_as_saved(folder: Path, dtype: torch.dtype | None = None) -> "PreTrainedModel":
    """Load a folder that restitch wrote with the class that its configuration names.

    Args:
        folder: config.json with weights.
        dtype: of the weights; that of the file by default.

    Returns:
        The model in evaluation mode; its bare body if the configuration names a class whose head is
        not in the file, or none.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    given: dict[str, Any] = {"dtype": dtype or "auto", "local_files_only": True}
    for name in read_config(folder).architectures or ():
        named = getattr(transformers, name, None)
        if named is None:
            continue
        model, report = named.from_pretrained(str(folder), output_loading_info=True, **given)
        if not report["missing_keys"]:
            return cast("PreTrainedModel", model.eval())
    body = transformers.AutoModel.from_pretrained(str(folder), **given)
    return cast("PreTrainedModel", body.eval())


def load_pretrained(
    folder: Path,
    auto_class: Any,
    *,
    prefixes: Sequence[str],
    required: Sequence[str],
    dtype: torch.dtype = torch.float32,
    optional: Collection[str] = (),
    empty: bool = False,
) -> NamedModel:
    """Load a folder as a model of `auto_class`, in evaluation mode.

    Args:
        folder: config.json with model.safetensors or its shards.
        auto_class: the transformers class with `from_pretrained`.
        prefixes: what a file may carry before all of its names.
        required: globs; a tensor of the file that matches must exist in the model.
        dtype: the type of the weights.
        optional: tensors of the model that the file may lack.
        empty: leave the weights of the file out; they are on the meta device.

    Raises:
        BadInput: the folder cannot be read as such a model; lists the tensors that do not fit.
    """
    import transformers

    if (folder / "adapter_config.json").is_file():
        raise BadInput(
            f"{folder} has an adapter_config.json: an adapter would change its weights",
            hint="merge the adapter into the model and save the merged model",
        )
    config = read_config(folder)
    file = Checkpoint.open(folder)
    # The errors below say what does not fit.
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    make = _without_weights if empty else _with_weights
    try:
        inner, lacking = make(auto_class, folder, config, dtype)
    except Exception as error:  # files of somebody else can raise any error
        raise BadInput(f"{folder} cannot be loaded as a model", found=error) from error
    inner.requires_grad_(False)
    pieces = pieces_of(inner)
    names = matched_names(inner, file, prefixes, pieces)
    joined = joined_tensors(inner, pieces, names)
    live = live_tensors(inner)
    names = {name: own for name, own in names.items() if own in live}
    if empty:
        lacking = _tied(inner, names, file) - {each.own for each in joined}
        _fill_up(inner, names, file, {*optional, *lacking})
    missing = sorted(name for name in lacking if "pooler." not in name and name not in optional)
    if missing:
        raise BadInput(
            f"{folder} lacks {len(missing)} tensors that its config.json asks for",
            details=missing,
            hint="save the whole model, not a part of it",
        )
    known = names.keys() | {name for each in joined for name in each.names.values()}
    unknown = [n for n in file.names if n not in known and any(fnmatchcase(n, g) for g in required)]
    if unknown:
        raise _unknown_tensors(folder, inner, unknown)
    return NamedModel(inner, names, folder, joined).eval()


def _unknown_tensors(folder: Path, inner: Any, unknown: Sequence[str]) -> BadInput:
    """The error of a file with tensors that its model does not have."""
    left_out = inner._keys_to_ignore_on_load_unexpected or ()
    if any(re.search(pattern, name) for pattern in left_out for name in unknown):
        return BadInput(
            f"{folder} has tensors that transformers does not load, as it leaves out layers that"
            " predict further tokens",
            expected="weights that evaluations can read",
            details=unknown,
            hint="load this and all finetuned models with transformers, and save them by"
            " save_pretrained(FOLDER), which leaves these tensors out",
        )
    if converts_tensors(inner):
        return BadInput(
            f"{folder} is a {inner.config.model_type} model, and transformers computes weights of"
            " it from those of the file",
            expected="weights that are loaded as they are, or joined as those of experts are",
            details=unknown,
            hint="load this and all finetuned models with transformers, and save them by"
            " save_pretrained(FOLDER, save_original_format=False)",
        )
    return BadInput(
        f"{folder} has tensors that do not exist in the model of its config.json",
        details=unknown,
        hint="check that config.json belongs to these weights",
    )


def _with_weights(
    auto_class: Any, folder: Path, config: Any, dtype: torch.dtype
) -> tuple[Any, Collection[str]]:
    """The model in a folder, and the tensors that its file lacks."""
    inner, report = auto_class.from_pretrained(
        str(folder),
        config=config,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        attn_implementation=_ATTENTION,
        output_loading_info=True,
    )
    return inner, report["missing_keys"]


def _without_weights(
    auto_class: Any, _: Path, config: Any, dtype: torch.dtype
) -> tuple[Any, Collection[str]]:
    """The model of a configuration, with parameters on the meta device."""
    from accelerate import init_empty_weights

    # One that chooses the class by the configuration, or the class itself.
    make = getattr(auto_class, "from_config", None) or auto_class._from_config
    with init_empty_weights(include_buffers=False):
        inner = make(config, dtype=dtype, attn_implementation=_ATTENTION)
    others = any(one.is_floating_point() and one.dtype != dtype for one in inner.parameters())
    if others or inner._get_dtype_plan(dtype):
        raise ValueError(f"some of its weights are not in {dtype}")
    return inner, ()


def _tied(inner: Any, names: Mapping[str, str], file: Checkpoint) -> set[str]:
    """Tie the weights of a model without weights where `from_pretrained` does.

    If the file holds both of two weights, they are tied only if they are equal.

    Returns:
        The tensors of the model that the file lacks.
    """
    held = {own: name for name, own in names.items()}
    lacking = set(inner.state_dict()) - held.keys()
    inner.tie_weights(missing_keys=lacking, recompute_mapping=False)
    for own, source in inner.all_tied_weights_keys.items():
        if {own, source} <= held.keys() and torch.equal(
            *(file.tensor(held[each]) for each in (own, source))
        ):
            _set_parameter(inner, own, inner.get_parameter(source))
    return lacking


def _fill_up(
    inner: Any, names: Mapping[str, str], file: Checkpoint, unread: Collection[str]
) -> None:
    """Give a model without weights its buffers, and zeros in place of weights that are not read."""
    live = inner.state_dict(keep_vars=True)
    for own in live.keys() & frozenset(unread):
        if live[own].is_meta:
            zeros = torch.zeros_like(live[own], device="cpu")
            _set_parameter(inner, own, nn.Parameter(zeros, requires_grad=False))
    for name, own in names.items():
        if own in live and not live[own].is_meta:
            live[own].copy_(file.tensor(name))


def _set_parameter(inner: nn.Module, name: str, value: nn.Parameter) -> None:
    module, _, last = name.rpartition(".")
    setattr(inner.get_submodule(module), last, value)


def missing_outside_of_blocks(
    folder: Path, auto_class: Any, prefixes: Sequence[str]
) -> list[str] | None:
    """The weights outside of the blocks, such as those of a head, that a folder's file lacks.

    Tied weights count as there if the file holds one of them. Transformers ties the head of T5 even
    where the configuration says that it is a weight of its own; then the file must hold it.

    Args:
        folder: a model; one without weights lacks none.
        auto_class: the transformers class with a head.
        prefixes: what the file may carry before all of its names.

    Returns:
        Their names, sorted; None if `auto_class` has no model of this configuration.
    """
    config = read_config(folder)
    if type(config) not in auto_class._model_mapping:
        return None
    if not any(folder.glob("*.safetensors")):
        return []
    file = Checkpoint.open(folder)
    try:
        with torch.device("meta"):
            model = auto_class.from_config(config)
    except Exception as error:  # a configuration of somebody else can raise any error
        raise BadInput(f"{folder} cannot be loaded as a model", found=error) from error
    shapes = {name: file.info(name).shape for name in file.names}
    live = dict(model.named_parameters(remove_duplicate=False))
    found = frozenset(match_names(shapes, live, prefixes).values())
    held = {id(live[own]) for own in found}
    own_head = _head_of_its_own(folder, model)
    return sorted(
        name
        for name, tensor in live.items()
        if (id(tensor) not in held or (name == own_head and name not in found))
        and "pooler." not in name
        and not _IN_A_BLOCK.search(name)
    )


def _head_of_its_own(folder: Path, model: Any) -> str | None:
    """The weight of the head, if the file of the configuration says that it is not tied."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    head = model.get_output_embeddings()
    if head is None or values.get("tie_word_embeddings") is not False:
        return None
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)
