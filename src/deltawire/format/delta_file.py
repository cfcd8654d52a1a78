"""A delta as one safetensors file and back, trusting nothing it reads. docs/FORMAT.md is the specification."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from blake3 import blake3

from deltawire.errors import (
    BadDigest,
    DtypeMismatch,
    FormatError,
    NeedsBase,
    ShapeMismatch,
    UnknownTensor,
    UnknownVersion,
)
from deltawire.format import container
from deltawire.format.codecs import dense, gap, raw
from deltawire.weights.bits import WIDTHS, Bits
from deltawire.weights.delta import Delta, TensorDelta
from deltawire.weights.table import TensorSpec
from deltawire.weights.tensors import as_bits

FORMAT = "deltawire-delta"
VERSION = 1
CODECS = ("gap", "raw")
DENSE_TRY_FROM = 0.15
"""Share of changed elements from which the dense form is tried as well; below it gap is always smaller."""
DENSE_TRY_TINY = 64
"""elements; so small a tensor is tried dense at any density"""
MAX_DELTA_HEADER = 64 << 20
"""bytes"""
ENCODINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "gap": {"gap": gap.SUFFIXES, "dense": dense.SUFFIXES},
    "raw": {"raw": raw.SUFFIXES},
}
"""Codec of the file -> encodings its tensors may have -> the streams of each."""
FIELDS = ("format", "version", "codec", "blake3", "range", "tensors")
"""The metadata of a delta file."""
MAX_COUNT = 1 << 48
"""elements of one tensor"""
_HASH_FIELD = '"blake3":"'
_ZEROS = "0" * 64


@dataclass(frozen=True, slots=True)
class DeltaHeader:
    """What a delta file says of itself.

    `sealed` tells whether the file carried a BLAKE3 of itself, and it was right: true of every file we wrote, false of
    an imported one in the layout of TRL's post, for which run, parent and version are None and shapes are unknown.
    """

    codec: str
    run: str | None
    parent: int | None
    version: int | None
    tensors: tuple[TensorSpec, ...]
    encodings: tuple[str, ...]
    sealed: bool


def encode(
    delta: Delta,
    *,
    codec: str = "gap",
    base: Mapping[str, Any] | None = None,
    run: str | None = None,
    parent: int | None = None,
    version: int | None = None,
) -> bytes:
    """The bytes of a delta file. Equal input gives equal bytes.

    `base` (name -> old tensor) is needed by codec "raw" alone. Raises UnknownVersion for another codec, NeedsBase, and
    for a base that is not the delta's UnknownTensor, DtypeMismatch or ShapeMismatch.
    """
    if codec not in CODECS:
        raise UnknownVersion(f"codec {codec!r} is not known; choose from {', '.join(CODECS)}")
    if codec == "raw":
        if base is None:
            raise NeedsBase('codec "raw" ships absolute values: pass base=, the weights before the delta')
        delta.check(base)
    streams: dict[str, Bits] = {}
    facts = []
    for name in sorted(delta):
        encoding, parts = _encode_tensor(name, delta[name], codec, base)
        streams.update(parts)
        tensor = delta[name]
        facts.append([name, tensor.dtype, list(tensor.shape), tensor.changed, encoding])
    metadata = {"format": FORMAT, "version": str(VERSION), "codec": codec, "blake3": _ZEROS}
    metadata["range"] = json.dumps([run, parent, version], separators=(",", ":"))
    metadata["tensors"] = json.dumps(facts, separators=(",", ":"), ensure_ascii=False)
    return _seal(container.write(streams, metadata))


def read_header(data: bytes) -> DeltaHeader:
    """Check a delta file's container and seal and say what is in it, without decoding any tensor.

    Raises FormatError and its kinds: Truncated, TooLarge, BadDigest, UnknownVersion.
    """
    return _parse(data)[0]


def is_delta(metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors file with this metadata is a delta file of ours."""
    return metadata.get("format") == FORMAT


def decode(data: bytes, *, base: Mapping[str, Any] | None = None) -> Delta:
    """The delta in a file's bytes; whole and checked, or an error.

    `base` (name -> old tensor) is needed for codec "raw". Raises FormatError and its kinds, NeedsBase; with a base
    also UnknownTensor, DtypeMismatch and ShapeMismatch.
    """
    header, box = _parse(data)
    if header.codec == "raw" and base is None:
        raise NeedsBase('this file ships absolute values (codec "raw"): pass base=, the weights before it')
    changes = {}
    for spec, encoding in zip(header.tensors, header.encodings, strict=True):
        suffixes = ENCODINGS[header.codec][encoding]
        parts = {suffix: container.tensor(data, box, f"{spec.name}.{suffix}") for suffix in suffixes}
        changes[spec.name] = _decode_tensor(spec, encoding, parts, base, sealed=header.sealed)
    return Delta(changes)


def _encode_tensor(
    name: str, tensor: TensorDelta, codec: str, base: Mapping[str, Any] | None
) -> tuple[str, dict[str, Bits]]:
    if codec == "raw":
        assert base is not None
        parts = raw.encode(tensor, as_bits(base[name]))
        index = "I32" if parts["indices"].dtype == np.int32 else "I64"
        indices = parts["indices"].view(f"<u{parts['indices'].itemsize}")
        return "raw", {
            f"{name}.indices": Bits(index, indices.shape, indices),
            f"{name}.values": Bits(tensor.dtype, parts["values"].shape, parts["values"]),
        }
    encoding, parts = "gap", gap.encode(tensor)
    if tensor.changed >= DENSE_TRY_FROM * tensor.total or tensor.total <= DENSE_TRY_TINY:
        other = dense.encode(tensor)
        if sum(part.size for part in other.values()) < sum(part.size for part in parts.values()):
            encoding, parts = "dense", other
    return encoding, {f"{name}.{suffix}": Bits("U8", part.shape, part) for suffix, part in parts.items()}


def _decode_tensor(
    spec: TensorSpec, encoding: str, parts: Mapping[str, Bits], base: Mapping[str, Any] | None, *, sealed: bool
) -> TensorDelta:
    arrays = {suffix: bits.data for suffix, bits in parts.items()}
    if encoding == "gap":
        return gap.decode(arrays, spec)
    if encoding == "dense":
        return dense.decode(arrays, spec)
    assert base is not None
    if spec.name not in base:
        raise UnknownTensor(f"the file changes {spec.name!r}, which base does not have")
    old = as_bits(base[spec.name])
    if spec.dtype != old.dtype:
        raise DtypeMismatch(f"{spec.name}: {spec.dtype} in the file, {old.dtype} in base")
    if sealed and spec.shape != old.shape:
        raise ShapeMismatch(f"{spec.name}: shape {list(spec.shape)} in the file, {list(old.shape)} in base")
    arrays["indices"] = arrays["indices"].view(f"<i{WIDTHS[parts['indices'].dtype]}")
    return raw.decode(arrays, spec, old)


def _seal(file: bytearray) -> bytes:
    """Write the file's own BLAKE3 (taken with that field all zeros) into its header."""
    at = file.index(f"{_HASH_FIELD}{_ZEROS}".encode()) + len(_HASH_FIELD)
    file[at : at + 64] = blake3(file).hexdigest().encode()
    return bytes(file)


def _check_seal(data: bytes, stated: str) -> None:
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    at = header.find(f"{_HASH_FIELD}{stated}".encode()) if re.fullmatch("[0-9a-f]{64}", stated) else -1
    if at < 0:
        raise FormatError("the blake3 field is not 64 hex digits where it belongs")
    at += len(_HASH_FIELD)
    view = memoryview(data)
    actual = blake3(view[:at]).update(_ZEROS.encode()).update(view[at + 64 :]).hexdigest()
    if actual != stated:
        raise BadDigest(f"the file hashes to {actual[:12]}… where its header says {stated[:12]}…: damaged or altered")


def _parse(data: bytes) -> tuple[DeltaHeader, container.Header]:
    box = container.read_header(data, limit=MAX_DELTA_HEADER)
    if not is_delta(box.metadata):
        if damaged := box.metadata.keys() & set(FIELDS) - {"format", "version"}:
            raise FormatError(f"a delta file's field {min(damaged)!r}, but its format is not {FORMAT!r}")
        return _parse_import(box), box
    if box.metadata.get("version") != str(VERSION) or box.metadata.get("codec") not in CODECS:
        raise UnknownVersion(
            f"format version {box.metadata.get('version')!r}, codec {box.metadata.get('codec')!r}: "
            f"this deltawire reads version {VERSION}, codecs {', '.join(CODECS)}"
        )
    _check_seal(data, box.metadata.get("blake3", ""))
    try:
        run, parent, version = json.loads(box.metadata["range"])
        facts = json.loads(box.metadata["tensors"])
        specs = tuple(TensorSpec(name, dtype, tuple(shape), changed) for name, dtype, shape, changed, _ in facts)
        encodings = tuple(str(fact[4]) for fact in facts)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"the metadata is not a delta's: {error!r}") from None
    _check_range(run, parent, version)
    codec = box.metadata["codec"]
    expected: list[str] = []
    for spec, encoding in zip(specs, encodings, strict=True):
        _check_spec(spec)
        if encoding not in ENCODINGS[codec]:
            raise FormatError(f"{spec.name}: encoding {encoding!r} in a file of codec {codec!r}")
        expected += _check_streams(spec, encoding, codec, box)
    if [spec.name for spec in specs] != sorted({spec.name for spec in specs}) or expected != list(box.entries):
        raise FormatError("the streams in the file are not those its metadata lists")
    return DeltaHeader(codec, run, parent, version, specs, encodings, sealed=True), box


def _check_range(run: Any, parent: Any, version: Any) -> None:
    numbers_ok = all(number is None or (type(number) is int and number >= 0) for number in (parent, version))
    if not (run is None or isinstance(run, str)) or not numbers_ok:
        raise FormatError("range is not [run, parent, version]")


def _check_spec(spec: TensorSpec) -> None:
    sound = isinstance(spec.name, str) and isinstance(spec.dtype, str) and spec.dtype in WIDTHS
    sizes, rank = (*spec.shape, spec.changed), len(spec.shape)
    bounded = rank <= container.MAX_RANK and all(type(size) is int and 0 <= size < MAX_COUNT for size in sizes)
    if not (sound and bounded):
        raise FormatError(f"{spec.name!r}: not the facts of a changed tensor")
    if not 0 < spec.changed <= spec.total < MAX_COUNT:
        raise FormatError(f"{spec.name}: {spec.changed} changes in {spec.total} elements")


def _check_streams(spec: TensorSpec, encoding: str, codec: str, box: container.Header) -> list[str]:
    """The names of a tensor's streams. Raises FormatError where one is missing, or of another dtype or shape."""
    names = []
    for suffix in ENCODINGS[codec][encoding]:
        name = f"{spec.name}.{suffix}"
        entry = box.entries.get(name)
        if entry is None:
            raise FormatError(f"stream {name} is listed but not in the file")
        dtypes = {"indices": ("I32", "I64"), "values": (spec.dtype,)}.get(suffix, ("U8",))
        if entry.dtype not in dtypes or len(entry.shape) != 1 or (codec == "raw" and entry.shape != (spec.changed,)):
            raise FormatError(f"stream {name} is {entry.dtype} of shape {list(entry.shape)}: not what belongs there")
        names.append(name)
    return names


def _parse_import(box: container.Header) -> DeltaHeader:
    """A file in the layout of TRL's post: pairs NAME.indices, NAME.values and nothing else."""
    names = sorted(name.removesuffix(".indices") for name in box.entries if name.endswith(".indices"))
    expected = {f"{name}.{suffix}" for name in names for suffix in raw.SUFFIXES}
    if not names or expected != box.entries.keys():
        raise FormatError("neither a deltawire delta nor pairs of NAME.indices and NAME.values")
    entries = [(name, box.entries[f"{name}.values"]) for name in names]
    specs = tuple(
        TensorSpec(name, entry.dtype, entry.shape, entry.shape[0] if entry.shape else 0) for name, entry in entries
    )
    for spec in specs:
        _check_streams(spec, "raw", "raw", box)
    return DeltaHeader("raw", None, None, None, specs, ("raw",) * len(specs), sealed=False)
