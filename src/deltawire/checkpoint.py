"""Hugging Face checkpoints in and out: safetensors shards, their index, and the small files beside them."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from deltawire import container
from deltawire.bits import WIDTHS, Bits, count
from deltawire.errors import FormatError, NotFound, TooLarge
from deltawire.manifests import TensorEntry

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000
"""bytes of tensors per shard file: what transformers writes by default is of this order"""
MAX_INDEX = 64 << 20


class Checkpoint(Mapping[str, Bits]):
    """The tensors of a checkpoint folder, name -> Bits, memory-mapped: nothing is read before it is touched.

    With `writable=True` writing to a tensor's bits writes the file. Raises NotFound when the folder holds no
    safetensors, FormatError for a shard that is none or an index that disagrees with its shards.
    """

    def __init__(self, folder: Path, *, writable: bool = False) -> None:
        self.folder = folder
        self._where: dict[str, tuple[np.memmap, container.Header]] = {}
        for name in shard_names(folder):
            mapped = np.memmap(folder / name, np.uint8, "r+" if writable else "r")
            header = container.read_header(mapped)
            if twin := self._where.keys() & header.entries.keys():
                raise FormatError(f"{folder}: {min(twin)!r} stands in two shards")
            self._where.update(dict.fromkeys(header.entries, (mapped, header)))

    def __getitem__(self, name: str) -> Bits:
        mapped, header = self._where[name]
        return container.tensor(mapped, header, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def flush(self) -> None:
        """Make what was written durable."""
        for mapped in {id(mapped): mapped for mapped, _ in self._where.values()}.values():
            mapped.flush()


def shard_names(folder: Path) -> list[str]:
    """The safetensors files that make up a checkpoint. Raises NotFound, FormatError, TooLarge."""
    index = folder / INDEX
    if index.is_file():
        if index.stat().st_size > MAX_INDEX:
            raise TooLarge(f"{index}: {index.stat().st_size:,} bytes; the bound is {MAX_INDEX:,}")
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{index}: not a checkpoint index ({error!r})") from None
        if not all(isinstance(name, str) and "/" not in name and name.endswith(".safetensors") for name in names):
            raise FormatError(f"{index}: names a shard outside the folder")
        return names
    if (folder / SINGLE).is_file():
        return [SINGLE]
    raise NotFound(f"{folder} holds no {SINGLE} and no {INDEX}: not a safetensors checkpoint")


def assets(folder: Path) -> list[Path]:
    """The files beside the weights (config, tokenizer, chat template): every small regular file that is no weights."""
    weights = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix not in weights and path.name != INDEX and not path.name.startswith(".")
    )


def write(
    folder: Path, table: Iterable[TensorEntry], tensors: Mapping[str, Bits], *, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write tensors as safetensors shards in table order, with an index when there are several; the files written.

    Tensors are copied one at a time, so a lazy mapping costs one tensor of memory.
    """
    plan = _plan_shards(table, shard_bytes)
    files = []
    for number, entries in enumerate(plan, 1):
        name = SINGLE if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        _write_shard(folder / name, entries, tensors)
        files.append(folder / name)
    if len(plan) > 1:
        weight_map = {entry.name: file.name for file, entries in zip(files, plan, strict=True) for entry in entries}
        size = sum(_nbytes(entry) for entries in plan for entry in entries)
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2)
        (folder / INDEX).write_text(text)
        files.append(folder / INDEX)
    return files


def copy_assets(source: Path, folder: Path) -> list[Path]:
    """Copy the files beside the weights; the copies."""
    return [Path(shutil.copy(path, folder / path.name)) for path in assets(source)]


def _nbytes(entry: TensorEntry) -> int:
    return count(entry.shape) * WIDTHS[entry.dtype]


def _plan_shards(table: Iterable[TensorEntry], shard_bytes: int) -> list[list[TensorEntry]]:
    plan: list[list[TensorEntry]] = [[]]
    room = shard_bytes
    for entry in table:
        if plan[-1] and _nbytes(entry) > room:
            plan.append([])
            room = shard_bytes
        plan[-1].append(entry)
        room -= _nbytes(entry)
    return plan


def _write_shard(path: Path, entries: list[TensorEntry], tensors: Mapping[str, Bits]) -> None:
    layout = {entry.name: (entry.dtype, entry.shape) for entry in entries}
    with path.open("wb") as file:
        file.write(container.header_bytes(layout, {"format": "pt"}))
        for entry in entries:
            file.write(tensors[entry.name].data.view(np.uint8).data)
