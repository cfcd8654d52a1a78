"""How much a run's table allows: bytes of a payload before any is fetched, memory of a change before it is decoded.

A record may be a stranger's and claim anything. What it claims is held against the tensors of the run.
"""

import os
from collections.abc import Iterable, Mapping

from deltawire.errors import FormatError, ShapeMismatch, TooLarge, UnknownTensor, some
from deltawire.format.codecs.gap import LONGEST_STEP
from deltawire.runlog.records import NEED_WEIGHTS, Covering, Payload, Run
from deltawire.weights.bits import WIDTHS, count
from deltawire.weights.kept import KeptParts
from deltawire.weights.table import TensorEntry, TensorSpec

MAX_PAYLOADS = 10_000
"""files of one version: the ranks of a job, or the shards of a checkpoint"""
MAX_ASSET = 128 << 20
"""bytes of one file beside an anchor's weights; the largest tokenizers are a third of it"""
MAX_ASSETS = 512 << 20
"""bytes of all of them"""
_PER_FILE, _PER_TENSOR, _PER_DIMENSION, _PER_LETTER = 16 << 10, 512, 24, 24
"""bytes of a file's header, at most: a name stands in it three times, escaped twice"""


def require_delta(record: Covering, table: Iterable[TensorEntry], where: str) -> None:
    """Raise TooLarge for a delta or fold whose payloads are larger than any change of this table could be."""
    entries = tuple(table)
    _require_few(record.payloads, where)
    _require(record.payloads, entries, where)


def require_anchor(record: Covering, table: Iterable[TensorEntry], where: str) -> None:
    """Raise TooLarge for an anchor whose weights are larger than this table's, whole or as changes from all-zero bits,
    or whose other files are no config and tokenizer by their size."""
    _require_few(record.payloads, where)
    weights = [payload for payload in record.payloads if payload.key.endswith(".safetensors")]
    _require(weights, table, where)
    require_assets({payload.key: payload.size for payload in record.payloads if payload not in weights}, where)


def require_assets(sizes: Mapping[str, int], where: str) -> None:
    """Raise TooLarge for files beside the weights (name -> bytes) that no reader would fetch."""
    for name, size in sizes.items():
        if size > MAX_ASSET:
            raise TooLarge(f"{where}: {name} is {size:,} bytes; beside weights, a file may have {MAX_ASSET:,}")
    if sum(sizes.values()) > MAX_ASSETS:
        raise TooLarge(f"{where}: {len(sizes)} files beside the weights, of more than {MAX_ASSETS:,} bytes")


def require_memory(
    tensors: Iterable[TensorSpec], where: str, kept: KeptParts | None = None, *, available: int | None = None
) -> None:
    """Raise TooLarge for a change that takes more memory than this host has (`available` bytes): positions and
    increments of all its elements, or of those that are `kept`."""
    needed = 0
    for spec in tensors:
        own = spec.changed if kept is None else min(spec.changed, kept[spec.name].size if spec.name in kept else 0)
        needed += own * (8 + WIDTHS[spec.dtype])
    there = _memory() if available is None else available
    if needed > there:
        raise TooLarge(f"{where} takes {needed:,} bytes of memory to decode, and this host has {there:,}")


def require_codec(codec: str, run: Run, where: str, *, keyed: bool = False) -> None:
    """Raise FormatError unless a delta of this run may be of `codec`, which needs weights where its key says so
    (`keyed`), and there alone."""
    if codec not in run.may_use:
        raise FormatError(f"{where} is of codec {codec!r}, where its run allows {some(run.may_use)}")
    if keyed != (codec in NEED_WEIGHTS):
        raise FormatError(f"{where} is of codec {codec!r}, and its key says otherwise: it is not for this place")


def most_bytes(table: Iterable[TensorEntry], files: int) -> int:
    """The most that all elements of a table take in so many files: more than the widest codec writes for a change of
    each, so never less than the weights themselves."""
    entries = tuple(table)
    content = sum(count(entry.shape) * (2 + LONGEST_STEP[WIDTHS[entry.dtype]]) for entry in entries)
    header = _PER_FILE + sum(
        _PER_TENSOR + _PER_DIMENSION * len(entry.shape) + _PER_LETTER * len(entry.name.encode()) for entry in entries
    )
    return content + files * header


def _require(payloads: Iterable[Payload], table: Iterable[TensorEntry], where: str) -> None:
    listed = tuple(payloads)
    claimed, most = sum(payload.size for payload in listed), most_bytes(table, len(listed))
    if claimed > most:
        raise TooLarge(f"{where} claims {claimed:,} bytes, where the tensors of its run take at most {most:,}")


def _require_few(payloads: tuple[Payload, ...], where: str) -> None:
    if len(payloads) > MAX_PAYLOADS:
        raise TooLarge(f"{where} lists {len(payloads):,} files; a version has at most {MAX_PAYLOADS:,}")


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_in_table(specs: Iterable[TensorSpec], entries: Mapping[str, TensorEntry], where: str) -> None:
    """Raise UnknownTensor or ShapeMismatch unless a delta file changes only what the run trains, and as it is there."""
    listed = list(specs)
    trainable = {entry.name for entry in entries.values() if entry.trainable}
    if unknown := [spec.name for spec in listed if spec.name not in trainable]:
        raise UnknownTensor(f"{where} changes {some(map(repr, unknown))}, which the run does not train")
    for spec in listed:
        entry = entries[spec.name]
        if (spec.dtype, spec.shape) != (entry.dtype, entry.shape):
            raise ShapeMismatch(f"{where}: {spec.name} is {spec.dtype} {list(spec.shape)}, not as in the run's table")
