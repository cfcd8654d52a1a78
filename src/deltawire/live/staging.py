"""Everything about an update that can be done while the server generates: fetch, verify, place, gather, compare.

Weights move only by our own updates, so old bits gathered while generating are still right in the pause. A Plan names
the digests that it leads to, to be compared with its commit's before it is applied; applying it only scatters.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from deltawire.errors import DtypeMismatch, EngineUnsupported
from deltawire.live.at_hand import TensorsAtHand
from deltawire.live.boxes import LiveBox
from deltawire.live.live_weights import LiveWeights
from deltawire.live.memory import Memory, digest_box
from deltawire.live.transforms import Transform
from deltawire.live.writes import Fill, Scatter, Swap, SwappedAttribute, SwappedTensor, Write
from deltawire.read.changes import Change
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.records import Position
from deltawire.weights.bits import UInts
from deltawire.weights.delta import Delta, TensorDelta
from deltawire.weights.digest import digest_at, moved

PartDigests = Mapping[str, tuple[int, ...]]
"""by name, the digest of each part of a tensor that this worker holds"""
DENSE = 4
"""one element in so many changed, and the whole part is written"""
PIECE = 1 << 16
"""elements that a thread writes at a time, a third of a millisecond's work"""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One update, checked and ready. `since` is None when it starts from an anchor rather than a known version.

    `digests` are those of every part of every tensor after it. `way` is the change it was made of, without its weights.
    Seconds by the worker's clock, `created` by the publisher's.
    """

    since: Position | None
    after: Position
    digests: PartDigests
    writes: tuple[Write, ...]
    changed: int
    wire_bytes: int
    created: float
    fetch_seconds: float
    stage_seconds: float
    way: Change


def stage(
    live: LiveWeights, digests: PartDigests, subscriber: Subscriber, since: Position | None, version: int
) -> Plan:
    """Make the plan that leads from the live weights (whose `digests` are known) to a committed version.

    The way there is the cheapest, folded into one change, forward or back; with None it starts from an anchor. Whether
    the plan's digests are what the commit promises is for the caller to compare, with those of all workers.

    Raises BucketError, FormatError, ChainError; DtypeMismatch for values that the server's dtype cannot hold, WrongBase
    for a delta that is read against the live weights and cannot be of them.
    """
    started = time.monotonic()
    weights = TensorsAtHand(live) if subscriber.run.needs_weights else None
    change = subscriber.change(since, version, weights=weights)
    fetched = time.monotonic()
    placed = (
        _from_anchor(live, digests, change) if change.anchor is not None else _by_delta(live, digests, change.delta)
    )
    swaps = [_remake(transform, placed.writes) for transform in placed.touched]
    return Plan(
        since=change.since,
        after=change.position,
        digests=placed.digests,
        writes=(*placed.writes, *swaps),
        changed=placed.changed,
        wire_bytes=change.wire_bytes,
        created=change.commit.created,
        fetch_seconds=fetched - started,
        stage_seconds=time.monotonic() - fetched,
        way=replace(change, anchor=None, delta=Delta()),
    )


@dataclass(slots=True, eq=False)
class _Placed:
    """A change as writes to live memory, and the digests of every part after them. `changed` elements of this worker's
    differ, and transforms whose weights differ are `touched`."""

    digests: dict[str, tuple[int, ...]]
    writes: list[Scatter | Fill] = field(default_factory=list)
    changed: int = 0
    touched: list[Transform] = field(default_factory=list)


def _by_delta(live: LiveWeights, digests: PartDigests, delta: Delta) -> _Placed:
    """A delta from the bits that these digests are of."""
    placed = _Placed(dict(digests), changed=delta.changed)
    for name, tensor in delta.items():
        with _naming(name):
            placed.digests[name] = _place(live, name, tensor, digests[name], placed.writes)
    touched = [transform for name in delta for transform in live.transforms.get(name, ())]
    placed.touched = list(dict.fromkeys(touched))
    return placed


def _from_anchor(live: LiveWeights, digests: PartDigests, change: Change) -> _Placed:
    """Whole tensors, whatever lies there now."""
    assert change.anchor is not None
    placed = _Placed(dict(digests), touched=live.remade())
    for name in live.placement.boxes:  # of other tensors nothing is here
        wanted = change.anchor[name].copy()
        if name in change.delta:
            change.delta[name].apply_(wanted.data)
        with _naming(name):
            placed.digests[name], moved_here = _place_whole(live, name, wanted.data, placed.writes)
        placed.changed += moved_here
    return placed


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Have a DtypeMismatch name the tensor."""
    try:
        yield
    except DtypeMismatch as error:
        raise DtypeMismatch(f"{name}: {error}") from None


def _place(
    live: LiveWeights, name: str, tensor: TensorDelta, known: tuple[int, ...], writes: list[Scatter | Fill]
) -> tuple[int, ...]:
    """Add the writes of one tensor's change. Returns the digest of each part after it."""
    digests = []
    for (memory, box), digest in zip(live.places(name), known, strict=True):
        if tensor.positions is None:
            old = memory.read(box)
            new = old + box.pick(tensor.increments)
            before, after = digest_box(old, box), digest_box(new, box)
            _fill(memory, box, new, writes)
        else:
            inside, offsets = box.locate(tensor.positions)
            positions, on_device = tensor.positions[inside], memory.on_device(offsets)
            there = memory.gather(on_device)
            old = memory.from_device(there)
            new = old + tensor.increments[inside]
            before, after = digest_at(positions, old), digest_at(positions, new)
            writes += _scatters(memory, on_device, there, memory.bits_on_device(new))
        digests.append(moved(digest, before, after))
    return tuple(digests)


def _place_whole(
    live: LiveWeights, name: str, wanted: UInts, writes: list[Scatter | Fill]
) -> tuple[tuple[int, ...], int]:
    """Add the writes that make one tensor what it should be, whatever it is. The digest of each part after it, and how
    many elements change."""
    digests, changed = [], 0
    for memory, box in live.places(name):
        new = box.pick(wanted)
        differ = memory.differing(box, new)
        if differ.size * DENSE > new.size:
            _fill(memory, box, new, writes)
        elif differ.size:
            offsets = memory.on_device(box.at(differ)[1])
            writes += _scatters(memory, offsets, memory.gather(offsets), memory.bits_on_device(new[differ]))
        changed += differ.size
        digests.append(digest_box(new, box))
    return tuple(digests), changed


def _scatters(memory: Memory, offsets: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> Iterator[Scatter]:
    """The writes of these elements; on the host in pieces, for threads to share."""
    pieces = [tensor.split(PIECE if memory.is_on_host else max(new.numel(), 1)) for tensor in (offsets, old, new)]
    return (Scatter(memory, *piece) for piece in zip(*pieces, strict=True) if piece[0].numel())


def _fill(memory: Memory, box: LiveBox, new: UInts, writes: list[Scatter | Fill]) -> None:
    writes.append(Fill(memory, box, memory.view(box).clone(), memory.bits_on_device(new).reshape(box.shape)))


def _remake(transform: Transform, writes: Iterable[Scatter | Fill]) -> Swap:
    """Run a module's transform on a shadow of it with its new weights."""
    values = transform.copies()
    storages = {old.untyped_storage().data_ptr(): values[leaf] for leaf, old in transform.loaded.items()}
    for write in writes:
        if (copied := storages.get(write.memory.flat.untyped_storage().data_ptr())) is not None:
            write.put(Memory(copied), write.new)
    shadow = transform.shadow(values)
    live, made = transform.results(transform.module), transform.results(shadow)
    if any(name not in made or made[name].shape != tensor.shape for name, tensor in live.items()):
        raise EngineUnsupported(f"what the server makes of {transform.prefix} after loading does not fit in its place")
    attributes = (*transform.hidden, *(name for name in transform.plain if name in vars(shadow)))
    return Swap(
        transform.module,
        tuple(SwappedTensor(tensor, tensor.detach().clone(), made[name].detach()) for name, tensor in live.items()),
        tuple(SwappedAttribute(name, getattr(transform.module, name), getattr(shadow, name)) for name in attributes),
    )
