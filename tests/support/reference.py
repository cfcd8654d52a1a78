"""A second reader of delta files, and the digest and root, from docs/FORMAT.md alone, in plain Python without numpy.

It holds the library to the text of the specification, not to itself. Slow, obvious and unguarded: never a model for
reading files one does not trust.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import zstandard
from blake3 import blake3

WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2}
WIDTHS |= {"BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}
MASK = 2**64 - 1


def container(data: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """§2: the JSON header, and the bytes of each tensor."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    tensors = {name: body[slice(*entry["data_offsets"])] for name, entry in header.items() if name != "__metadata__"}
    return header, tensors


def seal(data: bytes) -> str:
    """§3: the BLAKE3 of a delta file with its own 64 digits as zeros."""
    stated = container(data)[0]["__metadata__"]["blake3"].encode()
    return blake3(data.replace(b'"blake3":"' + stated, b'"blake3":"' + b"0" * 64, 1)).hexdigest()


def integers(data: bytes, width: int, *, signed: bool = False) -> list[int]:
    return [int.from_bytes(data[i : i + width], "little", signed=signed) for i in range(0, len(data), width)]


def varints(data: bytes) -> Iterator[int]:
    value = shift = 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            yield value
            value = shift = 0


def unzigzag(value: int, width: int) -> int:
    """§5: back to a step modulo 2^bits."""
    signed = value // 2 if value % 2 == 0 else -(value + 1) // 2
    return signed % (1 << 8 * width)


def gap(streams: Mapping[str, bytes], width: int) -> dict[int, int]:
    """§5.2: position -> step."""
    gaps, steps = (zstandard.decompress(streams[name]) for name in ("gaps", "steps"))
    positions, at, last = [], 0, -1
    while at < len(gaps):
        distance, at = gaps[at], at + 1
        if distance == 255:
            end = at
            while gaps[end] >= 128:
                end += 1
            distance += next(varints(gaps[at : end + 1]))
            at = end + 1
        last += distance + 1
        positions.append(last)
    return dict(zip(positions, (unzigzag(value, width) for value in varints(steps)), strict=True))


def dense(streams: Mapping[str, bytes], width: int) -> dict[int, int]:
    """§5.3: position -> step, zero steps left out."""
    planes = zstandard.decompress(streams["dense"])
    total = len(planes) // width
    folded = [sum(planes[plane * total + i] << 8 * plane for plane in range(width)) for i in range(total)]
    return {i: unzigzag(value, width) for i, value in enumerate(folded) if value}


def delta(data: bytes, base: Mapping[str, list[int]] | None = None) -> dict[str, tuple[str, list[int], dict[int, int]]]:
    """§3 and §5: name -> (dtype, shape, position -> step). `base` is name -> the old elements, for codec raw."""
    header, tensors = container(data)
    found = {}
    for name, dtype, shape, changed, encoding in json.loads(header["__metadata__"]["tensors"]):
        width = WIDTHS[dtype]
        streams = {full.removeprefix(name + "."): part for full, part in tensors.items() if full.startswith(name + ".")}
        if encoding == "raw":
            assert base is not None
            index_width = {"I32": 4, "I64": 8}[header[f"{name}.indices"]["dtype"]]
            positions = integers(streams["indices"], index_width, signed=True)
            values = integers(streams["values"], width)
            steps = {i: (b - base[name][i]) % (1 << 8 * width) for i, b in zip(positions, values, strict=True)}
        else:
            steps = {"gap": gap, "dense": dense}[encoding](streams, width)
        assert len(steps) == changed
        found[name] = (dtype, shape, steps)
    return found


def fmix64(h: int) -> int:
    h = (h ^ (h >> 33)) * 0xFF51AFD7ED558CCD & MASK
    h = (h ^ (h >> 33)) * 0xC4CEB9FE1A85EC53 & MASK
    return h ^ (h >> 33)


def mix(i: int, bits: int) -> int:
    return fmix64(fmix64((i + 0x9E3779B97F4A7C15) & MASK) ^ bits)


def digest(elements: Iterable[int]) -> int:
    """§4: the digest of a tensor's elements as unsigned integers."""
    return sum(mix(i, bits) for i, bits in enumerate(elements)) & MASK


def root(rows: Iterable[tuple[str, str, list[int], int]]) -> str:
    """§4: the root over (name, dtype, shape, digest) rows."""
    text = b"".join(
        name.encode() + b"\0" + dtype.encode() + b"\0" + ",".join(map(str, shape)).encode() + b"\0"
        + format(value, "016x").encode() + b"\n"
        for name, dtype, shape, value in rows
    )  # fmt: skip
    return blake3(text).hexdigest()
