"""Tensors as unsigned integers of their own width: the only view of weights the rest of deltawire computes on."""

from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from deltawire.errors import DtypeMismatch, ShapeMismatch

UInts = npt.NDArray[np.unsignedinteger]
"""A flat array of uint8, uint16, uint32 or uint64."""
Positions = npt.NDArray[np.int64]
"""Flat (row-major) element positions: sorted and unique."""

WIDTHS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes per element, by the dtype names of the safetensors format."""

_UNSIGNED: dict[int, np.dtype[np.unsignedinteger]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<u2"),
    4: np.dtype("<u4"),
    8: np.dtype("<u8"),
}


def unsigned(dtype: str) -> np.dtype[np.unsignedinteger]:
    """The unsigned integer type as wide as one element of `dtype`. Raises DtypeMismatch for a dtype we do not ship."""
    width = WIDTHS.get(dtype)
    if width is None:
        raise DtypeMismatch(f"dtype {dtype!r} cannot be shipped; known: {', '.join(sorted(WIDTHS))}")
    return _UNSIGNED[width]


def count(shape: tuple[int, ...]) -> int:
    """Elements in a tensor of this shape; 1 for a scalar."""
    return prod(shape)


@dataclass(frozen=True, slots=True, eq=False)
class Bits:
    """One tensor, bit for bit: -0.0, NaN payloads and all.

    `data` is flat and row-major, of the unsigned type as wide as `dtype`; it shares memory with the tensor it was made
    from where it can, so writing to it writes the tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    data: UInts

    def __post_init__(self) -> None:
        if self.data.dtype != unsigned(self.dtype) or self.data.ndim != 1:
            raise DtypeMismatch(
                f"{self.dtype} needs flat {unsigned(self.dtype)}, not {self.data.ndim}-D {self.data.dtype}"
            )
        if self.data.size != count(self.shape):
            raise ShapeMismatch(f"{self.data.size} elements do not fill shape {list(self.shape)}")

    def __eq__(self, other: object) -> bool:
        """Same dtype, shape and every bit."""
        return (
            isinstance(other, Bits)
            and (self.dtype, self.shape) == (other.dtype, other.shape)
            and bool(np.array_equal(self.data, other.data))
        )

    __hash__ = None  # type: ignore[assignment]  # a mutable array is inside

    def copy(self) -> "Bits":
        """The same bits in memory of their own."""
        return Bits(self.dtype, self.shape, self.data.copy())


def zeros(dtype: str, shape: tuple[int, ...]) -> Bits:
    """A tensor of all-zero bits."""
    return Bits(dtype, shape, np.zeros(count(shape), unsigned(dtype)))
