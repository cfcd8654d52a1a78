"""What a delta file of format version 1 holds: streams of their own for every tensor. FORMAT.md §3"""

from collections.abc import Mapping

import numpy as np

from deltawire.errors import FormatError
from deltawire.format import container
from deltawire.format.codecs import dense, gap, raw
from deltawire.weights.bits import WIDTHS, Bits
from deltawire.weights.delta import TensorDelta
from deltawire.weights.kept import Kept
from deltawire.weights.table import TensorSpec

DENSE_TRY_FROM = 0.15
"""Share of changed elements from which the dense form is tried as well; below it gap is always smaller."""
DENSE_TRY_TINY = 64
"""elements; so small a tensor is tried dense at any density"""
SUFFIXES: dict[str, dict[str, tuple[str, ...]]] = {
    "gap": {"gap": gap.SUFFIXES, "dense": dense.SUFFIXES},
    "raw": {"raw": raw.SUFFIXES},
}
"""Codec of the file -> encodings its tensors may have -> the streams of each."""
MAX_COUNT = 1 << 48
"""elements of one tensor"""


def encode(name: str, tensor: TensorDelta, old: Bits | None) -> tuple[str, dict[str, Bits]]:
    """One tensor's encoding and streams: raw where its old bits are given, else gap or dense, whichever is smaller."""
    if old is not None:
        parts = raw.encode(tensor, old)
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


def decode(
    spec: TensorSpec, encoding: str, parts: Mapping[str, Bits], old: Bits | None, kept: Kept | None = None
) -> TensorDelta:
    """The inverse of `encode`, of what is `kept` of the tensor alone where that is given. Raises FormatError."""
    arrays = {suffix: bits.data for suffix, bits in parts.items()}
    if encoding == "dense":
        return dense.decode(arrays, spec, kept)
    if encoding == "gap":
        change = gap.decode(arrays, spec)
    else:
        assert old is not None
        arrays["indices"] = arrays["indices"].view(f"<i{WIDTHS[parts['indices'].dtype]}")
        change = raw.decode(arrays, spec, old)
    return change if kept is None else kept.cut(change)


def check(specs: tuple[TensorSpec, ...], encodings: tuple[str, ...], codec: str, box: container.Header) -> None:
    """Raise FormatError unless a file of `codec` may list these tensors, and holds their streams and nothing else."""
    expected: list[str] = []
    for spec, encoding in zip(specs, encodings, strict=True):
        _check_spec(spec)
        if encoding not in SUFFIXES[codec]:
            raise FormatError(f"{spec.name}: encoding {encoding!r} in a file of codec {codec!r}")
        expected += _check_streams(spec, encoding, codec, box)
    if [spec.name for spec in specs] != sorted({spec.name for spec in specs}) or expected != list(box.entries):
        raise FormatError("the streams in the file are not those its metadata lists")


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
    for suffix in SUFFIXES[codec][encoding]:
        name = f"{spec.name}.{suffix}"
        entry = box.entries.get(name)
        if entry is None:
            raise FormatError(f"stream {name} is listed but not in the file")
        dtypes = {"indices": ("I32", "I64"), "values": (spec.dtype,)}.get(suffix, ("U8",))
        if entry.dtype not in dtypes or len(entry.shape) != 1 or (codec == "raw" and entry.shape != (spec.changed,)):
            raise FormatError(f"stream {name} is {entry.dtype} of shape {list(entry.shape)}: not what belongs there")
        names.append(name)
    return names


def read_import(box: container.Header) -> tuple[TensorSpec, ...]:
    """The tensors of a file in the layout of TRL's post: pairs NAME.indices, NAME.values and nothing else. Raises
    FormatError."""
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
    return specs
