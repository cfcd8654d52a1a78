"""The sweeps in plain torch, tensor by tensor: what each computes, on any device.

They work in chunks, so that their temporary memory stays below 128 MiB whatever a tensor's size.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from deltawire.weights.device.carriers import Changes, Part, Strip, positions_for, written_meanwhile
from deltawire.weights.kernels_numpy import GOLDEN, M1, M2

CHUNK = 1 << 21
"""elements at a time"""
NAN = 0x7FC0
"""what every NaN is as bf16"""
_MODULUS = 1 << 64
Tensors = Sequence[torch.Tensor]
Put = Callable[[torch.Tensor, torch.Tensor], None]


def digest(parts: Sequence[Part]) -> list[int]:
    """As `sweeps.digest`, of carriers of one width."""
    sums = [_sum(_sweep(part.bits, part.strip)) for part in parts]
    return _numbers(sums)


def digest_at(counts: Sequence[int], positions: torch.Tensor, bits: torch.Tensor) -> list[int]:
    """As `sweeps.digest_at`."""
    pairs = zip(positions.split(list(counts)), bits.split(list(counts)), strict=True)
    return _numbers([_sum(map(_mixed, own.split(CHUNK), values.split(CHUNK))) for own, values in pairs])


def compare(new: Tensors, base: Tensors) -> Changes:
    """As `sweeps.compare`."""
    kind = positions_for([flat.numel() for flat in base])
    found = [_differing(own, was, kind) for own, was in zip(new, base, strict=True)]
    counts = tuple(positions.numel() for positions, _, _ in found)
    positions, increments, bits = (torch.cat([each[part] for each in found]) for part in range(3))
    if not bool(increments.all()):
        raise written_meanwhile()
    return Changes(counts, positions, increments, bits)


def gather(
    flats: Tensors, counts: Sequence[int], offsets: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """As `sweeps.gather`."""
    bits = torch.empty_like(offsets, dtype=flats[0].dtype) if out is None else out
    sizes = list(counts)
    for flat, own, values in zip(flats, offsets.split(sizes), bits.split(sizes), strict=True):
        for at, there in zip(own.split(CHUNK), values.split(CHUNK), strict=True):
            there.copy_(flat[at])
    return bits


def scatter(flats: Tensors, counts: Sequence[int], offsets: torch.Tensor, bits: torch.Tensor) -> None:
    """As `sweeps.scatter`."""
    sizes = list(counts)
    for flat, own, values in zip(flats, offsets.split(sizes), bits.split(sizes), strict=True):
        for at, there in zip(own.split(CHUNK), values.split(CHUNK), strict=True):
            flat[at] = there


def scattering(flats: Tensors, counts: Sequence[int], kind: torch.dtype) -> Put:
    """As `sweeps.scattering`; there is nothing to make ready."""
    return functools.partial(scatter, flats, counts)


def bf16_bits(wide: torch.Tensor) -> torch.Tensor:
    """Flat float32 as a carrier of its bf16: rounded to nearest even, 0x7FC0 for every NaN.

    torch's own cast gives a NaN other bits by device and by layout.
    """
    words = wide.view(torch.int32)
    rounded = (words + (((words >> 16) & 1) + 0x7FFF)) >> 16
    return rounded.masked_fill_(wide.isnan(), NAN).to(torch.int16)


def _differing(
    new: torch.Tensor, base: torch.Tensor, kind: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions, increments and new bits of one tensor."""
    positions, increments, bits = [], [], []
    for start in range(0, max(base.numel(), 1), CHUNK):
        was, own = base[start : start + CHUNK], new[start : start + CHUNK]
        own = bf16_bits(own) if own.dtype == torch.float32 else own
        at = torch.nonzero(own != was).view(-1)
        values = own[at]
        positions.append((at + start).to(kind))
        increments.append(values - was[at])
        bits.append(values)
    return torch.cat(positions), torch.cat(increments), torch.cat(bits)


def _sweep(bits: torch.Tensor, strip: Strip) -> Iterator[torch.Tensor]:
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK]
        inside = torch.arange(start, start + part.numel(), device=bits.device)
        if not strip.is_run(bits.numel()):
            inside = inside // strip.run * strip.stride + inside % strip.run
        yield _mixed(inside + strip.offset, part)


def _mixed(positions: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Sum of mix(positions[k], bits[k]) mod 2^64, in int64. Arithmetic wraps; a shift must not bring in the sign."""
    numbers = positions.to(torch.int64) + _signed(GOLDEN)
    width = bits.element_size()
    own = bits.to(torch.int64)
    return _fmix64(_fmix64(numbers) ^ (own if width == 8 else own & ((1 << 8 * width) - 1))).sum()


def _fmix64(h: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 64-bit finaliser (Appleby, public domain), in place."""
    for factor in (M1, M2):
        h ^= (h >> 33) & 0x7FFFFFFF
        h *= _signed(factor)
    h ^= (h >> 33) & 0x7FFFFFFF
    return h


def _signed(number: int) -> int:
    return number - _MODULUS if number >= _MODULUS // 2 else number


def _sum(parts: Iterator[torch.Tensor]) -> torch.Tensor | int:
    return sum(parts)  # 0 where there are none


def _numbers(sums: list[torch.Tensor | int]) -> list[int]:
    """Sums of the device as numbers, in one copy."""
    on_device = [total for total in sums if isinstance(total, torch.Tensor)]
    numbers = iter(torch.stack(on_device).tolist() if on_device else ())
    return [next(numbers) % _MODULUS if isinstance(total, torch.Tensor) else 0 for total in sums]
