"""A second reader of delta files, and the digest and root, from docs/FORMAT.md alone, in plain Python without numpy.

It holds the library to the text of the specification, not to itself. Slow, obvious and unguarded: never a model for
reading files one does not trust.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    """§3 and §5: name -> (dtype, shape, position -> step). `base` is name -> the old elements, for raw and class."""
    header, tensors = container(data)
    if header["__metadata__"]["version"] == "2":
        return second_version(zstandard.decompress(tensors["directory"]), tensors["payload"], base or {})
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


DTYPES = [
    "BOOL",
    "U8",
    "I8",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "U16",
    "I16",
    "F16",
    "BF16",
    "U32",
    "I32",
    "F32",
    "U64",
    "I64",
    "F64",
]
SCHEMES = {"F8_E5M2": (2, 31, 0), "F16": (10, 31, 0), "BF16": (7, 255, 108), "F32": (23, 255, 108)}
SCHEMES |= {"F64": (52, 2047, 1004), "F8_E4M3": (3, 15, 0)}


def second_version(content: bytes, payload: bytes, base: Mapping[str, list[int]]) -> dict[str, Any]:
    """§5.5: what the directory lists, each tensor decoded from its part of the payload."""
    numbers = Numbers(content)
    names = [numbers.text() for _ in range(numbers.varint())]
    facts = []
    for _ in names:
        dtype, encoding = DTYPES[numbers.byte()], ["dense", "subset", "class"][numbers.byte()]
        shape = [numbers.varint() for _ in range(numbers.varint())]
        facts.append((dtype, shape, encoding, (0, 0) if encoding == "dense" else (numbers.varint(), numbers.varint())))
    found, at = {}, 0
    for name, (dtype, shape, encoding, tile) in zip(names, facts, strict=True):
        width, steps = WIDTHS[dtype], {}
        if encoding == "dense":
            size, changed = numbers.varint(), numbers.varint()
            steps = dense({"dense": payload[at : at + size]}, width)
            assert len(steps) == changed
            at += size
        else:
            for elements in grid(shape, tile):
                size = numbers.varint()
                if size:
                    classes = class_of(base[name], dtype) if encoding == "class" else (lambda element: 0)
                    steps |= subset(numbers, payload[at : at + size], elements, classes, 8 * width)
                at += size
        found[name] = (dtype, shape, steps)
    assert (numbers.at, at) == (len(content), len(payload))
    return found


class Numbers:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        start = self.at
        while self.byte() >= 128:
            pass
        return next(varints(self.data[start : self.at]))

    def text(self) -> str:
        size = self.varint()
        self.at += size
        return self.data[self.at - size : self.at].decode()


def grid(shape: list[int], tile: tuple[int, int]) -> Iterator[list[list[int]]]:
    """§5.6: the tiles of a tensor, each as rows of its elements' numbers in the tensor."""
    columns = (shape[-1] if len(shape) > 1 else math.prod(shape)) or 1
    rows = math.prod(shape) // columns
    for top in range(0, rows, tile[0]):
        for left in range(0, columns, tile[1]):
            across = range(left, min(left + tile[1], columns))
            yield [[row * columns + column for column in across] for row in range(top, min(top + tile[0], rows))]


def class_of(old: list[int], dtype: str) -> Callable[[int], int]:
    """§5.7: an element's class by its old bits."""
    s, e, e0 = SCHEMES[dtype]
    return lambda element: min(max((old[element] >> s & e) - e0, 0), 15)


def rice(n: int, w: int) -> int:
    k = 0
    while w and 133 * w * 2**k < 64 * (n - w) + 32 * w:
        k += 1
    return k


class Bits:
    """A tile's bits, read by two cursors."""

    def __init__(self, data: bytes) -> None:
        self.bits = [byte >> bit & 1 for byte in data for bit in range(8)]
        self.low = self.unary = 0

    def field(self, size: int) -> int:
        self.low += size
        return sum(bit << i for i, bit in enumerate(self.bits[self.low - size : self.low]))

    def ones(self) -> int:
        start = self.unary
        while not self.bits[self.unary]:
            self.unary += 1
        self.unary += 1
        return self.unary - 1 - start

    def listed(self, w: int, k: int) -> list[int]:
        members, last = [], -1
        for _ in range(w):
            last += 1 + (self.ones() << k | self.field(k))
            members.append(last)
        return members

    def chosen(self, n: int, m: int) -> list[int]:
        """list(n, m) with K and the rule."""
        w = min(m, n - m)
        members = self.listed(w, rice(n, w))
        return members if 2 * m <= n else [x for x in range(n) if x not in members]


def subset(
    numbers: Numbers, payload: bytes, elements: list[list[int]], class_of: Callable[[int], int], width: int
) -> dict[int, int]:
    """§5.5 and §5.6: position -> step of one tile, behind the size in its entry."""
    dead = numbers.varint()
    present = numbers.byte() | numbers.byte() << 8
    lists = {}
    for c in (c for c in range(16) if present >> c & 1):
        head = numbers.byte()
        m = numbers.varint()
        w, ladder = numbers.varint() if head >= 128 else m, [m]
        while len(ladder) < width and (f := numbers.varint()):
            ladder.append(f)
        lists[c] = (head & 127, head >= 128, m, w, [*ladder, *[0] * (width - len(ladder))])
    bits = Bits(payload)
    if dead:
        rows, live = len(elements), len(elements) - dead
        w = min(dead, live)
        bits.unary = w * rice(rows, w)
        elements = [elements[row] for row in bits.chosen(rows, live)]
        bits.low = bits.unary
    low = sum(w * k for k, _, _, w, _ in lists.values())
    for *_, f in lists.values():
        pairs = list(itertools.pairwise(f))
        low += sum(min(m, n - m) * rice(n, min(m, n - m)) for n, m in pairs)
    raw, changes = bits.low + low, sum(m for _, _, m, _, _ in lists.values())
    sign = raw + sum(sum(f[2:]) for *_, f in lists.values())
    bits.unary = sign + changes
    ranks = {}
    for c, (k, others, m, w, _) in lists.items():
        members = bits.listed(w, k)
        ranks[c] = [x for x in range(m + w) if x not in members] if others else members
    lengths = {(c, i): 0 for c, (_, _, m, _, _) in lists.items() for i in range(m)}
    for level in range(1, width):
        for c, (*_, f) in lists.items():
            standing = [change for change in lengths if change[0] == c and lengths[change] >= level - 1]
            for i in bits.chosen(f[level - 1], f[level]):
                lengths[standing[i]] = level
    assert bits.low == raw
    assert (bits.unary + 7) // 8 == len(payload)
    values = [1 << length - 1 | bits.field(length - 1) if length else 0 for length in lengths.values()]
    signs = [bits.field(1) for _ in lengths]
    flat = [element for row in elements for element in row]
    found = {}
    for c, own in ranks.items():
        of_class = [element for element in flat if class_of(element) == c]
        for rank in own:
            size = values.pop(0) + 1
            found[of_class[rank]] = (-size if signs.pop(0) else size) % (1 << width)
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
