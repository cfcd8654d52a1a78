"""The sparse vector of changes between two versions of the weights. Pure functions over numpy: no I/O, no clock.

An increment is `(new - old) mod 2^bits` over a tensor's elements as unsigned integers. So increments add, negate and
restrict exactly, for every dtype and every value:

    new == old + delta        old == new + (-delta)        delta(a, c) == delta(a, b) + delta(b, c)
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltawire.errors import DtypeMismatch, FormatError, MissingTensor, ShapeMismatch, UnknownTensor, some
from deltawire.weights.bits import Bits, Positions, UInts, count, unsigned
from deltawire.weights.digest import digest_at, moved
from deltawire.weights.tensors import as_bits, like

POSITION_BYTES = 8
"""memory of one position; where positions and increments would take more, an increment for every element is kept"""


@dataclass(frozen=True, slots=True, eq=False)
class TensorDelta:
    """The change of one tensor.

    Sparse: `positions` (int64, sorted, unique, in range) and as many `increments`, none of them zero.
    Dense: `positions` is None and `increments` has one entry per element, zeros included.
    """

    dtype: str
    shape: tuple[int, ...]
    positions: Positions | None
    increments: UInts

    def __post_init__(self) -> None:
        if self.increments.dtype != unsigned(self.dtype):
            raise DtypeMismatch(f"increments of {self.dtype} are {unsigned(self.dtype)}, not {self.increments.dtype}")
        expected = count(self.shape) if self.positions is None else self.positions.size
        if self.increments.size != expected:
            raise ShapeMismatch(f"{self.increments.size} increments where {expected} belong, shape {list(self.shape)}")

    @property
    def steps(self) -> UInts:
        """The increments, under the name that files give them."""
        return self.increments

    @property
    def changed(self) -> int:
        """Elements that change."""
        return self.increments.size if self.positions is not None else int(np.count_nonzero(self.increments))

    @property
    def total(self) -> int:
        """Elements in the tensor."""
        return count(self.shape)

    def sparse(self) -> tuple[Positions, UInts]:
        """Positions and non-zero increments, whichever way they are kept."""
        if self.positions is not None:
            return self.positions, self.increments
        positions = np.flatnonzero(self.increments)
        return positions, self.increments[positions]

    @property
    def nbytes(self) -> int:
        """Bytes of memory held by positions and increments."""
        return self.increments.nbytes + (0 if self.positions is None else self.positions.nbytes)

    def __eq__(self, other: object) -> bool:
        """The same change, whichever way either side keeps it."""
        if not isinstance(other, TensorDelta) or (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        return all(np.array_equal(a, b) for a, b in zip(self.sparse(), other.sparse(), strict=True))

    __hash__ = None  # type: ignore[assignment]  # mutable arrays are inside

    def __neg__(self) -> "TensorDelta":
        """The change that undoes this one."""
        return TensorDelta(self.dtype, self.shape, self.positions, np.negative(self.increments))

    def __add__(self, later: "TensorDelta") -> "TensorDelta":
        """This change and then `later`, as one. Raises DtypeMismatch, ShapeMismatch."""
        check_same("a tensor", self, later)
        if self.positions is not None and later.positions is not None:
            return settle(self.dtype, self.shape, *_merge(self, later))
        increments = _dense(self)
        increments[slice(None) if later.positions is None else later.positions] += later.increments
        return settle(self.dtype, self.shape, None, increments)

    def restrict(self, start: int, stop: int) -> "TensorDelta":
        """The change of the flat elements in [start, stop), with positions counted from `start`; flat, too."""
        shape = (stop - start,)
        if self.positions is None:
            return settle(self.dtype, shape, None, self.increments[start:stop].copy())
        first, last = np.searchsorted(self.positions, (start, stop))
        return TensorDelta(self.dtype, shape, self.positions[first:last] - start, self.increments[first:last])

    def apply_(self, bits: UInts) -> tuple[int, int]:
        """Add the increments to flat `bits` in place. The touched elements' part of the digest, before and after."""
        from deltawire.weights import kernels

        return kernels.apply_with_digest(bits, *self.sparse())


def settle(dtype: str, shape: tuple[int, ...], positions: Positions | None, increments: UInts) -> TensorDelta:
    """A TensorDelta kept the cheaper way, by its share of changed elements; drops zero increments from a sparse one."""
    if positions is None:
        if _is_dense(np.count_nonzero(increments), max(count(shape), 1), increments):
            return TensorDelta(dtype, shape, None, increments)
        positions = np.flatnonzero(increments)
        increments = increments[positions]
    elif not (kept := increments != 0).all():
        positions, increments = positions[kept], increments[kept]
    return cheaper(dtype, shape, positions, increments)


def cheaper(dtype: str, shape: tuple[int, ...], positions: Positions, increments: UInts) -> TensorDelta:
    """The same of increments none of which is zero."""
    delta = TensorDelta(dtype, shape, positions, increments)
    is_dense = bool(delta.total) and _is_dense(positions.size, delta.total, increments)
    return TensorDelta(dtype, shape, None, _dense(delta)) if is_dense else delta


def _is_dense(changed: int | np.intp, total: int, increments: UInts) -> bool:
    """Whether an increment for every element takes no more memory: from 20 % changed for 2-byte elements. So no delta,
    however much is folded into it, ever takes more than its tensors themselves."""
    return int(changed) * (POSITION_BYTES + increments.itemsize) >= total * increments.itemsize


def between_bits(old: Bits, new: Bits) -> TensorDelta:
    """The change from one tensor to another. Raises DtypeMismatch, ShapeMismatch."""
    check_same("a tensor", old, new)
    from deltawire.weights import kernels

    return settle(old.dtype, old.shape, *kernels.compare_and_collect(old.data, new.data))


def check_same(what: str, a: Any, b: Any) -> None:
    """Raise DtypeMismatch or ShapeMismatch, about `what`, unless two tensors have one dtype and shape."""
    if a.dtype != b.dtype:
        raise DtypeMismatch(f"{what} is {a.dtype} on one side and {b.dtype} on the other")
    if a.shape != b.shape:
        raise ShapeMismatch(f"{what} has shape {list(a.shape)} on one side and {list(b.shape)} on the other")


def _dense(delta: TensorDelta) -> UInts:
    if delta.positions is None:
        return delta.increments.copy()
    increments = np.zeros(delta.total, delta.increments.dtype)
    increments[delta.positions] = delta.increments
    return increments


def _merge(a: TensorDelta, b: TensorDelta) -> tuple[Positions, UInts]:
    """Sum of two sparse vectors, zeros still inside."""
    assert a.positions is not None and b.positions is not None
    together = np.concatenate([a.positions, b.positions])
    order = np.argsort(together, kind="stable")  # two sorted runs: timsort merges them in linear time
    positions, increments = together[order], np.concatenate([a.increments, b.increments])[order]
    first = np.ones(positions.size, bool)
    first[1:] = positions[1:] != positions[:-1]
    starts = np.flatnonzero(first)
    return positions[starts], np.add.reduceat(increments, starts, dtype=increments.dtype) if starts.size else increments


class Delta(Mapping[str, TensorDelta]):
    """What changed between two versions of a set of named tensors: names of changed tensors -> TensorDelta.

    Immutable. A tensor that did not change has no entry.
    """

    __slots__ = ("_tensors",)

    def __init__(self, tensors: Mapping[str, TensorDelta] | None = None) -> None:
        self._tensors = {name: tensor for name, tensor in (tensors or {}).items() if tensor.changed}

    @classmethod
    def between(cls, old: Mapping[str, Any], new: Mapping[str, Any]) -> "Delta":
        """The delta with `new == old + delta`, for mappings name -> torch, numpy or Bits tensor.

        Raises UnknownTensor for a name only `new` has, MissingTensor for one only `old` has, DtypeMismatch,
        ShapeMismatch.
        """
        _check_names(old, new)
        changes = {}
        for name in old:
            before, after = as_bits(old[name]), as_bits(new[name])
            check_same(name, before, after)
            changes[name] = between_bits(before, after)
        return cls(changes)

    def __getitem__(self, name: str) -> TensorDelta:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"<Delta of {self.changed:,} elements in {len(self)} tensors>"

    @property
    def changed(self) -> int:
        """Elements that change."""
        return sum(tensor.changed for tensor in self._tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of memory held by positions and increments."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def __neg__(self) -> "Delta":
        """The delta that undoes this one."""
        return Delta({name: -tensor for name, tensor in self._tensors.items()})

    def __add__(self, later: "Delta") -> "Delta":
        """This delta and then `later`, folded into one. Needs no weights."""
        if not isinstance(later, Delta):
            return NotImplemented
        folded = dict(self._tensors)
        for name, tensor in later.items():
            folded[name] = folded[name] + tensor if name in folded else tensor
        return Delta(folded)

    def __radd__(self, old: Mapping[str, Any]) -> dict[str, Any]:
        """`old + delta`: the new tensors, of the kind the old ones are. Unchanged tensors are the same objects."""
        self.check(old)
        new = dict(old)
        for name, tensor in self._tensors.items():
            bits = as_bits(old[name]).copy()
            tensor.apply_(bits.data)
            new[name] = like(bits, old[name])
        return new

    def apply_(self, tensors: Mapping[str, Any]) -> None:
        """Add the increments in place to contiguous CPU tensors. All are checked before the first is written.

        Raises UnknownTensor, DtypeMismatch, ShapeMismatch: the last also for a tensor that cannot be written in place
        (not contiguous, read-only, not in host memory), and for one memory under two names (tied weights), where each
        increment would be added twice.
        """
        self.check(tensors)
        targets = {name: _in_place(name, tensors[name]) for name in self._tensors}
        _check_apart(targets)
        for name, tensor in self._tensors.items():
            tensor.apply_(targets[name])

    def digests_after(self, digests: Mapping[str, int], tensors: Mapping[str, Any]) -> dict[str, int]:
        """What the `digests` of these tensors will be once the increments are added. Nothing is written. Raises
        UnknownTensor, DtypeMismatch, ShapeMismatch."""
        self.check(tensors)
        after = dict(digests)
        for name, tensor in self._tensors.items():
            positions, increments = tensor.sparse()
            bits = as_bits(tensors[name]).data[positions]
            after[name] = moved(after[name], digest_at(positions, bits), digest_at(positions, bits + increments))
        return after

    def check(self, tensors: Mapping[str, Any]) -> None:
        """Raise what `apply_` would raise, and change nothing."""
        if unknown := [name for name in self._tensors if name not in tensors]:
            raise UnknownTensor(f"the delta changes what these tensors do not have: {some(map(repr, unknown))}")
        for name, tensor in self._tensors.items():
            check_same(name, tensor, as_bits(tensors[name]))

    def split(self, name: str, bounds: list[int]) -> list[TensorDelta]:
        """One tensor's change cut at flat positions `bounds` (ascending, first 0, last the element count)."""
        tensor = self._tensors[name]
        if bounds[0] != 0 or bounds[-1] != tensor.total or bounds != sorted(bounds):
            raise FormatError(f"{name}: bounds {bounds} do not cover its {tensor.total} elements in order")
        return [tensor.restrict(start, stop) for start, stop in itertools.pairwise(bounds)]


def _check_names(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    if extra := sorted(new.keys() - old.keys()):
        raise UnknownTensor(f"only the new weights have {some(map(repr, extra))}")
    if missing := sorted(old.keys() - new.keys()):
        raise MissingTensor(f"the new weights lack {some(map(repr, missing))}")


def _in_place(name: str, tensor: Any) -> UInts:
    data = as_bits(tensor).data
    array = data if isinstance(tensor, Bits) else tensor
    own = tensor.data_ptr() if hasattr(tensor, "data_ptr") else array.ctypes.data
    if own != data.ctypes.data or not data.flags.writeable:
        raise ShapeMismatch(f"{name}: not contiguous, writable host memory; use `old + delta`, which copies")
    return data


def _check_apart(targets: Mapping[str, UInts]) -> None:
    owners: dict[int, str] = {}
    for name, data in targets.items():
        twin = owners.setdefault(data.ctypes.data, name)
        if twin != name:
            raise ShapeMismatch(f"{twin} and {name} are the same memory: apply to one name of tied weights")
