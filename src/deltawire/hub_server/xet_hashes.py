"""The hashes of Xet storage: of a chunk, of a xorb, of a file, of a file's segment, and how a hash is spelled in text.

Source of keys and rules: the Xet protocol (https://huggingface.co/docs/xet) and the Rust sources of hf_xet. Every hash
is 32 bytes here; text appears only in URLs, JSON and inside the tree itself.
"""

import re
import struct
from collections.abc import Iterable, Sequence

from blake3 import blake3

from deltawire.errors import FormatError

CHUNK_KEY = bytes.fromhex("6697f5775b9550de3135cbaca597181c9de421109beb2b58b4d0b04b93adf229")
NODE_KEY = bytes.fromhex("017ec5c7a5472996fd946666b48a02e65ddd536f37c76dd2f86352e64a53713f")
SEGMENT_KEY = bytes.fromhex("7f1857d6ce56ed66127ff913e7a5c3f3a4cd26d5b5db49e64124987f28fb94c3")
FILE_KEY = bytes(32)

EMPTY_FILE = bytes(32)
"""The hash of a file of zero bytes, which has no chunks and is never stored."""

_TEXT = re.compile(r"[0-9a-f]{64}")


def to_text(digest: bytes) -> str:
    """The 64 hex digits the protocol writes: four little-endian 64-bit numbers, not the bytes in order."""
    return "{:016x}{:016x}{:016x}{:016x}".format(*struct.unpack("<4Q", digest))


def from_text(text: str) -> bytes:
    """The 32 bytes of a hash as the protocol writes it. Raises FormatError unless it is 64 lower-case hex digits."""
    if not _TEXT.fullmatch(text):
        raise FormatError(f"not a Xet hash: {text[:80]!r}; 64 lower-case hex digits are expected")
    return struct.pack("<4Q", *(int(text[i : i + 16], 16) for i in range(0, 64, 16)))


def chunk_hash(data: bytes) -> bytes:
    """The hash of a chunk's uncompressed bytes."""
    return blake3(data, key=CHUNK_KEY).digest()


def xorb_hash(chunks: Iterable[tuple[bytes, int]]) -> bytes:
    """The hash of a xorb from its chunks, each as (hash, uncompressed length in bytes)."""
    return _root(list(chunks))


def file_hash(chunks: Iterable[tuple[bytes, int]]) -> bytes:
    """The hash of a file from its chunks in order, each as (hash, uncompressed length in bytes)."""
    nodes = list(chunks)
    return blake3(_root(nodes), key=FILE_KEY).digest() if nodes else EMPTY_FILE


def segment_hash(chunk_hashes: Iterable[bytes]) -> bytes:
    """The verification hash a shard carries for one run of consecutive chunks of a file."""
    return blake3(b"".join(chunk_hashes), key=SEGMENT_KEY).digest()


def last_word(digest: bytes) -> int:
    """The last 64-bit number of a hash, on which the protocol takes its "modulo" decisions."""
    return int(struct.unpack_from("<Q", digest, 24)[0])


def _root(nodes: list[tuple[bytes, int]]) -> bytes:
    if not nodes:
        return bytes(32)
    while len(nodes) > 1:
        groups = []
        start = 0
        while start < len(nodes):
            end = start + _group_length(nodes[start : start + 9])
            groups.append(_parent(nodes[start:end]))
            start = end
        nodes = groups
    return nodes[0][0]


def _group_length(ahead: Sequence[tuple[bytes, int]]) -> int:
    """How many of the (at most nine) nodes ahead share a parent: the third to ninth may end the group by its hash."""
    for position in range(2, len(ahead)):
        if last_word(ahead[position][0]) % 4 == 0:
            return position + 1
    return len(ahead)


def _parent(children: Sequence[tuple[bytes, int]]) -> tuple[bytes, int]:
    lines = "".join(f"{to_text(digest)} : {length}\n" for digest, length in children)
    return blake3(lines.encode(), key=NODE_KEY).digest(), sum(length for _, length in children)
