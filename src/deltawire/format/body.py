"""What a delta file of format version 2 holds: one directory, and one payload of all tensors. FORMAT.md §3

Tiles are coded one by one, so threads share them: two cores encode and decode nearly twice as fast as one.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np

from deltawire.errors import FormatError
from deltawire.format import container
from deltawire.format.codecs import dense, directory, subset, tiles, twins
from deltawire.format.codecs.directory import Listed
from deltawire.format.codecs.subset import Coded, TileEntry, ToEncode
from deltawire.weights.bits import Bits, UInts
from deltawire.weights.delta import Delta, TensorDelta
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


def encode(delta: Delta, olds: Mapping[str, UInts]) -> dict[str, Bits]:
    """The streams; a tensor is ranked by the classes of its old bits where `olds` has them."""
    slow(delta.changed)
    names = sorted(delta)
    shapes = {name: tiles.choose(delta[name].shape) for name in names}
    jobs = {name: subset.to_encode(delta[name], olds.get(name), shapes[name]) for name in names}
    done = _run(_encode_tile, [job for own in jobs.values() for job in own], delta.changed, _elements(jobs, olds))
    listed, payloads = [], []
    for name in names:
        coded = subset.coded(shapes[name], list(islice(done, len(jobs[name]))))
        tensor, by_class = delta[name], any(job.scheme for job in jobs[name])
        encoding, part = _shorter(tensor, coded, "class" if by_class else "subset")
        spec = TensorSpec(name, tensor.dtype, tensor.shape, tensor.changed)
        listed.append(Listed(spec, encoding, part.tile, part.entries))
        payloads.append(part.payload)
    streams = (directory.write(listed), np.concatenate([np.empty(0, np.uint8), *payloads]))
    return {name: Bits("U8", data.shape, data) for name, data in zip(STREAMS, streams, strict=True)}


def read(data: bytes, box: container.Header, codec: str) -> list[Listed]:
    """What the directory of a file's bytes lists, checked. Raises FormatError."""
    if tuple(box.entries) != STREAMS or any(e.dtype != "U8" or len(e.shape) != 1 for e in box.entries.values()):
        raise FormatError("the streams in the file are not a directory and a payload")
    frame, payload = (container.tensor(data, box, name) for name in STREAMS)
    return directory.read(frame.data, codec=codec, payload=payload.data.size)


def decode(payload: UInts, listed: Sequence[Listed], olds: Mapping[str, UInts]) -> Delta:
    """The change that a file holds. `olds` has the old bits of every tensor whose encoding is `class`.

    Raises FormatError, and WrongBase for old bits that cannot be those of the delta.
    """
    at, jobs, found = 0, {}, {}
    for tensor in listed:
        part, name = payload[at : at + tensor.nbytes], tensor.spec.name
        at += tensor.nbytes
        if tensor.encoding == "dense":
            found[name] = dense.decode({"dense": part}, tensor.spec)
        else:
            old = olds[name] if tensor.encoding == "class" else None
            jobs[name] = subset.to_decode(Coded(tensor.tile, tensor.entries, part), tensor.spec, old)
    changed = sum(tensor.spec.changed for tensor in listed)
    slow(changed)
    done = _run(_decode_tile, [job for own in jobs.values() for job in own], changed, _elements(jobs, olds))
    for tensor in listed:
        if own := jobs.get(tensor.spec.name):
            found[tensor.spec.name] = subset.decoded(tensor.spec, tensor.tile, list(islice(done, len(own))))
    return Delta(found)


def _shorter(tensor: TensorDelta, coded: Coded, encoding: str) -> tuple[str, Coded]:
    """The encoding of fewer bytes: lists, or a step an element."""
    if tensor.changed >= DENSE_TRY_FROM * tensor.total or tensor.total <= DENSE_TRY_TINY:
        frame = dense.encode(tensor)["dense"]
        if frame.size < coded.payload.size:
            return "dense", Coded((0, 0), (TileEntry(frame.size, 0, ()),), frame)
    return encoding, coded


def _encode_tile(job: ToEncode) -> tuple[TileEntry, UInts]:
    return subset.encode_tile(job, twins.fast())


def _decode_tile(job: subset.ToDecode) -> tuple[np.ndarray, UInts]:
    return subset.decode_tile(job, twins.fast())


def _elements(jobs: Mapping[str, Sequence[ToEncode] | Sequence[subset.ToDecode]], olds: Mapping[str, UInts]) -> int:
    """Elements whose classes are looked at."""
    return sum(job.tile.size for name, own in jobs.items() if name in olds for job in own)


def _run(work: Callable[[_Job], _Done], jobs: list[_Job], changed: int, elements: int) -> Iterator[_Done]:
    """The jobs' results in order; by as many threads as there are cores, where that is worth it."""
    cores = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, len(jobs))
    if cores < 2 or changed + elements // 64 < MANY:
        return map(work, jobs)
    twins.fast()  # imported by one thread
    with ThreadPoolExecutor(cores, "deltawire-codec") as pool:
        return iter(list(pool.map(work, jobs)))
