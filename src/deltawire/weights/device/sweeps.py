"""Digest, compare, gather and scatter over many tensors of one device at once.

CUDA tensors are swept by Triton where it runs: a launch or two, however many tensors there are. All others,
and those of ROCm, are swept by the twin in plain torch, tensor by tensor. Results are equal, bit for bit. All work is
queued on the current stream; what returns numbers of the host waits for that stream.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType

import torch

from deltawire.errors import ShapeMismatch
from deltawire.weights.device import torch_twin
from deltawire.weights.device.carriers import CARRIERS, WHOLE, Changes, Part, Strip

__all__ = [
    "WHOLE",
    "Changes",
    "Part",
    "Strip",
    "compare",
    "digest",
    "digest_at",
    "gather",
    "scatter",
    "scattering",
    "uses_triton",
]

LOG = logging.getLogger("deltawire")
Tensors = Sequence[torch.Tensor]
Put = Callable[[torch.Tensor, torch.Tensor], None]
"""writes bits to offsets"""


def digest(parts: Sequence[Part]) -> list[int]:
    """The digest of each tensor, or the part of it that a strip makes, in one sweep a width. Parts may have any widths.

    Equals `weights.digest.digest_bits` of a whole tensor, and `Box.digest` of a box that is the strip.
    """
    found = [0] * len(parts)
    for kind in {part.bits.dtype for part in parts}:
        own = [number for number, part in enumerate(parts) if part.bits.dtype == kind]
        _require_carriers([parts[number].bits for number in own])
        sums = _twin(parts[own[0]].bits).digest([parts[number] for number in own])
        for number, total in zip(own, sums, strict=True):
            found[number] = total
    return found


def digest_at(counts: Sequence[int], positions: torch.Tensor, bits: torch.Tensor) -> list[int]:
    """The part of each tensor's digest that some of its elements make.

    `positions` (int32 or int64, in the checkpoint tensor) and `bits` (a carrier) are those of all tensors, one tensor
    behind another, and `counts` says how many are of each.
    """
    _require_counts(counts, positions, bits)
    return list(_twin(bits).digest_at(counts, positions, bits))


def compare(new: Tensors, base: Tensors) -> Changes:
    """Where tensors differ from what was captured of them, and by how much. Nothing is written to either.

    `base` are carriers of one width. Each of `new` is a carrier of that width too, or flat float32 where those are of
    2 bytes: then its bf16 is compared, rounded to nearest even, with 0x7FC0 for every NaN. All stands on one device.

    Raises ShapeMismatch for lengths or dtypes that do not fit. Raises ConcurrentWrite when another stream or thread
    changed an element between the two passes over it; nothing beside the result was written then.
    """
    _require_carriers(base)
    if len(new) != len(base) or len({own.dtype for own in base}) > 1:
        raise ShapeMismatch("one baseline a tensor is compared, all of one width")
    for own, was in zip(new, base, strict=True):
        wide = own.dtype == torch.float32 and was.dtype == torch.int16
        if own.shape != was.shape or own.device != was.device or not (wide or own.dtype == was.dtype):
            raise ShapeMismatch(f"{own.numel()} of {own.dtype} against {was.numel()} of {was.dtype}")
        if not own.is_contiguous():
            raise ShapeMismatch("what is compared is contiguous")
    if not base:
        raise ShapeMismatch("no tensors to compare")
    return _twin(base[0]).compare(new, base)


def gather(
    flats: Tensors, counts: Sequence[int], offsets: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The elements of carriers of one width at `offsets` (int32 or int64): of each tensor so many as `counts` says.

    One launch for all tensors. An offset beyond its tensor gives 0 under Triton, and IndexError in plain torch. They
    are put into the carrier `out`, where it is given.
    """
    _require_flats(flats, counts, offsets)
    if out is not None:
        _require_counts(counts, out)
        if out.dtype != flats[0].dtype:
            raise ShapeMismatch(f"{out.dtype} for elements of {flats[0].dtype}")
    return _twin(flats[0]).gather(flats, counts, offsets, out)


def scatter(flats: Tensors, counts: Sequence[int], offsets: torch.Tensor, bits: torch.Tensor) -> None:
    """Write `bits` to carriers of one width at `offsets` (int32 or int64), in place and in one launch.

    `counts` says how many are of each tensor. Where an offset stands twice, either of its bits stays. An offset beyond
    its tensor writes nothing under Triton, and is an IndexError in plain torch.
    """
    _require_flats(flats, counts, offsets)
    _require_counts(counts, offsets, bits)
    if bits.dtype != flats[0].dtype:
        raise ShapeMismatch(f"{bits.dtype} for tensors of {flats[0].dtype}")
    _twin(flats[0]).scatter(flats, counts, offsets, bits)


def scattering(flats: Tensors, counts: Sequence[int], kind: torch.dtype) -> Put:
    """A `scatter` to these carriers, made ready. What is returned is called with `offsets`, of that kind, and `bits`,
    any number of times. It copies no table and compiles nothing."""
    _require_flats(flats, counts)
    return _twin(flats[0]).scattering(flats, counts, kind)


@cache
def _triton_twin() -> ModuleType | None:
    """The twin in Triton; None where that is not installed, or torch is not one for CUDA."""
    if torch.version.hip is not None:
        return None
    try:
        from deltawire.weights.device import triton_twin
    except ImportError:
        return None
    return triton_twin


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether a tensor is swept by Triton, not in plain torch."""
    return _twin(tensor) is not torch_twin


@cache
def _compiles(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device. It makes a launcher with the host's C compiler, which slim images do
    not have, and refuses old GPUs."""
    twin = _triton_twin()
    if twin is None:
        return False
    flat, at = torch.zeros(1, dtype=torch.uint8, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    try:
        twin.gather([flat], [1], at)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        LOG.warning("%s: Triton's kernels do not run (%s), so plain torch does their work, more slowly", device, error)
        return False
    return True


def _twin(tensor: torch.Tensor) -> ModuleType:
    return (_triton_twin() if tensor.is_cuda and _compiles(tensor.device) else None) or torch_twin


def _require_carriers(flats: Tensors) -> None:
    for flat in flats:
        if flat.dtype not in CARRIERS.values() or flat.dim() != 1 or not flat.is_contiguous():
            raise ShapeMismatch(f"a carrier is flat and of integers, not {list(flat.shape)} of {flat.dtype}")


def _require_flats(flats: Tensors, counts: Sequence[int], *listed: torch.Tensor) -> None:
    _require_carriers(flats)
    if len(flats) != len(counts) or len({flat.dtype for flat in flats}) != 1:
        raise ShapeMismatch("one count a tensor, and all tensors of one width")
    _require_counts(counts, *listed)


def _require_counts(counts: Sequence[int], *listed: torch.Tensor) -> None:
    for values in listed:
        if values.dim() != 1 or values.numel() != sum(counts) or not values.is_contiguous():
            raise ShapeMismatch(f"{sum(counts)} elements are counted, and {list(values.shape)} given")
    if any(count < 0 for count in counts):
        raise ShapeMismatch("a count below zero")
