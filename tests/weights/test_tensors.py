"""Numpy arrays, torch tensors and Bits are alike: the same bits in, the same kind of thing out."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import PATIENCE, fresh
from strategies import dtypes, random_bits, seeds, shapes

from deltawire import Publisher
from deltawire.errors import DtypeMismatch
from deltawire.weights.bits import WIDTHS, Bits
from deltawire.weights.tensors import NAMES, as_bits, as_torch, cast, dtype_of, equal, like, naming

NUMPY_DTYPES = sorted(set(WIDTHS) - {"BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0"})


def as_numpy(bits: Bits) -> np.ndarray:
    return bits.data.view(NAMES[bits.dtype]).reshape(bits.shape)


@given(dtypes, shapes, seeds)
def test_every_dtype_goes_to_torch_and_back_bit_for_bit_sharing_memory(dtype, shape, seed):
    bits = random_bits(np.random.default_rng(seed), dtype, shape)
    tensor = as_torch(bits)
    assert (str(tensor.dtype), tuple(tensor.shape)) == (f"torch.{NAMES[dtype]}", shape)
    back = as_bits(tensor)
    assert back == bits
    back.data[:] = 1
    assert as_bits(tensor) == bits == back


@given(st.sampled_from(NUMPY_DTYPES), shapes, seeds)
def test_every_numpy_dtype_goes_to_bits_and_back_sharing_memory(dtype, shape, seed):
    bits = random_bits(np.random.default_rng(seed), dtype, shape)
    array = as_numpy(bits)
    assert dtype_of(array) == dtype
    assert as_bits(array) == bits
    assert as_bits(array).data.ctypes.data == array.ctypes.data
    assert like(bits, array).tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float32"])
def test_a_transposed_or_strided_tensor_is_read_in_row_major_order(dtype):
    tensor = torch.arange(12.0).reshape(3, 4).to(getattr(torch, dtype))
    for view in (tensor.T, tensor[:, ::2], tensor[1:, 1:], tensor[:, 1]):
        assert as_bits(view) == as_bits(view.contiguous().clone())
        assert as_bits(view).data.flags.c_contiguous
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    for view in (array.T, array[:, ::2], array[::-1]):
        assert as_bits(view) == as_bits(view.copy())


def test_a_parameter_that_requires_grad_is_read_and_kept():
    parameter = torch.nn.Parameter(torch.tensor([1.0, -0.0]))
    assert as_bits(parameter).data.tolist() == [0x3F80_0000, 0x8000_0000]
    assert parameter.requires_grad


@pytest.mark.parametrize(
    "tensor", [torch.zeros(1, dtype=torch.complex64), np.zeros(1, ">f4"), np.zeros(1, "M8[s]"), np.zeros(1, object)]
)
def test_a_tensor_of_a_dtype_without_a_name_is_refused(tensor):
    with pytest.raises(DtypeMismatch, match="cannot be shipped"):
        as_bits(tensor)


def test_reading_a_tensor_leaves_torch_free_to_resize_its_memory():
    for read in (as_bits, lambda tensor: cast(tensor, "BF16")):
        tensor = torch.arange(4).bfloat16()
        bits = read(tensor)
        assert bits.data.tolist() == [0, 0x3F80, 0x4000, 0x4040]
        assert bits.data.flags.writeable
        assert tensor.untyped_storage().resizable()


class Packed(torch.Tensor):
    """As quantizing libraries make them: bf16 to look at, int8 inside."""

    @staticmethod
    def __new__(cls, inside):
        return torch.Tensor._make_wrapper_subclass(cls, inside.shape, dtype=torch.bfloat16)

    def __init__(self, inside):
        self.inside = inside

    def __tensor_flatten__(self):
        return ["inside"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.clone.default or function is torch.ops.aten.detach.default:
            return Packed(args[0].inside)
        raise NotImplementedError(str(function))


def freed():
    tensor = torch.zeros(3)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (Packed(torch.zeros(4, dtype=torch.int8)), r"w cannot be read \(NotImplementedError.*dequantize"),
        (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged), "w is on .* nested"),
        (freed(), r"w has no memory any more.*reshard\(\)"),
    ],
    ids=["a quantized subclass", "nested", "freed"],
)
def test_a_tensor_that_cannot_be_read_is_named_with_what_to_do(tensor, says):
    bucket = fresh()
    with Publisher(bucket) as pub:
        with pytest.raises(DtypeMismatch, match=says):
            pub.publish({"a": torch.zeros(4), "w": tensor})
        pub.publish({"a": torch.zeros(4)})
        pub.flush(timeout=PATIENCE)
        with pytest.raises(DtypeMismatch, match=says.replace("w ", "a ", 1)):
            pub.publish({"a": tensor})


def test_errors_that_are_no_fault_of_a_tensor_stay_what_they_are():
    for kind in (torch.OutOfMemoryError, MemoryError, TimeoutError, KeyError):
        with pytest.raises(kind, match="stop"), naming("w"):
            raise kind("stop")


def test_like_gives_back_the_kind_that_was_given():
    bits = Bits("F32", (2,), np.array([1, 2], np.uint32))
    assert like(bits, bits) is bits
    assert isinstance(like(bits, torch.zeros(2)), torch.Tensor)
    assert isinstance(like(bits, np.zeros(2, np.float32)), np.ndarray)


@given(st.sampled_from(NUMPY_DTYPES), shapes, seeds)
def test_numpy_torch_and_bits_of_the_same_weights_are_equal(dtype, shape, seed):
    bits = random_bits(np.random.default_rng(seed), dtype, shape)
    kinds = [{"w": bits}, {"w": as_torch(bits.copy())}, {"w": as_numpy(bits.copy())}]
    assert all(equal(a, b) for a in kinds for b in kinds)


def test_equal_sees_names_dtypes_shapes_and_single_bits():
    zero = {"w": np.zeros(2, np.float32)}
    assert equal(zero, {"w": torch.zeros(2)})
    assert not equal(zero, {"v": np.zeros(2, np.float32)})
    assert not equal(zero, {**zero, "v": np.zeros(2)})
    assert not equal(zero, {"w": np.zeros(2, np.int32)})
    assert not equal(zero, {"w": np.zeros((2, 1), np.float32)})
    assert not equal(zero, {"w": np.array([0.0, -0.0], np.float32)})
    assert equal({"w": np.array([np.nan])}, {"w": torch.tensor([float("nan")], dtype=torch.float64)})


@given(seeds, st.sampled_from(["F64", "F32", "F16", "BF16"]), st.sampled_from(["F32", "F16", "BF16"]))
def test_casting_rounds_as_torch_does_whoever_holds_the_tensor(seed, own, dtype):
    bits = random_bits(np.random.default_rng(seed), own, (500,))
    number = ~torch.isnan(as_torch(bits))  # torch's own NaN depends on whether its vector unit did the cast
    expected = as_bits(as_torch(bits).to(getattr(torch, NAMES[dtype]))[number])
    with np.errstate(over="ignore", invalid="ignore"):
        casts = [cast(bits, dtype), cast(as_torch(bits), dtype)]
        casts += [cast(as_numpy(bits), dtype)] if own != "BF16" else []
    for result in casts:
        assert Bits(dtype, expected.shape, result.data[number.numpy()]) == expected
        assert torch.isnan(as_torch(result)[~number]).all()


def test_casting_to_its_own_dtype_keeps_every_nan_payload():
    bits = Bits("BF16", (2,), np.array([0x7F81, 0xFFFF], np.uint16))
    assert cast(bits, "BF16") is bits


def test_integers_are_never_cast_to_floats():
    with pytest.raises(DtypeMismatch, match="I64 cannot be cast to BF16"):
        cast(np.zeros(2, np.int64), "BF16")


def test_numpy_weights_need_no_torch_and_torch_ones_say_what_to_install():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from deltawire.weights.tensors import as_bits, as_torch, equal\n"
        "bits = as_bits(np.ones(2)); assert equal({'w': bits}, {'w': np.ones(2)})\n"
        "try: as_torch(bits)\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "pip install 'deltawire[torch]'" in done.stdout
