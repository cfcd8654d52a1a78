"""Weights as fp8 with their scales, in the layouts vLLM loads, rounded before anything is compared.

    fp8 = Fp8()
    config.quantization_config = fp8.quantization_config(model.named_parameters())  # beside the anchor, as `assets`
    publisher = Publisher(bucket, prepare=[fp8], assets=folder)

Names and meaning are those of vLLM's `fp8` method and of checkpoints as DeepSeek-V3's: `weight` F8_E4M3 [rows, columns]
beside `weight_scale_inv` F32 [ceil(rows / 128), ceil(columns / 128)], or for one scale per tensor `weight_scale` F32
[1]; either way the weight is the fp8 number times the scale.

The same weights give the same bits, in numpy or torch, on a CPU or a GPU. What is done is a maximum, a division and one
rounding to nearest even, each correct to the last bit in fp32.

A scale follows its block's largest magnitude, amax, which a trainer moves all the time. By default scales are powers of
two, the smallest with amax / scale <= 448. They stay until amax crosses 1.75 times a power of two, and need no memory
of earlier versions. The division is exact, so fp8's rounding is the only error. A block whose scale doubles or halves
stays exact, too: every exponent moves by one and every value stays. Each byte of it changes, all by one increment,
which packs to a few per cent. Elements below 2**-6 of the scale are not exact: subnormal in fp8, they lose or win a
bit.

Most quantisers make scales of "amax" / 448. Those move with almost every step of a trainer with fp32 masters, and with
them the value that every number of the block stands for. Either way about as many fp8 bytes change
(`tests/prepare/test_fp8.py` measures both).
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from deltawire.errors import DtypeMismatch
from deltawire.weights.bits import Bits, UInts
from deltawire.weights.tensors import FLOATS, as_bits, as_float32, dtype_of, is_torch, mark_of

LARGEST = 448.0
"""the largest fp8 e4m3 number"""
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""2**-126: below it fp32 scales would lose bits themselves"""
Scales = Literal["power-of-two", "amax"]


@dataclass(frozen=True, slots=True)
class Fp8:
    """For `Publisher(prepare=[…])`: quantises the 2-D weights, gives each its scales, passes everything else through.

    `block`: (rows, columns) that share a scale. None is for one scale per tensor, which vLLM rounds again where it
    fuses layers of different scales, so there prefer blocks. A weight is left alone when its name does not end in
    `.weight`, or a part of it, split at the dots, is in `skip`. So is one that is not a float matrix with elements,
    or that its model keeps in fp32. Experts kept in one 3-D tensor must be split before.
    """

    block: tuple[int, int] | None = (128, 128)
    scales: Scales = "power-of-two"
    skip: frozenset[str] = frozenset({"embed_tokens", "lm_head", "gate", "shared_expert_gate", "router"})

    def __post_init__(self) -> None:
        if self.block is not None and not (len(self.block) == 2 and min(self.block) > 0):
            raise ValueError(f"block={self.block!r}: (rows, columns), each at least 1, or None")
        if self.scales not in get_args(Scales):
            raise ValueError(f"scales={self.scales!r}: one of {', '.join(get_args(Scales))}")

    def __call__(self, pairs: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
        """Raises DtypeMismatch for a weight that holds an infinity or NaN."""
        for name, tensor in pairs:
            if not self._takes(name, tensor):
                yield name, tensor
                continue
            try:
                weight, scale = quantise(tensor, self.block, scales=self.scales)
            except DtypeMismatch as error:
                raise DtypeMismatch(f"{name}: {error}") from None
            yield name, weight
            yield name + ("_scale" if self.block is None else "_scale_inv"), scale

    def quantization_config(self, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        """What `config.json` of the checkpoint says as `quantization_config`; `pairs` as they come before this."""
        kept = [
            name.removesuffix(".weight")
            for name, tensor in pairs
            if name.endswith(".weight") and len(tensor.shape) == 2 and not self._takes(name, tensor)
        ]
        config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "modules_to_not_convert": kept}
        return config if self.block is None else {**config, "weight_block_size": list(self.block)}

    def _takes(self, name: str, tensor: Any) -> bool:
        return (
            name.endswith(".weight")
            and len(tensor.shape) == 2
            and 0 not in tensor.shape
            and dtype_of(tensor) in FLOATS
            and self.skip.isdisjoint(name.split("."))
            and mark_of(tensor) != "kept"
        )


def quantise(
    tensor: Any, block: tuple[int, int] | None = (128, 128), *, scales: Scales = "power-of-two"
) -> tuple[Any, Bits]:
    """A float matrix [rows, columns] as (F8_E4M3 of the same shape, F32 scales).

    A torch tensor gives a torch tensor on its device, anything else Bits. Beyond 448 times the scale it saturates.
    Scales are Bits, which a publisher ships as they are.

    Raises DtypeMismatch when the matrix holds an infinity or NaN.
    """
    wide = as_float32(tensor)
    rows, columns = wide.shape
    height, width = block or (max(rows, 1), max(columns, 1))
    blocks = _in_blocks(wide, height, width)
    amax = as_bits(abs(blocks).amax((1, 3)) if is_torch(wide) else np.abs(blocks).max((1, 3), initial=0.0))
    scale = _scales(amax.data.view(np.float32), scales)
    grid = scale.reshape(amax.shape)[:, None, :, None]
    if is_torch(wide):
        torch = sys.modules["torch"]
        scaled = (blocks / torch.from_numpy(grid).to(wide.device)).clamp(-LARGEST, LARGEST)
        weight = scaled.to(torch.float8_e4m3fn).reshape(-(-rows // height) * height, -1)[:rows, :columns].contiguous()
    else:
        scaled = np.clip(blocks / grid, -LARGEST, LARGEST)
        padded = _round_to_e4m3(scaled).reshape(-(-rows // height) * height, -1)
        weight = Bits("F8_E4M3", (rows, columns), np.ascontiguousarray(padded[:rows, :columns]).reshape(-1))
    return weight, Bits("F32", amax.shape if block else (1,), scale.view(np.uint32))


def _in_blocks(wide: Any, height: int, width: int) -> Any:
    """[rows, columns] as [blocks down, height, blocks across, width], zeros filling up the last ones."""
    rows, columns = wide.shape
    down, across = -(-rows // height), -(-columns // width)
    below, beside = down * height - rows, across * width - columns
    if is_torch(wide):
        wide = sys.modules["torch"].nn.functional.pad(wide, (0, beside, 0, below))
    else:
        wide = np.pad(wide, ((0, below), (0, beside)))
    return wide.reshape(down, height, across, width)


def _scales(amax: Any, kind: Scales) -> Any:
    """fp32 scales for fp32 magnitudes, flat; 1 for a block of zeros."""
    if not np.isfinite(amax).all():
        raise DtypeMismatch("holds an infinity or NaN, for which no fp8 scale is right")
    if kind == "amax":
        scale = amax / np.float32(LARGEST)
    else:
        mantissa, exponent = np.frexp(amax)  # amax = mantissa * 2**exponent, 0.5 <= mantissa < 1; 448 = 0.875 * 2**9
        scale = np.ldexp(np.float32(1.0), exponent - 9 + (mantissa > 0.875))
    return np.where(amax == 0, np.float32(1.0), np.maximum(scale, np.float32(SMALLEST_SCALE))).astype(np.float32)


def _round_to_e4m3(values: Any) -> UInts:
    """fp32 within ±448 to fp8's bits, to nearest even: 4 exponent bits of bias 7, 3 of mantissa, spaced by 2**-9
    below 2**-6."""
    wide = values.view(np.uint32)
    magnitude = wide & np.uint32(0x7FFF_FFFF)
    normal = (magnitude + np.uint32(0x7_FFFF) + ((magnitude >> 20) & 1)) >> 20
    normal = normal.astype(np.int32) - ((127 - 7) << 3)
    subnormal = np.rint(np.abs(values) * np.float32(512)).astype(np.int32)
    sign = (wide >> 24).astype(np.uint8) & np.uint8(0x80)
    bits: UInts = np.where(np.abs(values) < 2.0**-6, subnormal, normal).astype(np.uint8) | sign
    return bits
