"""The names and layouts of a transformers model as a `NameMap`, taken from transformers' own conversion tables.

`save_pretrained` turns a model's tensors back into the checkpoint's with `revert_weight_conversion`. Here the same
function runs once over stand-ins, which note what is done to them and compute nothing. So all that it knows of a family
of models holds here, and what cannot be seen as a view is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltawire.errors import NoView
from deltawire.prepare.names import NameMap, View, bare, is_adapters, place_of

LEADS_IN = ("_orig_mod", "module", "model")
"""attributes under which torch.compile, DDP and PEFT give the model they wrap"""


def name_map(model: Any) -> NameMap:
    """The map from a transformers model's names to those of the checkpoint that its `save_pretrained` writes.

    `model` may be wrapped by torch.compile, DDP, FSDP2 or PEFT; the map leaves out its adapters. It looks only at
    names, shapes and which tensors share memory. So one map serves a whole training, as long as nothing is tied or
    untied. Tied weights come under the name `save_pretrained` keeps. What is untied by now (by hand, or by PEFT's
    `modules_to_save` once merged) comes as tensors of its own, whatever the config says.

    Raises NoView where the checkpoint has a tensor that is not a rectangle of one of the model's. The error names the
    model's type, the tensors and the operation.
    """
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        raise ImportError(
            "name_map reads the conversion tables of transformers 5: pip install 'deltawire[transformers]'"
        ) from None
    inner = _unwrapped(model, PreTrainedModel)
    tensors = _tensors(inner)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    declared = (getattr(inner, "all_tied_weights_keys", None) or {}).items()
    named = {bare(name): bare(kept) for name, kept in declared}
    tied = {name: kept for name, kept in named.items() if _are_one(tensors.get(name), tensors.get(kept))}
    kept = {name: shape for name, shape in shapes.items() if tied.get(name) not in shapes}
    try:
        made = revert_weight_conversion(inner, {name: _whole(name, shape) for name, shape in kept.items()})
    except Exception as error:
        raise NoView(
            f"model type {inner.config.model_type!r}: its checkpoint is more than views of the model's tensors "
            f"({error}); publish what transformers' revert_weight_conversion makes of the state dict instead"
        ) from error
    views = _gather(made, kept, inner.config.model_type)
    return NameMap({name: views[name if name in kept else tied[name]] for name in shapes})


def _unwrapped(model: Any, kind: type) -> Any:
    inner = model
    while not isinstance(inner, kind):
        inner = next((found for name in LEADS_IN if (found := getattr(inner, name, None)) is not None), None)
        if inner is None:
            raise NoView(
                f"{type(model).__name__} holds no transformers model, so nothing says what its checkpoint is called: "
                "give NameMap the views yourself"
            )
    return inner


def _are_one(one: Any, other: Any) -> bool:
    return one is not None and other is not None and place_of(one) == place_of(other)


def _tensors(model: Any) -> dict[str, Any]:
    """What `save_pretrained` takes of a model, by name."""
    left_out = model._keys_to_ignore_on_save or ()
    given = [(name, tensor) for name, tensor in model.state_dict().items() if name not in left_out]
    # of a module that PEFT trains whole, the original keeps the place in the checkpoint
    named = [(name.replace(".original_module.", "."), tensor) for name, tensor in given]
    return {bare(name): tensor for name, tensor in named if not is_adapters(name)}


def _gather(made: Mapping[str, Any], kept: Mapping[str, Sequence[int]], kind: str) -> dict[str, tuple[View, ...]]:
    """Views by the trainer's name, of what the conversion made under the checkpoint's names."""
    views: dict[str, tuple[View, ...]] = dict.fromkeys(kept, ())
    for name, part in made.items():
        views[part.name] = (*views[part.name], part.as_view(name))
    if lost := [name for name, found in views.items() if not found]:
        raise NoView(f"model type {kind!r}: the conversion leaves out {lost[0]}, one of {len(lost)}")
    return views


@dataclass(frozen=True, slots=True)
class _StandIn:
    """A rectangle of the trainer's tensor `name`, on which the operations of a conversion that keep one can be
    done; `dims` are the dimensions it still has, in its order."""

    name: str
    whole: tuple[int, ...]
    box: tuple[tuple[int, int], ...]
    dims: tuple[int, ...]

    @property
    def shape(self) -> torch.Size:
        return torch.Size(stop - start for start, stop in (self.box[dim] for dim in self.dims))

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def contiguous(self) -> "_StandIn":
        return self

    def squeeze(self) -> "_StandIn":
        dims = tuple(dim for dim, size in zip(self.dims, self.shape, strict=True) if size > 1)
        return _StandIn(self.name, self.whole, self.box, dims)

    def chunk(self, chunks: int, dim: int = 0) -> list["_StandIn"]:
        axis = self.dims[dim]
        start, stop = self.box[axis]
        length = -(-(stop - start) // chunks)  # as torch.chunk, whose last one may be smaller
        cuts = [(at, min(at + length, stop)) for at in range(start, stop, length)]
        boxes = [(*self.box[:axis], cut, *self.box[axis + 1 :]) for cut in cuts]
        return [_StandIn(self.name, self.whole, box, self.dims) for box in boxes]

    def unbind(self, dim: int = 0) -> list["_StandIn"]:
        left = tuple(axis for axis in self.dims if axis != self.dims[dim])
        return [_StandIn(self.name, self.whole, part.box, left) for part in self.chunk(self.size(dim), dim)]

    def transpose(self, dim0: int, dim1: int) -> "_StandIn":
        dims = list(self.dims)
        dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
        return _StandIn(self.name, self.whole, self.box, tuple(dims))

    def as_view(self, name: str) -> View:
        """What the checkpoint's tensor `name` is."""
        untouched = self == _whole(self.name, self.whole)
        return View(name) if untouched else View(name, self.box, self.dims)

    def __getattr__(self, attribute: str) -> Any:
        raise NoView(f"{attribute} of {self.name}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = _OPERATIONS.get(function)
        if operation is None or not isinstance(args[0], _StandIn):
            parts = args[0] if isinstance(args[0], (list, tuple)) else args
            names = " and ".join(part.name for part in parts if isinstance(part, cls))
            raise NoView(f"torch.{function.__name__} of {names}")
        return operation(*args, **(kwargs or {}))


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    torch.chunk: _StandIn.chunk,
    torch.unbind: _StandIn.unbind,
    torch.transpose: _StandIn.transpose,
}


def _whole(name: str, shape: tuple[int, ...]) -> _StandIn:
    return _StandIn(name, shape, tuple((0, size) for size in shape), tuple(range(len(shape))))
