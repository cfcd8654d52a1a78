"""The additive digest: a 64-bit sum over a tensor's elements that is updated in O(changed) and splits over shards.

    digest(tensor) = sum over i of mix(i, bits[i])  mod 2^64
    mix(i, b)      = fmix64(fmix64(i + 0x9E3779B97F4A7C15) ^ b)        (MurmurHash3's finaliser)

It is evidence against accidents, never against malice: one who can choose the bits can choose the sum.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from blake3 import blake3

from deltawire.weights.bits import Positions, UInts
from deltawire.weights.tensors import as_bits

MODULUS = 1 << 64


class TableEntry(Protocol):
    """What a root needs of each tensor."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def digest_bits(bits: UInts, start: int = 0) -> int:
    """The digest of a flat array, or of the part of a tensor that begins at flat position `start`."""
    from deltawire.weights import kernels

    return kernels.digest_sweep(bits, start)


def digest_at(positions: Positions, bits: UInts) -> int:
    """The part of a digest made by the elements at `positions`, whose bits are `bits`."""
    from deltawire.weights import kernels

    return kernels.digest_at(positions, bits)


def digest(tensors: Mapping[str, Any]) -> dict[str, int]:
    """The digest of each tensor (torch, numpy or Bits), by name."""
    return {name: digest_bits(as_bits(tensor).data) for name, tensor in tensors.items()}


def moved(value: int, before: int, after: int) -> int:
    """A digest after the elements that made `before` of it came to make `after`."""
    return (value + after - before) % MODULUS


def root(table: Iterable[TableEntry], digests: Mapping[str, int]) -> str:
    """One hash for a whole version: BLAKE3 over `name NUL dtype NUL shape NUL digest LF` in table order, 64 hex digits.

    The shape is decimals joined by commas, and the digest 16 hex digits. Raises KeyError if a digest is missing.
    (FORMAT.md §4)
    """
    hasher = blake3()
    for entry in table:
        shape = ",".join(map(str, entry.shape))
        hasher.update(f"{entry.name}\0{entry.dtype}\0{shape}\0{digests[entry.name]:016x}\n".encode())
    return hasher.hexdigest()
