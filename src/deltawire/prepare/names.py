"""A trainer's tensors under the checkpoint's names: each is a rectangle of a trainer's tensor. Views, never copies.

transformers 5 trains all experts of a layer as one tensor, where a checkpoint holds one per expert. Wrappers (compile,
DDP, PEFT) put words into names. A tied head is one tensor with two names. A `NameMap` is that difference as data.
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltawire.errors import ShapeMismatch, UnknownTensor
from deltawire.weights.tensors import is_sharded, is_torch, mark_of, marked

COMPUTING = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""parts of a name that torch.compile, FSDP1 and activation checkpointing put in, wherever they stand"""
WRAPPERS = COMPUTING | {"base_layer"}
"""and PEFT"""
ADAPTERS = ("lora_", "modules_to_save", "original_module")
"""how the parts of a name begin that only an adapter's tensors have"""


@dataclass(frozen=True, slots=True)
class View:
    """The checkpoint's tensor `name` as a rectangle of a trainer's tensor.

    `box` is [start, stop) along each dimension of the trainer's tensor, and `dims` says which of those dimensions the
    checkpoint's tensor has, in its order; any other is one element thick and dropped. Without a box: all of it, as is.
    Raises ShapeMismatch for `dims` that leave out a thicker one, repeat one, or name one that the box does not have.
    """

    name: str
    box: tuple[tuple[int, int], ...] = ()
    dims: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        thick = {dim for dim, (start, stop) in enumerate(self.box) if stop - start != 1}
        if not thick <= {*self.dims} <= {*range(len(self.box))} or len({*self.dims}) < len(self.dims):
            raise ShapeMismatch(f"{self.name}: dimensions {list(self.dims)} do not fit its box {list(self.box)}")

    @property
    def shape(self) -> tuple[int, ...]:
        """The checkpoint tensor's shape, of a view that has a box."""
        return tuple(stop - start for start, stop in (self.box[dim] for dim in self.dims))

    def of(self, tensor: Any) -> Any:
        """The view itself, over the memory of `tensor` (torch or numpy); of a DTensor, whose indices would be looked
        up by a collective, a ShardedView."""
        if not self.box:
            return tensor
        if is_sharded(tensor):
            return ShardedView(self, tensor)
        part = tensor[tuple(slice(*ends) if dim in self.dims else ends[0] for dim, ends in enumerate(self.box))]
        if list(self.dims) != (left := sorted(self.dims)):
            order = [left.index(dim) for dim in self.dims]
            part = part.permute(order) if is_torch(part) else part.transpose(order)
        return marked(part, mark_of(tensor))


@dataclass(frozen=True, slots=True, eq=False)
class ShardedView:
    """A view of a DTensor, yet to be taken: a publisher with a `process_group` takes it of the shard a rank holds."""

    view: View
    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view.shape

    @property
    def dtype(self) -> Any:
        return self.tensor.dtype

    def full_tensor(self) -> Any:
        """The view of the whole tensor, gathered: a collective, as DTensor's own."""
        return self.view.of(self.tensor.full_tensor())


@dataclass(frozen=True, slots=True)
class NameMap:
    """From a trainer's (name, tensor) pairs to the checkpoint's; call it, or give it to `Publisher(prepare=[names])`.

    `views`: for each of the trainer's names, the checkpoint's tensors in it; together they are all of its elements.
    Two of the trainer's names for one tensor of the checkpoint are a tied weight. Names are matched as they are, and
    else without what torch.compile, DDP, FSDP and PEFT put into them. Without `views` that is all the map does.

    What comes out shares memory with what goes in, so the way back is to write through it, here from a version that
    was materialised:

        with torch.no_grad():
            for name, tensor in names(model.state_dict().items()):
                tensor.copy_(checkpoint[name])

    Of a DTensor a rectangle comes as a ShardedView, for a publisher of a sharded job: nothing is written through one.

    Raises ShapeMismatch for views that leave out or double a part of a tensor.
    """

    views: Mapping[str, tuple[View, ...]] | None = None

    def __post_init__(self) -> None:
        for name, views in (self.views or {}).items():
            if not views:
                raise ShapeMismatch(f"{name}: no tensor of the checkpoint is given for it")
            if not _is_partition([view.box for view in views]):
                raise ShapeMismatch(f"{name}: the views given for it are not each of its elements once")

    def __call__(self, pairs: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """(checkpoint name, view) pairs, one of the trainer's tensors at a time.

        A second name of a tied weight is dropped. Raises UnknownTensor for a name the map does not have, with the
        closest it has; for an adapter's tensor; and for a tied weight that is two different tensors. Raises
        ShapeMismatch for a tensor of another shape than its views are of.
        """
        names = Counter(view.name for views in (self.views or {}).values() for view in views)
        tied: dict[str, tuple[str, Any]] = {}  # held until the end, or the next tensor might get the same address
        for given, tensor in pairs:
            name, views = self._find(given)
            if (shape := _shape(views)) and tuple(tensor.shape) != shape:
                raise ShapeMismatch(f"{name}: shape {list(tensor.shape)}, but its views are of {list(shape)}")
            for view in views:
                part = view.of(tensor)
                if names[view.name] > 1:
                    first, known = tied.setdefault(view.name, (name, part))
                    if place_of(known) != place_of(part):
                        raise UnknownTensor(
                            f"{name} and {first} are tied, both are {view.name} of the checkpoint, and yet two "
                            "tensors here. Call model.tie_weights(), or untie them in the config before training"
                        )
                    if first != name:
                        continue
                yield view.name, part

    def _find(self, given: str) -> tuple[str, tuple[View, ...]]:
        """A name as the map has it, and its views."""
        name = given if self.views and given in self.views else bare(given)
        if self.views is None:
            return name, (View(name),)
        if name not in self.views:
            raise UnknownTensor(f"{given!r} is not a name this map knows; closest there: {closest(name, self.views)}")
        return name, self.views[name]


def bare(name: str) -> str:
    """A tensor's name without what wrappers put into it: `module.` in front, `_orig_mod.` anywhere, and PEFT's
    `base_model.model.` and `.base_layer`. Raises UnknownTensor for an adapter's own tensor."""
    if is_adapters(name):
        raise UnknownTensor(
            f"{name!r} belongs to a PEFT adapter, and a checkpoint has none: publish model.merge_and_unload(), or ship "
            "the adapter by itself with deltawire.trainers.lora"
        )
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while parts[0] == "module" and len(parts) > 1:
        parts = parts[1:]
    if parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    return ".".join(parts)


def without_wrappers(name: str) -> str:
    """A tensor's name without what torch.compile, FSDP1 and activation checkpointing put into it."""
    return ".".join(part for part in name.split(".") if part not in COMPUTING)


def require_bare(names: Iterable[str]) -> None:
    """Raise UnknownTensor for names that no checkpoint has: with a wrapper's part, or `module.` before all."""
    given = list(names)
    wrapped = [name for name in given if name != without_wrappers(name)]
    if not wrapped and all(name.startswith("module.") for name in given):
        wrapped = given
    if wrapped:
        inside = without_wrappers(wrapped[0]).removeprefix("module.")
        raise UnknownTensor(
            f"{wrapped[0]!r}, one of {len(wrapped)} such names, is {inside!r} in a wrapper (torch.compile, DDP, FSDP1, "
            "activation checkpointing). No server knows the name. Publish the bare module, or "
            "checkpoint_tensors(model) of deltawire.trainers.state, or pass Publisher(prepare=[deltawire.NameMap()])"
        )


def is_adapters(name: str) -> bool:
    """Whether a tensor's name says that PEFT added it to a model."""
    return any(part.startswith(ADAPTERS) for part in name.split("."))


def closest(name: str, names: Iterable[str]) -> str:
    """The three of `names` that are most like `name`, for an error."""
    return ", ".join(difflib.get_close_matches(name, list(names), n=3, cutoff=0))


def _shape(views: tuple[View, ...]) -> tuple[int, ...]:
    """The shape of the tensor that these are views of; () when one of them is all of it, whatever its shape."""
    boxes = [view.box for view in views]
    return tuple(max(stop for _, stop in ends) for ends in zip(*boxes, strict=True)) if all(boxes) else ()


def _is_partition(boxes: list[tuple[tuple[int, int], ...]]) -> bool:
    """Whether boxes are each element of the smallest box from zero that has them all, once."""
    if not all(boxes):
        return len(boxes) == 1
    if len({len(box) for box in boxes}) > 1:
        return False
    ends = np.array(boxes)  # box, dimension, start or stop
    starts, stops = ends[..., 0], ends[..., 1]
    meet = ((starts[:, None] < stops) & (starts < stops[:, None])).all(-1)
    return int(meet.sum()) == len(boxes) and int((stops - starts).prod(-1).sum()) == int(stops.max(0).prod())


def place_of(tensor: Any) -> tuple[Any, ...]:
    """What two tensors that both still exist have in common exactly when they are the same memory read the same way.

    For a sharded tensor it is the memory that this rank holds, because a DTensor itself has none. Two that hold no
    element, as a rank's shards may, differ too.
    """
    if isinstance(tensor, ShardedView):
        return tensor.view.box, tensor.view.dims, place_of(tensor.tensor)
    if is_sharded(tensor):
        return tuple(tensor.shape), tensor.placements, place_of(tensor.detach().to_local())
    if is_torch(tensor):
        storage = tensor.untyped_storage()._cdata  # torch's own identity of a storage; an empty one has no address
        return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
    array = np.asarray(tensor)
    return array.__array_interface__["data"], array.shape, array.strides, array.dtype
