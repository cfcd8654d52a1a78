"""A delta as one safetensors file and back, trusting nothing it reads. docs/FORMAT.md is the specification."""

import itertools
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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
from deltawire.format import body, container, streams
from deltawire.format.codecs.directory import Listed
from deltawire.format.codecs.subset import Coded
from deltawire.weights.bits import Bits
from deltawire.weights.delta import Delta, TensorDelta
from deltawire.weights.kept import Kept
from deltawire.weights.table import TensorSpec
from deltawire.weights.tensors import as_bits

FORMAT = "deltawire-delta"
VERSIONS = {"1": ("gap", "raw"), "2": ("subset", "class")}
"""format version of the file -> codecs it may have"""
CODECS = tuple(codec for codecs in VERSIONS.values() for codec in codecs)
MAX_DELTA_HEADER = 64 << 20
"""bytes"""
ENCODINGS = {
    **{codec: tuple(encodings) for codec, encodings in streams.SUFFIXES.items()},
    "subset": ("subset", "dense"),
    "class": ("class", "subset", "dense"),
}
"""Codec of the file -> encodings its tensors may have."""
NEED_BASE = ("raw", "class")
"""codecs that are written and read against the old weights"""
FIELDS = ("format", "version", "codec", "blake3", "range", "tensors")
"""The metadata of a delta file; of format version 2 without `tensors`."""
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
    codec: str = "subset",
    base: Mapping[str, Any] | None = None,
    coded: Mapping[str, Coded] | None = None,
    stored: Collection[str] = (),
    run: str | None = None,
    parent: int | None = None,
    version: int | None = None,
) -> bytes:
    """The bytes of a delta file. Equal input gives equal bytes.

    `base` (name -> old tensor) is needed by codecs "raw" and "class" alone. `coded` (name -> what `fused.compare` made
    of the tensor's change) is for codecs "subset" and "class". With it "class" needs no base: a tensor that it does not
    have is then written as in "subset". Tensors `stored` are written an increment an element, uncompressed.

    Raises UnknownVersion for another codec, NeedsBase, for a base that is not the delta's UnknownTensor, DtypeMismatch
    or ShapeMismatch, and FormatError for `coded` that is not of this change, or not for this codec. TooLarge for tiles
    that are too many for one file.
    """
    if codec not in CODECS:
        raise UnknownVersion(f"codec {codec!r} is not known; choose from {', '.join(CODECS)}")
    olds: dict[str, Bits] = {}
    if coded is not None:
        _check_coded(delta, codec, coded)
    if base is None and (codec == "raw" or (codec == "class" and coded is None)):
        raise NeedsBase(f'codec "{codec}" is written against the weights before the delta: pass them as base=')
    if codec in NEED_BASE and base is not None:
        delta.check(base)
        olds = {name: as_bits(base[name]) for name in delta}
    number = next(number for number, codecs in VERSIONS.items() if codec in codecs)
    metadata = {"format": FORMAT, "version": number, "codec": codec, "blake3": _ZEROS}
    metadata["range"] = json.dumps([run, parent, version], separators=(",", ":"))
    if number == "2":
        data = {name: old.data for name, old in olds.items()}
        return _seal(container.write(body.encode(delta, data, coded or {}, stored), metadata))
    parts: dict[str, Bits] = {}
    facts = []
    for name in sorted(delta):
        tensor = delta[name]
        encoding, own = streams.encode(name, tensor, olds.get(name))
        parts.update(own)
        facts.append([name, tensor.dtype, list(tensor.shape), tensor.changed, encoding])
    metadata["tensors"] = json.dumps(facts, separators=(",", ":"), ensure_ascii=False)
    return _seal(container.write(parts, metadata))


def _check_coded(delta: Delta, codec: str, coded: Mapping[str, Coded]) -> None:
    """Raise FormatError for tensors coded for another codec, or of another change than the delta's."""
    for name in coded.keys() & delta.keys():
        if codec not in VERSIONS["2"] or (coded[name].by_class and codec != "class"):
            raise FormatError(f"{name}: coded for another codec than {codec!r}")
        if coded[name].changed != delta[name].changed:
            raise FormatError(f"{name}: {coded[name].changed} changes are coded, and the delta has others")


def read_header(data: bytes) -> DeltaHeader:
    """Check a delta file's container and seal and say what is in it, without decoding any tensor.

    Raises FormatError and its kinds: Truncated, TooLarge, BadDigest, UnknownVersion.
    """
    return open_file(data).header


def is_delta(metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors file with this metadata is a delta file of ours."""
    return metadata.get("format") == FORMAT


def decode(data: bytes, *, base: Mapping[str, Any] | None = None) -> Delta:
    """The delta in a file's bytes; whole and checked, or an error.

    `base` (name -> old tensor) is needed for codecs "raw" and "class". Raises FormatError and its kinds, NeedsBase;
    with a base also UnknownTensor, DtypeMismatch, ShapeMismatch, and WrongBase where its bits cannot be the old ones.
    """
    file = open_file(data)
    if file.header.codec in NEED_BASE and base is None:
        raise NeedsBase(
            f'this file is of codec "{file.header.codec}", which is read against the weights before it: pass them as '
            "base="
        )
    return file.decode(base or {})


@dataclass(frozen=True, eq=False)
class DeltaFile:
    """A delta file whose container and seal were checked. Its tensors are decoded all at once, or one by one."""

    header: DeltaHeader
    _data: bytes | memoryview
    _box: container.Header
    _listed: list[Listed] | None = None
    """what its directory lists, if it is of a format version that has one"""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that it changes."""
        return tuple(spec.name for spec in self.header.tensors)

    def __contains__(self, name: str) -> bool:
        """Whether it changes a tensor."""
        return name in self._places

    @cached_property
    def needs(self) -> frozenset[str]:
        """Those of them that are read against their old bits."""
        both = zip(self.header.tensors, self.header.encodings, strict=True)
        return frozenset(spec.name for spec, encoding in both if encoding in NEED_BASE)

    def decode(self, base: Mapping[str, Any]) -> Delta:
        """The whole change, with the old tensors by name; see `delta_file.decode`."""
        header = self.header
        olds = {spec.name: _old(spec, base, header.sealed) for spec in header.tensors if spec.name in self.needs}
        if self._listed is not None:
            return Delta(body.decode(container.tensor(self._data, self._box, "payload").data, self._listed, olds))
        return Delta({name: self._streams(name, olds.get(name)) for name in self.names})

    def tensor(self, name: str, old: Bits | None = None, kept: Kept | None = None) -> TensorDelta:
        """The change of one tensor, or of what is `kept` of it; `old` are its bits before it, of a tensor that `needs`
        them, or those of them that are at hand (`PartBits`), which the change then is of. Raises what `decode` does."""
        number, start = self._places[name]
        if old is not None:
            old = _old(self.header.tensors[number], {name: old}, self.header.sealed)
        if self._listed is None:
            return self._streams(name, old, kept)
        listed = self._listed[number]
        part = container.tensor(self._data, self._box, "payload").data[start : start + listed.nbytes]
        return body.decode(part, [listed], {} if old is None else {name: old}, kept)[name]

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """The number of each tensor, and where it begins in the payload, if there is one."""
        sizes = [0 for _ in self.names] if self._listed is None else [tensor.nbytes for tensor in self._listed]
        starts = itertools.accumulate(sizes, initial=0)
        return {name: (number, start) for number, (name, start) in enumerate(zip(self.names, starts, strict=False))}

    def _streams(self, name: str, old: Bits | None, kept: Kept | None = None) -> TensorDelta:
        number, _ = self._places[name]
        spec, encoding = self.header.tensors[number], self.header.encodings[number]
        suffixes = streams.SUFFIXES[self.header.codec][encoding]
        parts = {suffix: container.tensor(self._data, self._box, f"{spec.name}.{suffix}") for suffix in suffixes}
        return streams.decode(spec, encoding, parts, old, kept)


def _old(spec: TensorSpec, base: Mapping[str, Any], sealed: bool) -> Bits:
    """A tensor before the delta. Raises UnknownTensor, DtypeMismatch, ShapeMismatch where base has another one."""
    if spec.name not in base:
        raise UnknownTensor(f"the file changes {spec.name!r}, which base does not have")
    old = as_bits(base[spec.name])
    if spec.dtype != old.dtype:
        raise DtypeMismatch(f"{spec.name}: {spec.dtype} in the file, {old.dtype} in base")
    if sealed and spec.shape != old.shape:
        raise ShapeMismatch(f"{spec.name}: shape {list(spec.shape)} in the file, {list(old.shape)} in base")
    return old


def _seal(file: bytearray) -> bytes:
    """Write the file's own BLAKE3 (taken with that field all zeros) into its header."""
    at = file.index(f"{_HASH_FIELD}{_ZEROS}".encode()) + len(_HASH_FIELD)
    file[at : at + 64] = blake3(file).hexdigest().encode()
    return bytes(file)


def _check_seal(data: bytes | memoryview, stated: str) -> None:
    header = bytes(data[: 8 + int.from_bytes(data[:8], "little")])
    at = header.find(f"{_HASH_FIELD}{stated}".encode()) if re.fullmatch("[0-9a-f]{64}", stated) else -1
    if at < 0:
        raise FormatError("the blake3 field is not 64 hex digits where it belongs")
    at += len(_HASH_FIELD)
    view = memoryview(data)
    actual = blake3(view[:at]).update(_ZEROS.encode()).update(view[at + 64 :]).hexdigest()
    if actual != stated:
        raise BadDigest(f"the file hashes to {actual[:12]}… where its header says {stated[:12]}…: damaged or altered")


def open_file(data: bytes | memoryview) -> DeltaFile:
    """A delta file with its container and seal checked, and no tensor decoded. Raises what `read_header` does."""
    box = container.read_header(data, limit=MAX_DELTA_HEADER)
    metadata = box.metadata
    if not is_delta(metadata):
        if damaged := metadata.keys() & set(FIELDS) - {"format", "version"}:
            raise FormatError(f"a delta file's field {min(damaged)!r}, but its format is not {FORMAT!r}")
        specs = streams.read_import(box)
        return DeltaFile(DeltaHeader("raw", None, None, None, specs, ("raw",) * len(specs), sealed=False), data, box)
    if metadata.get("codec") not in VERSIONS.get(metadata.get("version", ""), ()):
        raise UnknownVersion(
            f"format version {metadata.get('version')!r}, codec {metadata.get('codec')!r}: this deltawire reads "
            + ", ".join(f"version {number} with codecs {' and '.join(codecs)}" for number, codecs in VERSIONS.items())
        )
    _check_seal(data, metadata.get("blake3", ""))
    try:
        run, parent, version = json.loads(metadata["range"])
        listed = None if metadata["version"] == "1" else body.read(data, box, metadata["codec"])
        specs, encodings = _facts(metadata) if listed is None else _listed(listed)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"the metadata is not a delta's: {error!r}") from None
    _check_range(run, parent, version)
    if listed is None:
        streams.check(specs, encodings, metadata["codec"], box)
    header = DeltaHeader(metadata["codec"], run, parent, version, specs, encodings, sealed=True)
    return DeltaFile(header, data, box, listed)


def _facts(metadata: Mapping[str, str]) -> tuple[tuple[TensorSpec, ...], tuple[str, ...]]:
    facts = json.loads(metadata["tensors"])
    specs = tuple(TensorSpec(name, dtype, tuple(shape), changed) for name, dtype, shape, changed, _ in facts)
    return specs, tuple(str(fact[4]) for fact in facts)


def _listed(listed: list[Listed]) -> tuple[tuple[TensorSpec, ...], tuple[str, ...]]:
    return tuple(tensor.spec for tensor in listed), tuple(tensor.encoding for tensor in listed)


def _check_range(run: Any, parent: Any, version: Any) -> None:
    numbers_ok = all(number is None or (type(number) is int and number >= 0) for number in (parent, version))
    if not (run is None or isinstance(run, str)) or not numbers_ok:
        raise FormatError("range is not [run, parent, version]")
