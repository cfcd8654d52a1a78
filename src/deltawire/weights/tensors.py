"""Numpy arrays, torch tensors and `Bits` made alike: any of them as flat unsigned integers, and back."""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from deltawire.errors import DtypeMismatch, UnknownTensor
from deltawire.weights.bits import Bits, UInts, unsigned

_NUMPY = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "float16": "F16",
    "uint32": "U32", "int32": "I32", "float32": "F32", "uint64": "U64", "int64": "I64", "float64": "F64",
    "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
"""safetensors' dtype names by numpy's (the last row: numpy with ml_dtypes)."""
NAMES = {name: spelled for spelled, name in _NUMPY.items()}
Mark = Literal["kept", "made"]
"""what is said of an fp32 tensor: its model keeps it in fp32 beside 16-bit ones, or its class makes it so"""
_MARK = "_deltawire_mark"
UNREADABLE = (TypeError, ValueError, AttributeError, BufferError, RuntimeError, NotImplementedError)
"""what torch and numpy raise for a kind of tensor that has no flat bits; nothing derived from these, such as torch's
OutOfMemoryError"""


def is_torch(tensor: object) -> bool:
    """Whether this is a torch tensor; never imports torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(tensor, torch.Tensor)


def is_sharded(tensor: object) -> bool:
    """Whether this is a DTensor, or a view of one, so that this process may hold only a part. Never imports torch."""
    return hasattr(tensor, "full_tensor")


def is_dense(tensor: Any) -> bool:
    """Whether every element of a torch tensor has a place in memory.

    It is not sparse or nested, its device holds data, and its memory was not freed, as FSDP2 frees what it gathered for
    a forward.
    """
    if tensor.is_meta or tensor.is_nested or str(tensor.layout) != "torch.strided":
        return False
    if is_wrapper(tensor) or not tensor.numel() or tensor.device.type not in {"cpu", "cuda"}:
        return True
    freed: bool = tensor.untyped_storage().nbytes() == 0
    return not freed


def is_wrapper(tensor: Any) -> bool:
    """Whether a torch tensor has no memory of its own, but others inside that do: a DTensor, or a quantized weight."""
    return hasattr(tensor, "__tensor_flatten__") or type(tensor).__torch_dispatch__ is not _plain_dispatch()


def _plain_dispatch() -> Any:
    return sys.modules["torch"].Tensor.__torch_dispatch__


def marked(tensor: Any, mark: Mark | None) -> Any:
    """The same torch tensor under a mark, which `mark_of` finds; as it is for None."""
    if mark is None:
        return tensor
    alias = tensor.detach()
    setattr(alias, _MARK, mark)
    return alias


def mark_of(tensor: Any) -> Mark | None:
    """The mark under which a tensor was given, or one that it is a view of."""
    mark: Mark | None = getattr(getattr(tensor, "tensor", tensor), _MARK, None)
    return mark


def dtype_of(tensor: Any) -> str:
    """The safetensors name of a tensor's dtype. Raises DtypeMismatch for one that has none."""
    if isinstance(tensor, Bits):
        return tensor.dtype
    spelled = str(tensor.dtype).removeprefix("torch.")
    if spelled not in _NUMPY:
        raise DtypeMismatch(f"dtype {tensor.dtype} cannot be shipped; known: {', '.join(sorted(_NUMPY))}")
    return _NUMPY[spelled]


def named(pairs: Any) -> Iterator[tuple[str, Any]]:
    """(name, tensor) pairs as they come.

    Raises UnknownTensor for something other than a pair, or a name that no checkpoint can have. Raises DtypeMismatch
    for something other than a tensor, or a tensor whose elements are not all here.
    """
    if not isinstance(pairs, Iterable):
        raise UnknownTensor(f"{type(pairs).__name__} is not (name, tensor) pairs: pass model.named_parameters()")
    for pair in pairs:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
            kind = type(pair).__name__
            raise UnknownTensor(f"expected (name, tensor) pairs, and got {kind}: pass model.named_parameters()")
        name, tensor = pair
        if name == "__metadata__" or not re.fullmatch("[^\0\ud800-\udfff]*", name):
            raise UnknownTensor(f"{name!r} cannot be the name of a tensor in a safetensors file")
        with naming(name):
            if not (hasattr(tensor, "dtype") and hasattr(tensor, "shape")):
                raise DtypeMismatch(f"{type(tensor).__name__} is not a tensor")
            dense = not is_torch(tensor) or is_dense(tensor)
            if dense:
                dtype_of(tensor)
        if not dense:
            raise DtypeMismatch(f"{name} {_not_dense(tensor)}")
        yield name, tensor


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Have errors in reading a tensor name it.

    Raises DtypeMismatch for what torch and numpy raise where they cannot read a kind of tensor. An error that says that
    memory ran out stays as it is.
    """
    try:
        yield
    except DtypeMismatch as error:
        raise DtypeMismatch(f"{name}: {error}") from None
    except UNREADABLE as error:
        if type(error) not in UNREADABLE:
            raise
        raise DtypeMismatch(
            f"{name} cannot be read ({type(error).__name__}: {error}): publish it as a plain, dense tensor, and "
            "call dequantize() of a quantized one"
        ) from error


def _not_dense(tensor: Any) -> str:
    if not tensor.is_meta and not tensor.is_nested and str(tensor.layout) == "torch.strided":
        return "has no memory any more: of an FSDP2 model publish what named_parameters() gives after model.reshard()"
    kind = "nested" if tensor.is_nested else tensor.layout
    return f"is on device {tensor.device} and {kind}: publish it dense, with data"


def as_bits(tensor: Any) -> Bits:
    """A tensor's bits. Shares the memory of a contiguous CPU tensor; copies anything else to contiguous host memory.

    Torch may still resize or free shared memory, as it may not after `tensor.numpy()`. Then the bits must not be read
    any more.
    """
    if isinstance(tensor, Bits):
        return tensor
    dtype = dtype_of(tensor)
    if is_torch(tensor):
        return Bits(dtype, tuple(tensor.shape), _torch_bits(tensor, dtype))
    array = np.ascontiguousarray(tensor)
    return Bits(dtype, tuple(np.shape(tensor)), array.reshape(-1).view(unsigned(dtype)))


def _torch_bits(tensor: Any, dtype: str) -> UInts:
    torch = sys.modules["torch"]
    width = unsigned(dtype).itemsize
    signed = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]  # what .numpy() can carry
    flat = tensor.detach().contiguous().reshape(-1).view(signed).cpu()
    if is_wrapper(flat):
        raise DtypeMismatch(f"{type(tensor).__name__} has no memory of its own: publish a plain tensor")
    # tensor.numpy() forbids torch for good to resize this memory, and the next backward of FSDP2 on a CPU has to
    array: UInts = np.from_dlpack(flat).view(unsigned(dtype))
    return array


def like(bits: Bits, tensor: Any) -> Any:
    """`bits` as the kind of thing `tensor` is: a torch tensor on its device, a numpy array, or Bits. Shares memory
    with `bits` on the CPU."""
    if isinstance(tensor, Bits):
        return bits
    if is_torch(tensor):
        return as_torch(bits).to(tensor.device)
    return bits.data.view(np.asarray(tensor).dtype).reshape(bits.shape)


def as_torch(bits: Bits) -> Any:
    """A torch tensor over the same memory. Raises ImportError without torch."""
    try:
        import torch  # an extra
    except ImportError:
        raise ImportError("torch tensors need torch: pip install 'deltawire[torch]'") from None
    carried = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[bits.data.itemsize]
    return torch.from_numpy(bits.data.view(carried)).view(getattr(torch, NAMES[bits.dtype])).reshape(bits.shape)


def equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two mappings name -> tensor (torch, numpy or Bits) have the same names, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(as_bits(a[name]) == as_bits(b[name]) for name in a)


FLOATS = ("F64", "F32", "F16", "BF16")
"""dtypes that `cast` converts between"""


def cast(tensor: Any, dtype: str) -> Bits:
    """A tensor's bits after a cast to `dtype` as the server would cast it: round to nearest even, on the tensor's own
    device. Shares memory when there is nothing to cast. Raises DtypeMismatch between dtypes that are not floats."""
    _require_whole(tensor)
    require_castable(tensor, dtype)
    if is_torch(tensor):
        try:
            return as_bits(cast_by_torch(tensor.detach(), dtype))
        except sys.modules["torch"].OutOfMemoryError:
            pass
        return as_bits(cast_by_torch(tensor.detach().cpu(), dtype))  # the device has no room for a copy
    if dtype_of(tensor) == dtype:
        return as_bits(tensor)
    array = _floats(tensor) if isinstance(tensor, Bits) else np.asarray(tensor)
    data = _round_to_bf16(array) if dtype == "BF16" else array.astype(NAMES[dtype]).reshape(-1).view(unsigned(dtype))
    return Bits(dtype, tuple(array.shape), data)


def require_castable(tensor: Any, dtype: str) -> None:
    """Raise DtypeMismatch unless a tensor is of this dtype, or both are floats."""
    own = dtype_of(tensor)
    if own != dtype and not {own, dtype} <= {*FLOATS}:
        raise DtypeMismatch(f"{own} cannot be cast to {dtype}: only {', '.join(FLOATS)} convert")


QUIET = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000, "F64": 0x7FF8 << 48}
"""what every NaN becomes that is cast on a device: torch's own bits differ by device, and on a CPU by layout"""


def cast_by_torch(tensor: Any, dtype: str) -> Any:
    """A torch tensor cast to `dtype` where it lies; the tensor itself where there is nothing to cast."""
    torch = sys.modules["torch"]
    made = tensor.to(getattr(torch, NAMES[dtype]))
    if made.dtype != tensor.dtype and made.device.type != "cpu":
        words = made.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[made.element_size()])
        words.masked_fill_(made.isnan(), QUIET[dtype])
    return made


def as_float32(tensor: Any) -> Any:
    """A float tensor as fp32: torch on its device for a torch tensor, else numpy. Raises DtypeMismatch for others."""
    _require_whole(tensor)
    if (own := dtype_of(tensor)) not in FLOATS:
        raise DtypeMismatch(f"{own} cannot be cast to F32: only {', '.join(FLOATS)} convert")
    if is_torch(tensor):
        return tensor.detach().float()
    return np.asarray(_floats(tensor) if isinstance(tensor, Bits) else tensor, np.float32)


def _require_whole(tensor: Any) -> None:
    if is_sharded(tensor):
        raise DtypeMismatch(
            "this tensor is a DTensor: publish full tensors, `tensor.full_tensor()`, or let every rank publish its "
            "shards, `Publisher(process_group=…)`, without computing on them"
        )


def _floats(bits: Bits) -> Any:
    if bits.dtype == "BF16":
        return (bits.data.astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)
    return bits.data.view(NAMES[bits.dtype]).reshape(bits.shape)


def _round_to_bf16(array: Any) -> UInts:
    """fp32 to bf16, to nearest even; NaN becomes torch's quiet 0x7fc0 with the sign kept clear."""
    wide = np.ascontiguousarray(array, np.float32).reshape(-1).view(np.uint32)
    rounded = ((wide + (((wide >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where((wide & 0x7FFFFFFF) > 0x7F800000, np.uint16(0x7FC0), rounded)
