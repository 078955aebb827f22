"""Parameters that transformers makes of several tensors of a file while it loads them.

A checkpoint with experts has a matrix for each of them, and the model holds those of a layer in one
parameter. Transformers can take such a parameter apart, to save it. Its operations give views here,
so writing to a piece changes the parameter. A piece can require gradients: the module that owns the
parameter then reads one that is made of its pieces, without a copy.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

Pieces = Mapping[str, Mapping[str, Tensor]]
# Is called with the inputs of a piece, after something without meaning.
Hook = Callable[[Any, tuple[Tensor]], object]


class JoinedTensor:
    """One parameter of a model, and the tensors of its file that it consists of.

    Args:
        model: of transformers.
        own: the name of the parameter in it.
        names: the tensors' names in the file by those that transformers gives them.
    """

    def __init__(self, model: Any, own: str, names: Mapping[str, str]) -> None:
        self.own = own
        self.names = dict(names)
        self._model = model
        path, _, self._attribute = own.rpartition(".")
        self._module: nn.Module = model.get_submodule(path)
        self._pieces: dict[str, Tensor] = {}
        self._of: object = None
        self._hooks: dict[PieceLayer, Hook] = {}
        self._watching = ExitStack()
        self._module.register_forward_pre_hook(self._show)
        self._module.register_forward_hook(self._hide, always_call=True, prepend=True)

    @property
    def whole(self) -> nn.Parameter:
        """The parameter, as the model has it now."""
        parameter = self._module._parameters[self._attribute]
        assert parameter is not None
        return parameter

    def pieces(self) -> dict[str, Tensor]:
        """The pieces by their names in the file, each a leaf that shares the parameter's memory.

        They are the same ones in each call, until the model moves.
        """
        whole = self.whole
        of = (whole.data_ptr(), whole.device, whole.dtype)
        if of != self._of:
            self._pieces, self._of = self.split(whole), of
        return self._pieces

    def split(self, whole: Tensor) -> dict[str, Tensor]:
        """Views of a tensor like the parameter, by the pieces' names in the file."""
        views = _split(self._model, {self.own: whole.detach()})
        return {self.names[name]: view.detach() for name, view in views.items()}

    def read(self, read: Callable[[str], Tensor], device: torch.device) -> Tensor:
        """The parameter on a device, made of pieces that are read one at a time by their names."""
        whole = torch.empty(self.whole.shape, dtype=self.whole.dtype, device=device)
        for name, piece in self.split(whole).items():
            piece.copy_(read(name))
        return whole

    def layers(self) -> dict[str, "PieceLayer"]:
        """The pieces that are matrices as layers, by their names in the file."""
        whole = torch.empty(self.whole.shape, device="meta")
        views = self.split(whole).items()
        return {name: PieceLayer(self, view) for name, view in views if view.dim() == 2}

    @contextmanager
    def watched(self, layer: "PieceLayer", hook: Hook) -> Iterator[None]:
        """Call a hook with the inputs of a piece, within a block."""
        self._hooks[layer] = hook
        try:
            yield
        finally:
            del self._hooks[layer]

    def _see(self, inputs: Tensor, matrix: Tensor) -> None:
        """Pass inputs of a product to the hooks of the pieces in its matrix."""
        whole = self.whole
        if matrix.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
            start = matrix.storage_offset() - whole.storage_offset()
            for layer, hook in self._hooks.items():
                if start <= layer.start < start + matrix.numel():
                    hook(None, (inputs,))

    def _show(self, module: nn.Module, _: object) -> None:
        """Watch the products of the module, and let it read pieces that require gradients."""
        if self._hooks:
            self._watching.enter_context(_Inputs(self._see))
        pieces = self._pieces.values()
        if torch.is_grad_enabled() and any(piece.requires_grad for piece in pieces):
            join: Any = _Joined.apply  # it has no type annotations
            # It hides the parameter of the module until it is deleted.
            vars(module)[self._attribute] = join(self, self.whole, *pieces)

    def _hide(self, module: nn.Module, *_: object) -> None:
        vars(module).pop(self._attribute, None)
        self._watching.close()


class PieceLayer:
    """A piece of a joined parameter as a linear layer whose inputs can be seen."""

    def __init__(self, joined: JoinedTensor, view: Tensor) -> None:
        self.in_features = view.shape[1]
        self.start = view.storage_offset()
        self._joined = joined

    def register_forward_pre_hook(self, hook: Hook) -> AbstractContextManager[None]:
        """Call a hook with the inputs, in rows, within a block."""
        return self._joined.watched(self, hook)


class _Joined(torch.autograd.Function):
    """A parameter as a function of its pieces, whose memory it shares."""

    @staticmethod
    def forward(ctx: Any, joined: JoinedTensor, whole: Tensor, *_: Tensor) -> Tensor:
        ctx.joined = joined
        return whole.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.joined.split(gradient).values()


class _Inputs(TorchFunctionMode):
    """Shows the inputs and the matrix of each product: of a layer, or of each group of rows."""

    def __init__(self, see: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            self._see(args[0], args[1])
        elif func in (F.grouped_mm, torch._grouped_mm):
            start = 0
            for number, stop in enumerate(kwargs["offs"].tolist()):
                if stop > start:
                    self._see(args[0][start:stop], args[1][number])
                start = stop
        return func(*args, **(kwargs or {}))


class _Views(TorchFunctionMode):
    """Leaves out the copies of operations that give contiguous parts of a tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.contiguous else func(*args, **(kwargs or {}))


def converts_tensors(model: Any) -> bool:
    """True if transformers computes parameters of a model from tensors of some of its files."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return any(isinstance(c, WeightConverter) for c in get_model_conversion_mapping(model))


def pieces_of(model: Any) -> Pieces:
    """The names of parameters in a model that transformers takes apart, each with its pieces.

    A parameter of which a piece is no view is left out: its pieces could not be written.

    Args:
        model: of transformers.

    Returns:
        For each parameter the pieces on the meta device by their names.
    """
    if not converts_tensors(model):
        return {}
    with torch.inference_mode(False):  # views know nothing of their base in it
        whole = {
            own: torch.empty_like(live, device="meta") for own, live in model.named_parameters()
        }
        views = _split(model, whole)
    owners = {id(tensor): own for own, tensor in whole.items()}
    found: dict[str, dict[str, Tensor]] = {}
    for name, view in views.items():
        own = owners.get(id(view._base))
        if own is not None and name not in whole:
            found.setdefault(own, {})[name] = view
    return {
        own: pieces
        for own, pieces in found.items()
        if sum(piece.numel() for piece in pieces.values()) == whole[own].numel()
    }


def joined_tensors(model: Any, pieces: Pieces, names: Mapping[str, str]) -> list[JoinedTensor]:
    """The parameters whose pieces are all in a file.

    Args:
        model: of transformers.
        pieces: of the model.
        names: the names of the file's tensors with those in the model.
    """
    files = {own: name for name, own in names.items()}
    return [
        JoinedTensor(model, own, {piece: files[piece] for piece in each})
        for own, each in pieces.items()
        if own not in files and each.keys() <= files.keys()
    ]


@torch.no_grad()
def _split(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What transformers would save of some tensors of a model, as views of them where it can be."""
    from transformers.core_model_loading import revert_weight_conversion

    with _Views():
        views: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return views
