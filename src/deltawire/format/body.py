"""What a delta file of format version 2 holds: one directory, and one payload of all tensors. FORMAT.md §3

Tiles are coded one by one, so threads share them: two cores encode and decode nearly twice as fast as one.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np

from deltawire.errors import FormatError, NeedsBase
from deltawire.format import container
from deltawire.format.codecs import dense, directory, ranking, subset, tiles, twins
from deltawire.format.codecs.directory import Listed
from deltawire.format.codecs.ranking import Ranking, ToPack
from deltawire.format.codecs.subset import Coded, TileEntry, ToEncode
from deltawire.format.codecs.tiles import Tile
from deltawire.weights import threads
from deltawire.weights.bits import Bits, UInts
from deltawire.weights.blocks import PartBits
from deltawire.weights.delta import Delta, TensorDelta
from deltawire.weights.kept import Kept
from deltawire.weights.speed import slow
from deltawire.weights.table import TensorSpec

STREAMS = ("directory", "payload")
DENSE_TRY_FROM = 0.15
"""Share of changed elements from which the dense form is tried as well; below it lists are always shorter."""
DENSE_TRY_TINY = 64
"""elements; so small a tensor is tried dense at any density"""
MANY = 1 << 17
"""changes from which threads are started; below it they cost more than they save"""
_Job = TypeVar("_Job")
_Done = TypeVar("_Done")


def encode(
    delta: Delta, olds: Mapping[str, UInts], coded: Mapping[str, Coded], stored: Collection[str] = ()
) -> dict[str, Bits]:
    """The streams; a tensor is as in `coded`, else ranked by the classes of its old bits where `olds` has them. Those
    `stored` are dense, and not compressed."""
    names = sorted(delta)
    todo = [name for name in names if name not in coded and name not in stored]
    shapes = {name: tiles.choose(delta[name].shape) for name in todo}
    jobs = {name: subset.to_encode(delta[name], olds.get(name), shapes[name]) for name in todo}
    changed = sum(delta[name].changed for name in todo)
    slow(changed)
    done = _run(_encode_tile, jobs, changed, olds)
    made = {name: subset.coded(shapes[name], jobs[name], list(islice(done, len(jobs[name])))) for name in todo}
    listed, payloads = [], []
    for name in names:
        tensor = delta[name]
        if name in stored:
            encoding, part = _dense(dense.encode(tensor, stored=True)["dense"])
        else:
            encoding, part = _shorter(tensor, coded[name] if name in coded else made[name])
        spec = TensorSpec(name, tensor.dtype, tensor.shape, tensor.changed)
        listed.append(Listed(spec, encoding, part.tile, part.entries))
        payloads.append(part.payload)
    streams = (directory.write(listed), np.concatenate([np.empty(0, np.uint8), *payloads]))
    return {name: Bits("U8", data.shape, data) for name, data in zip(STREAMS, streams, strict=True)}


def encode_ranked(delta: Mapping[str, TensorDelta], rankings: Mapping[str, Ranking]) -> dict[str, Coded]:
    """What `subset.encode` makes of tensors' changes and old bits, of changes that were ranked before."""
    jobs = {name: ranking.to_pack(delta[name], own) for name, own in rankings.items()}
    done = _run(_pack_tile, jobs, sum(delta[name].changed for name in rankings), {})
    return {
        name: subset.joined(own.tile, list(islice(done, len(jobs[name]))), by_class=True)
        for name, own in rankings.items()
    }


def read(data: bytes | memoryview, box: container.Header, codec: str) -> list[Listed]:
    """What the directory of a file's bytes lists, checked. Raises FormatError."""
    if tuple(box.entries) != STREAMS or any(e.dtype != "U8" or len(e.shape) != 1 for e in box.entries.values()):
        raise FormatError("the streams in the file are not a directory and a payload")
    frame, payload = (container.tensor(data, box, name) for name in STREAMS)
    return directory.read(frame.data, codec=codec, payload=payload.data.size)


def decode(
    payload: UInts, listed: Sequence[Listed], olds: Mapping[str, Bits], kept: Kept | None = None
) -> dict[str, TensorDelta]:
    """The change of each tensor that a file lists. `olds` has the old bits of those whose encoding is `class`. Of one
    that is there in parts (`PartBits`), the change is that of the tiles that are in these. Of a single tensor it may be
    that of what is `kept` alone; then tiles of which nothing is kept are passed over.

    Raises FormatError, NeedsBase where only a part of a tile is there, and WrongBase for old bits that cannot be those
    of the delta.
    """
    at, jobs, found = 0, {}, {}
    for tensor in listed:
        part, name = payload[at : at + tensor.nbytes], tensor.spec.name
        at += tensor.nbytes
        if tensor.encoding == "dense":
            found[name] = dense.decode({"dense": part}, tensor.spec, kept)
        else:
            coded = Coded(tensor.tile, tensor.entries, part, tensor.encoding == "class")
            jobs[name] = _to_decode(coded, tensor.spec, olds[name] if coded.by_class else None, kept)
    changed = sum(tensor.spec.changed for tensor in listed)
    slow(changed)
    done = _run(_decode_tile, jobs, changed, {name: old.data for name, old in olds.items()})
    for tensor in listed:
        if (own := jobs.get(tensor.spec.name)) is not None:
            change = subset.decoded(tensor.spec, tensor.tile, list(islice(done, len(own))))
            found[tensor.spec.name] = change if kept is None else kept.cut(change)
    return found


def _to_decode(coded: Coded, spec: TensorSpec, old: Bits | None, kept: Kept | None) -> list[subset.ToDecode]:
    """The jobs of a tensor, of the tiles that are wanted and whose old bits are at hand."""

    def is_here(tile: Tile) -> bool:
        if kept is not None and not kept.meets(tile.row, tile.column, tile.rows, tile.width):
            return False
        if not isinstance(old, PartBits):
            return True
        held = old.held_of(tile.row, tile.column, tile.rows, tile.width)
        if held not in (0, tile.size):
            raise NeedsBase(
                f'{spec.name}: deltas of codec "class" are read tile by tile, and of a tile this worker holds a part: '
                'publish with codec="subset", or run `deltawire compact`, whose folds and anchors need no weights'
            )
        return held == tile.size

    return subset.to_decode(coded, spec, None if old is None else old.data, is_here)


def _shorter(tensor: TensorDelta, coded: Coded) -> tuple[str, Coded]:
    """The encoding of fewer bytes: lists, or a step an element."""
    if tensor.changed >= DENSE_TRY_FROM * tensor.total or tensor.total <= DENSE_TRY_TINY:
        frame = dense.encode(tensor)["dense"]
        if frame.size < coded.payload.size:
            return _dense(frame)
    return "class" if coded.by_class else "subset", coded


def _dense(frame: UInts) -> tuple[str, Coded]:
    return "dense", Coded((0, 0), (TileEntry(frame.size, 0, ()),), frame)


def _encode_tile(job: ToEncode) -> tuple[TileEntry, UInts]:
    return subset.encode_tile(job, twins.fast())


def _pack_tile(job: ToPack) -> tuple[TileEntry, UInts]:
    return ranking.pack_tile(job, twins.fast())


def _decode_tile(job: subset.ToDecode) -> tuple[np.ndarray, UInts]:
    return subset.decode_tile(job, twins.fast())


def _run(
    work: Callable[[_Job], _Done], jobs: Mapping[str, Sequence[_Job]], changed: int, olds: Mapping[str, UInts]
) -> Iterator[_Done]:
    """The results of the jobs of all tensors, in order; by threads where the changes and the old bits that are looked
    at are worth it."""
    twins.fast()  # imported by one thread
    elements = sum(olds[name].size for name in jobs if name in olds)
    every = [job for own in jobs.values() for job in own]
    return threads.run(work, every, worth=changed + elements // 64 >= MANY)
