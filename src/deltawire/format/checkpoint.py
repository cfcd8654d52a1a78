"""Hugging Face checkpoints in and out: safetensors shards, their index, and the small files beside them.

PEFT adapters too, which are one file and its config.
"""

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from deltawire.buckets.atomic import file_system_errors, require_room
from deltawire.buckets.base import is_key
from deltawire.errors import BadDigest, FormatError, NotFound, TooLarge, Truncated, some
from deltawire.format import container
from deltawire.weights.bits import Bits
from deltawire.weights.digest import digest_bits
from deltawire.weights.table import TensorEntry

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_PREFIX = "base_model.model."
"""how the name of every tensor in a PEFT adapter's file begins; no model's own checkpoint has such names"""
SHARD_BYTES = 5_000_000_000
"""bytes of tensors per shard file: what transformers writes by default is of this order"""
MAX_INDEX = 64 << 20
ASSETS = {".json", ".txt", ".jinja", ".model", ".tiktoken"}
"""suffixes of config, tokenizer and chat template; no code, no pickles, no other framework's weights"""
TEXTS = {"merges.txt", "vocab.txt", "added_tokens.txt", "chat_template.txt"}
"""text files that belong to a tokenizer, in the folder of any tool"""


class Checkpoint(Mapping[str, Bits]):
    """The tensors of a checkpoint folder, name -> Bits, memory-mapped: nothing is read before it is touched.

    With `writable=True` writing to a tensor's bits writes the file. Tensors named by `without` are passed over. Raises
    NotFound when the folder holds no safetensors or lacks a shard. Raises FormatError for a shard that cannot be read
    as safetensors, or an index that disagrees with its shards.
    """

    def __init__(self, folder: Path, *, writable: bool = False, without: Collection[str] = ()) -> None:
        self.folder = folder
        self._where: dict[str, tuple[np.memmap, container.Header]] = {}
        for name, listed in _shards(folder).items():
            mapped, header = _open_shard(folder / name, "r+" if writable else "r")
            if twin := self._where.keys() & header.entries.keys():
                raise FormatError(f"{folder}: {min(twin)!r} stands in two shards")
            if missing := listed - header.entries.keys():
                raise FormatError(f"{folder / name} lacks {min(missing)!r}, which {INDEX} places there")
            self._where.update({name: (mapped, header) for name in header.entries if name not in without})

    def __getitem__(self, name: str) -> Bits:
        mapped, header = self._where[name]
        return container.tensor(mapped, header, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def digests(self, table: Iterable[TensorEntry]) -> dict[str, int]:
        """The digest of each tensor of a table, computed from the files."""
        return {entry.name: digest_bits(self[entry.name].data) for entry in table}

    def require_digests(self, digests: Mapping[str, int], *, where: str) -> None:
        """Recompute every tensor's digest and compare. Raises BadDigest naming each tensor that differs."""
        wrong = [name for name, value in digests.items() if digest_bits(self[name].data) != value]
        if wrong:
            raise BadDigest(f"{where}: {len(wrong)} tensors differ from the commit: {some(wrong)}")

    def flush(self) -> None:
        """Make what was written durable. Raises OutOfSpace, BucketError."""
        for mapped in {id(mapped): mapped for mapped, _ in self._where.values()}.values():
            with file_system_errors(str(mapped.filename)):
                mapped.flush()


def shard_names(folder: Path) -> list[str]:
    """The safetensors files that make up a checkpoint. Raises NotFound, FormatError, TooLarge."""
    return list(_shards(folder))


def files(folder: Path) -> list[Path]:
    """The files that make up a checkpoint: shards, their index if there is one, and the assets; nothing that merely
    lies in the same folder. Raises NotFound, FormatError, TooLarge."""
    index = folder / INDEX
    return [*(folder / name for name in shard_names(folder)), *([index] if index.is_file() else []), *assets(folder)]


def is_adapter(table: Sequence[TensorEntry]) -> bool:
    """Whether a tensor table is that of a PEFT adapter, by its names: a run of such a table is an adapter run."""
    return bool(table) and all(entry.name.startswith(ADAPTER_PREFIX) for entry in table)


def assets(folder: Path) -> list[Path]:
    """The files beside the weights: config, tokenizer, chat template. Raises NotFound without the folder."""
    if not folder.is_dir():
        raise NotFound(f"{folder} is not a folder on this host: give one that holds config and tokenizer")
    wanted = (path for path in folder.iterdir() if path.suffix in ASSETS and not path.name.endswith(".index.json"))
    return sorted(path for path in wanted if path.is_file() and not path.name.startswith("."))


def write(
    folder: Path, table: Iterable[TensorEntry], tensors: Mapping[str, Bits] | None, *, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write tensors (None: all-zero bits) as safetensors shards in table order, with an index when there are several;
    the files written. An adapter is always one file, the only one that PEFT and vLLM look for.

    Tensors are copied one at a time, so a lazy mapping costs one tensor of memory. Raises OutOfSpace, BucketError.
    """
    table = tuple(table)
    adapter = is_adapter(table)
    plan = [list(table)] if adapter else _plan_shards(table, shard_bytes)
    single = ADAPTER if adapter else SINGLE
    written = []
    for number, entries in enumerate(plan, 1):
        name = single if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        _write_shard(folder / name, entries, tensors)
        written.append(folder / name)
    if len(plan) > 1:
        weight_map = {entry.name: file.name for file, entries in zip(written, plan, strict=True) for entry in entries}
        size = sum(entry.nbytes for entries in plan for entry in entries)
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2)
        with file_system_errors(str(folder / INDEX)):
            (folder / INDEX).write_text(text)
        written.append(folder / INDEX)
    return written


def write_zeros(folder: Path, table: Iterable[TensorEntry]) -> list[Path]:
    """As `write`, for tensors of all-zero bits, in the memory of a few of their bytes.

    Raises OutOfSpace before anything is written where they do not fit.
    """
    entries = tuple(table)
    require_room(folder, sum(entry.nbytes for entry in entries))
    return write(folder, entries, None)


def copy_assets(source: Path, folder: Path) -> list[Path]:
    """Copy the files beside the weights; the copies. Raises NotFound, OutOfSpace, BucketError."""
    return copy(assets(source), folder)


def copy(paths: Iterable[Path], folder: Path, *, without: Collection[str] = ()) -> list[Path]:
    """Copy files into a folder, writable whatever the originals are; the copies.

    Shards and index are copied without the tensors named by `without`. A shard that holds only those is left out.
    Raises OutOfSpace, BucketError; FormatError for a shard or index that must be cut and cannot be read.
    """
    paths = list(paths)
    with file_system_errors(str(folder)):
        require_room(folder, sum(path.stat().st_size for path in paths))
    return [folder / path.name for path in paths if _copy(path, folder / path.name, without)]


def _copy(path: Path, copied: Path, without: Collection[str]) -> bool:
    """Copy one file, as it is or without some tensors; False for a shard that would hold none."""
    with file_system_errors(str(copied)):
        if without and path.name == INDEX:
            kept = Checkpoint(path.parent, without=without)
            places = _read_index(path).items()
            copied.write_text(_index({name: file for file, names in places for name in names if name in kept}, kept))
            return True
        entries = _open_shard(path, "r")[1].entries if without and path.suffix == ".safetensors" else {}
        if entries.keys().isdisjoint(without):
            shutil.copyfile(path, copied)
            return True
    left = sorted((entry.start, name) for name, entry in entries.items() if name not in without)
    if left:
        table = [TensorEntry(name, entries[name].dtype, entries[name].shape) for _, name in left]
        _write_shard(copied, table, Checkpoint(path.parent))
    return bool(left)


def _index(weight_map: Mapping[str, str], tensors: Mapping[str, Bits]) -> str:
    """The index of shards, as text; file by tensor is given."""
    size = sum(tensors[name].data.nbytes for name in weight_map)
    return json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)


def _shards(folder: Path) -> dict[str, set[str]]:
    """Each shard's file name, and the tensors the index places there; without an index, an empty set."""
    index = folder / INDEX
    if index.is_file():
        return _read_index(index)
    for name in (SINGLE, ADAPTER):
        if (folder / name).is_file():
            return {name: set()}
    raise NotFound(f"{folder} holds no {SINGLE}, {INDEX} or {ADAPTER}: not a safetensors checkpoint")


def _read_index(index: Path) -> dict[str, set[str]]:
    if index.stat().st_size > MAX_INDEX:
        raise TooLarge(f"{index}: {index.stat().st_size:,} bytes; the bound is {MAX_INDEX:,}")
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shards: dict[str, set[str]] = {name: set() for name in sorted(weight_map.values())}
        for tensor, name in weight_map.items():
            shards[name].add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{index}: not a checkpoint index ({error!r})") from None
    inside = (isinstance(name, str) and is_key(name) and "/" not in name for name in shards)
    if not shards or not all(inside) or not all(name.endswith(".safetensors") for name in shards):
        raise FormatError(f"{index}: names no shard, or one outside the folder")
    return shards


def _open_shard(path: Path, mode: Literal["r", "r+"]) -> tuple[np.memmap, container.Header]:
    if not path.is_file():
        raise NotFound(f"{path}: a shard of this checkpoint is missing; download the checkpoint again")
    if path.stat().st_size == 0:
        raise Truncated(f"{path} is empty; download the checkpoint again")
    with file_system_errors(str(path)):
        mapped = np.memmap(path, np.uint8, mode)
    try:
        return mapped, container.read_header(mapped)
    except FormatError as error:
        raise type(error)(f"{path}: {error}") from None


def shard(path: Path) -> dict[str, Bits]:
    """The tensors of one safetensors file, mapped. Raises NotFound, FormatError."""
    mapped, header = _open_shard(path, "r")
    return {name: container.tensor(mapped, header, name) for name in header.entries}


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; nothing else of it is read. Raises FormatError."""
    return _open_shard(path, "r")[1].metadata


def _plan_shards(table: Iterable[TensorEntry], shard_bytes: int) -> list[list[TensorEntry]]:
    plan: list[list[TensorEntry]] = [[]]
    room = shard_bytes
    for entry in table:
        if plan[-1] and entry.nbytes > room:
            plan.append([])
            room = shard_bytes
        plan[-1].append(entry)
        room -= entry.nbytes
    return plan


def _write_shard(path: Path, entries: list[TensorEntry], tensors: Mapping[str, Bits] | None) -> None:
    layout = {entry.name: (entry.dtype, entry.shape) for entry in entries}
    with file_system_errors(str(path)), path.open("wb") as file:
        file.write(container.header_bytes(layout, {"format": "pt"}))
        for entry in entries:
            if tensors is None:
                _write_zeros(file, entry.nbytes)
            else:
                file.write(tensors[entry.name].data.view(np.uint8).data)


def _write_zeros(file: BinaryIO, size: int) -> None:
    """Written and not left out: a hole in a file that is mapped would be a crash on a full disk."""
    piece = bytes(1 << 20)
    for _ in range(size // len(piece)):
        file.write(piece)
    file.write(piece[: size % len(piece)])
