"""Everything about an update that can be done while the server generates: fetch, verify, place, gather, compare.

Weights move only by our own updates, so old bits gathered while generating are still right in the pause. A Plan names
the digests that it leads to, to be compared with its commit's before it is applied; applying it only scatters.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

from deltawire.errors import DtypeMismatch, EngineUnsupported
from deltawire.live.at_hand import TensorsAtHand
from deltawire.live.changes import LiveChanges
from deltawire.live.digests import Place
from deltawire.live.live_weights import LiveWeights
from deltawire.live.transforms import Transform
from deltawire.live.writes import Patch, Swap, SwappedAttribute, SwappedTensor, Write
from deltawire.read.changes import Change
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.records import Position
from deltawire.weights.delta import Delta, TensorDelta
from deltawire.weights.digest import moved

PartDigests = Mapping[str, tuple[int, ...]]
"""by name, the digest of each part of a tensor that this worker holds"""


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
    live.accelerators.give_back_pinned()
    weights = TensorsAtHand(live) if subscriber.run.needs_weights else None
    change = subscriber.change(since, version, weights=weights, kept=live.kept)
    fetched = time.monotonic()
    placed = _from_anchor(live, digests, change) if change.anchor is not None else _by_delta(live, digests, change)
    with live.accelerators.beside():
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


class _Placed(NamedTuple):
    """A change as writes to live memory, and the digests of every part after them. `changed` elements of this worker's
    differ, and transforms whose weights differ are `touched`."""

    digests: PartDigests
    writes: Sequence[Patch]
    changed: int
    touched: Sequence[Transform]


def _by_delta(live: LiveWeights, digests: PartDigests, change: Change) -> _Placed:
    """A delta from the bits that these digests are of."""
    changes, delta = LiveChanges(), change.delta
    for name in delta:
        with _naming(name):
            for number, (place, own) in enumerate(_shares(live, change, name)):
                assert own is not None
                changes.add((name, number), place, own)
    changes.finish()
    after = dict(digests)
    for name in delta:
        after[name] = tuple(moved(digest, *changes.moved[name, number]) for number, digest in enumerate(digests[name]))
    touched = [transform for name in delta for transform in live.transforms.get(name, ())]
    return _Placed(after, changes.writes, delta.changed, list(dict.fromkeys(touched)))


def _from_anchor(live: LiveWeights, digests: PartDigests, change: Change) -> _Placed:
    """Whole tensors, whatever lies there now."""
    assert change.anchor is not None
    changes, after, changed = LiveChanges(), dict(digests), 0
    for name in live.placement.boxes:  # of other tensors nothing is here
        whole, made = change.anchor[name].data, []
        for place, own in _shares(live, change, name):
            wanted = place.box.pick(whole)
            if own is not None:
                own.apply_(wanted)  # in memory of its own
            with _naming(name):
                made.append(changes.make(place, wanted))
        after[name] = tuple(digest for digest, _ in made)
        changed += sum(elements for _, elements in made)
    changes.finish()
    return _Placed(after, changes.writes, changed, live.remade())


def _shares(live: LiveWeights, change: Change, name: str) -> Iterator[tuple[Place, TensorDelta | None]]:
    """Each place of a tensor, and what changes there, by row-major positions in its box; None where nothing does."""
    found = change.delta.get(name)
    shares = {} if found is None or change.kept is None else change.kept[name].split(found)
    for place in live.places(name):
        yield place, found if change.kept is None else shares.get(place.box.part)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Have a DtypeMismatch name the tensor."""
    try:
        yield
    except DtypeMismatch as error:
        raise DtypeMismatch(f"{name}: {error}") from None


def _remake(transform: Transform, writes: Iterable[Patch]) -> Swap:
    """Run a module's transform on a shadow of it with its new weights."""
    values = transform.copies()
    copies = {old.untyped_storage().data_ptr(): values[leaf] for leaf, old in transform.loaded.items()}
    for write in writes:
        write.write_to(copies)
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
