"""What a trainer gives to `publish`: a module, a mapping, or pairs, and what prepares them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from deltawire.prepare.names import NameMap
from deltawire.publish import fsdp
from deltawire.weights.tensors import named

Pairs = Iterable[tuple[str, Any]]
"""(name, tensor)"""
Prepare = Callable[[Pairs], Pairs]


def prepared(tensors: Any, prepare: Sequence[Prepare]) -> Iterator[tuple[str, Any]]:
    """The (name, tensor) pairs to capture, one at a time: of a module those of its parameters. Raises UnknownTensor,
    DtypeMismatch, ShapeMismatch."""
    if _is_module(tensors):
        tensors = tensors.named_parameters()
    pairs: Pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    if isinstance(pairs, Iterable):
        pairs = fsdp.owned(pairs)  # before `prepare`, which may compute from them
    for step in prepare:
        pairs = step(pairs)
    yield from named(pairs)


def stay(tensors: Any, prepare: Sequence[Prepare]) -> bool:
    """Whether tensors keep their values when the next is asked for, so that many may be compared at once. An iterator
    may reuse one buffer, and so may what prepares them; a NameMap gives views."""
    return (isinstance(tensors, Mapping) or _is_module(tensors)) and all(isinstance(step, NameMap) for step in prepare)


def _is_module(tensors: Any) -> bool:
    return callable(getattr(tensors, "named_parameters", None))
