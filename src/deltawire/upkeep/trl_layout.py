"""A run as a folder in the layout of TRL's post, and such a folder as a run. docs/FORMAT.md §5.4 has the layout.

anchors/step_000010.safetensors     every tensor, whole
deltas/step_000011.safetensors      NAME.indices and NAME.values of what changed since the file before
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deltawire.buckets.atomic import file_system_errors, replacing
from deltawire.buckets.base import Bucket, Stat
from deltawire.buckets.temporary import TemporaryFolder
from deltawire.errors import AlreadyExists, FormatError, Gap, NotFound
from deltawire.format import checkpoint, container, delta_file
from deltawire.format.codecs import raw
from deltawire.publish.publisher import Publisher
from deltawire.read.changes import Update
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.keys import TRL_FOLDERS, trl_key, trl_step
from deltawire.runlog.records import Position
from deltawire.weights.bits import Bits
from deltawire.weights.delta import Delta


@dataclass(frozen=True, slots=True)
class Stored:
    """One file of the layout: a whole checkpoint, or what changed since the file before."""

    step: int
    anchor: bool
    stat: Stat


@dataclass(frozen=True, slots=True)
class ImportReport:
    """A folder that was imported: where the run stands, files and bytes read, and bytes of the versions written."""

    position: Position
    files: int
    read_bytes: int
    wire_bytes: int


@dataclass(frozen=True, slots=True)
class ExportReport:
    """A run that was exported: versions `first` to `last`, how many files of each kind, and their bytes."""

    folder: Path
    first: int
    last: int
    anchors: int
    deltas: int
    written_bytes: int


def import_trl(
    source: Bucket,
    publisher: Publisher,
    *,
    timeout: float | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> ImportReport:
    """Publish each file of a folder in TRL's layout as a version, from its oldest anchor on; `step` is the file's.

    The bits are those of the files. Memory: one model and one delta. `timeout` is how long one version may take to be
    durable.

    Raises AlreadyExists where the bucket holds a run, NotFound where no anchor is there, Gap where a delta continues no
    file that is there, FormatError for another kind of file; and what `publish` raises.
    """
    if publisher.position is not None:
        raise AlreadyExists(
            f"{publisher.bucket.url} holds run {publisher.position.run} already; import into a bucket of its own"
        )
    files = list_trl(source)
    start = next((number for number, file in enumerate(files) if file.anchor), None)
    if start is None:
        raise NotFound(f"{source.url} holds no anchors/step_NNNNNN.safetensors: not a folder in TRL's layout")
    weights: dict[str, Bits] = {}
    wire_bytes, last = 0, files[start].step
    with TemporaryFolder() as folder:
        for file in files[start:]:
            path = folder / "file.safetensors"
            source.get_file(file.stat.key, path, limit=file.stat.size)
            weights = _read_anchor(path) if file.anchor else _moved(weights, path, file, last)
            last = file.step
            wire_bytes += publisher.publish(weights, step=file.step).wire_bytes
            publisher.flush(timeout)
            on_step(file.step)
    assert publisher.position is not None
    read = sum(file.stat.size for file in files[start:])
    return ImportReport(publisher.position, len(files) - start, read, wire_bytes)


def list_trl(source: Bucket) -> list[Stored]:
    """The files of the layout, by step; of an anchor and a delta of one step the anchor."""
    found: dict[int, Stored] = {}
    for stat in (stat for folder in TRL_FOLDERS for stat in source.list(folder)):
        if (said := trl_step(stat.key)) is not None:
            found[said[0]] = Stored(*said, stat)
    return [found[step] for step in sorted(found)]


def export_trl(
    subscriber: Subscriber,
    folder: Path,
    *,
    until: int | None = None,
    anchor_every: int = 10,
    on_version: Callable[[int], None] = lambda version: None,
) -> ExportReport:
    """Write a run as a folder in TRL's layout: an anchor every so many versions, and deltas between.

    It begins at the anchor nearest to `until` (the newest version). Memory: one model and one delta. Every version's
    digests are compared. Raises AlreadyExists for a folder that holds anything; what Subscriber.updates raises.
    """
    if folder.exists() and any(folder.iterdir()):
        raise AlreadyExists(f"{folder} holds something already; name another folder")
    weights: dict[str, Bits] = {}
    kinds: list[bool] = []
    written, versions = 0, []
    for number, update in enumerate(subscriber.updates(until=until, weights=weights)):
        anchor = number % anchor_every == 0
        path = folder / trl_key(update.position.version, anchor=anchor)
        metadata = {"sparse": str(not anchor), "model_version": str(update.position.version)}
        if update.delta is None:
            weights.update(_taken(update, (entry.name for entry in subscriber.run.table)))
        elif not anchor:
            metadata |= _metadata(update.delta, weights, update.parent)
            written += _write(path, dict(_streams(update.delta, weights)), metadata)
        if update.delta is not None:
            update.delta.apply_(weights)
        if anchor:
            written += _write(path, weights, metadata | {"sparsity": "0.0"})
        kinds.append(anchor)
        versions.append(update.position.version)
        on_version(update.position.version)
    return ExportReport(folder, versions[0], versions[-1], sum(kinds), len(kinds) - sum(kinds), written)


def _read_anchor(path: Path) -> dict[str, Bits]:
    if delta_file.is_delta(checkpoint.metadata_of(path)):
        raise FormatError(f"{path.name} is a delta file of deltawire, not an anchor of TRL's layout")
    return {name: bits.copy() for name, bits in checkpoint.shard(path).items()}


def _moved(weights: dict[str, Bits], path: Path, file: Stored, last: int) -> dict[str, Bits]:
    """The weights after a delta file, which says what it continues, or continues the step before its own."""
    before = checkpoint.metadata_of(path).get("prev_model_version", str(file.step - 1))
    if before != str(last):
        raise Gap(f"{file.stat.key} continues step {before}, and the file before it is of step {last}")
    delta_file.decode(path.read_bytes(), base=weights).apply_(weights)
    return weights


def _taken(update: Update, names: Iterable[str]) -> dict[str, Bits]:
    assert update.anchor is not None
    return {name: update.anchor[name].copy() for name in names}


def _metadata(delta: Delta, weights: Mapping[str, Bits], parent: Position | None) -> dict[str, str]:
    """What a delta file of the layout says of itself."""
    elements = sum(bits.data.size for bits in weights.values())
    said = {"sparsity": f"{1 - delta.changed / elements:.6f}", "changed_params": json.dumps(sorted(delta))}
    return said if parent is None else said | {"prev_model_version": str(parent.version)}


def _streams(delta: Delta, weights: Mapping[str, Bits]) -> Iterator[tuple[str, Bits]]:
    for name in sorted(delta):
        parts = raw.encode(delta[name], weights[name])
        width = parts["indices"].itemsize
        yield f"{name}.indices", Bits(f"I{8 * width}", parts["indices"].shape, parts["indices"].view(f"<u{width}"))
        yield f"{name}.values", Bits(delta[name].dtype, parts["values"].shape, parts["values"])


def _write(path: Path, tensors: Mapping[str, Bits], metadata: Mapping[str, str]) -> int:
    """Write a safetensors file, a tensor at a time; its bytes."""
    layout = {name: (bits.dtype, bits.shape) for name, bits in tensors.items()}
    with file_system_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside, aside.open("wb") as file:
        file.write(container.header_bytes(layout, metadata))
        for bits in tensors.values():
            file.write(bits.data.view(np.uint8).data)
    return path.stat().st_size
