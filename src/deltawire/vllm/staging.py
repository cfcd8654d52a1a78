"""Everything about an update that can be done while the server generates: fetch, verify, place, gather, compare.

Weights move only by our own updates, so old bits gathered while generating are still right in the pause. A Plan that
comes out of here has been compared, tensor by tensor, with the digests of its commit; applying it only scatters.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch

from deltawire.bits import Bits
from deltawire.changes import Change
from deltawire.delta import Delta, TensorDelta, between_bits
from deltawire.digest import digest_at, moved
from deltawire.digest import root as root_of
from deltawire.errors import BadDigest, WrongBase
from deltawire.manifests import Position
from deltawire.subscriber import Subscriber
from deltawire.vllm.live import LiveWeights
from deltawire.vllm.memory import Memory


@dataclass(frozen=True, slots=True, eq=False)
class Scatter:
    """Elements of one storage: where, what is there, and what will be. On the device already."""

    memory: Memory
    offsets: torch.Tensor
    old: torch.Tensor
    new: torch.Tensor

    def write(self) -> None:
        """Put the new bits."""
        self.memory.flat[self.offsets] = self.new

    def undo(self) -> None:
        """Put the old bits back."""
        self.memory.flat[self.offsets] = self.old


@dataclass(frozen=True, slots=True, eq=False)
class Fill:
    """A whole rectangle of live memory, for a tensor that changed nearly everywhere."""

    view: torch.Tensor
    old: torch.Tensor
    new: torch.Tensor

    def write(self) -> None:
        """Put the new bits."""
        self.view.copy_(self.new)

    def undo(self) -> None:
        """Put the old bits back."""
        self.view.copy_(self.old)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One update, checked and ready. `since` is None when it starts from an anchor rather than a known version.

    `digests` are those of every tensor after it. Seconds by the worker's clock; `created` is the commit's own.
    """

    since: Position | None
    after: Position
    digests: Mapping[str, int]
    writes: tuple[Scatter | Fill, ...]
    changed: int
    wire_bytes: int
    created: float
    fetch_seconds: float
    stage_seconds: float


def stage(
    live: LiveWeights, digests: Mapping[str, int], subscriber: Subscriber, since: Position | None, version: int
) -> Plan:
    """Make the plan that leads from the live weights (whose `digests` are known) to a committed version.

    The way there is the cheapest, folded into one change, forward or back; with None it starts from an anchor.

    Raises BucketError, FormatError, ChainError; WrongBase when live bits are not what their digest says; BadDigest when
    the change does not lead to what the commit promises.
    """
    started = time.monotonic()
    change = subscriber.change(since, version)
    delta = _from_live(live, change)
    fetched = time.monotonic()
    writes: list[Scatter | Fill] = []
    after = dict(digests)
    for name, tensor in delta.items():
        before_part, after_part = _place(live, name, tensor, writes)
        after[name] = moved(digests[name], before_part, after_part)
    if root_of(live.table.values(), after) != change.position.root:
        promised = subscriber.digests_at(version)
        _blame(live, digests, change.position, [name for name, value in promised.items() if after[name] != value])
    return Plan(
        since=change.since,
        after=change.position,
        digests=after,
        writes=tuple(writes),
        changed=delta.changed,
        wire_bytes=change.wire_bytes,
        created=change.commit.created,
        fetch_seconds=fetched - started,
        stage_seconds=time.monotonic() - fetched,
    )


def _blame(live: LiveWeights, digests: Mapping[str, int], target: Position, wrong: list[str]) -> NoReturn:
    """Tell live weights that drifted from a change that does not lead where its commit says."""
    names = f"{len(wrong)} tensors would not match the commit: {', '.join(wrong[:4])}"
    if drifted := [name for name in wrong if live.digest(name) != digests[name]]:
        raise WrongBase(f"{target}: {names}; something else wrote to {', '.join(drifted[:4])}: restart vLLM")
    raise BadDigest(f"{target}: {names}; the live weights are sound, what was published is not: publish a new run")


def apply(writes: Iterable[Scatter | Fill]) -> None:
    """Write everything, or (when a write fails) put everything back and raise."""
    done: list[Scatter | Fill] = []
    with torch.inference_mode():
        try:
            for write in writes:
                done.append(write)
                write.write()
        except BaseException:
            for write in reversed(done):
                write.undo()
            raise


def undo(writes: tuple[Scatter | Fill, ...]) -> None:
    """Put back what `apply` replaced."""
    with torch.inference_mode():
        for write in reversed(writes):
            write.undo()


def _from_live(live: LiveWeights, change: Change) -> Delta:
    """The change from what is live, which after an anchor may be anything."""
    if change.anchor is None:
        return change.delta
    return Delta({name: _from_anchor(live, name, change.anchor[name], change.delta) for name in live.table})


def _from_anchor(live: LiveWeights, name: str, anchor: Bits, later: Delta) -> TensorDelta:
    """The change of one tensor from what is live to the anchor and the deltas after it."""
    wanted = anchor.copy()
    if name in later:
        later[name].apply_(wanted.data)
    return between_bits(live.read(name), wanted)


def _place(live: LiveWeights, name: str, tensor: TensorDelta, writes: list[Scatter | Fill]) -> tuple[int, int]:
    """Add one tensor's writes. Returns the touched elements' part of its digest, before and after."""
    positions, steps = tensor.sparse()
    if tensor.positions is None:
        old = live.read(name)
        new = Bits(old.dtype, old.shape, old.data + tensor.steps)
        _fill(live, name, old, new, writes)
        return digest_at(positions, old.data[positions]), digest_at(positions, new.data[positions])
    old_bits = np.empty(steps.size, steps.dtype)
    places = list(live.locate(name, positions))
    for memory, inside, offsets in places:
        on_device = memory.on_device(offsets)
        old_bits[inside] = memory.gather(on_device)
        new = memory.bits_on_device(old_bits[inside] + steps[inside])
        writes.append(Scatter(memory, on_device, memory.bits_on_device(old_bits[inside]), new))
    return digest_at(positions, old_bits), digest_at(positions, old_bits + steps)


def _fill(live: LiveWeights, name: str, old: Bits, new: Bits, writes: list[Scatter | Fill]) -> None:
    for view, (shape, offset, strides) in live.rectangles(name):
        pick = [
            torch.from_numpy(bits.data.view(str(view.dtype).removeprefix("torch.")))
            .as_strided(shape, strides, offset)
            .contiguous()
            .to(view.device)
            for bits in (old, new)
        ]
        writes.append(Fill(view, *pick))
