"""The safetensors container: what the safetensors package reads is what we wrote, the other way round, and no lies."""

import json
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from safetensors import safe_open
from strategies import versions

from deltawire.errors import FormatError, TooLarge, Truncated
from deltawire.format import container
from deltawire.weights.bits import WIDTHS, Bits, zeros
from deltawire.weights.tensors import NAMES, as_bits, as_torch, equal


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("container") / "file.safetensors"


def file_of(header: object, body: bytes = b"") -> bytes:
    """A container with any header, however wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def read_all(data: bytes) -> tuple[dict[str, Bits], dict[str, str]]:
    header = container.read_header(data)
    return {name: container.tensor(data, header, name) for name in header.entries}, header.metadata


@given(versions(1))
def test_safe_open_reads_what_we_wrote(path, chain):
    (weights,) = chain
    path.write_bytes(container.write(weights, {"format": "pt", "note": 'a "ω" \\ \n'}))
    with safe_open(path, "pt") as file:
        assert equal({name: file.get_tensor(name) for name in file.keys()}, weights)  # noqa: SIM118
        assert file.metadata() == {"format": "pt", "note": 'a "ω" \\ \n'}


@given(versions(1))
def test_we_read_what_the_safetensors_package_wrote(path, chain):
    (weights,) = chain
    safetensors.torch.save_file({name: as_torch(bits) for name, bits in weights.items()}, path, {"format": "pt"})
    tensors, metadata = read_all(path.read_bytes())
    assert equal(tensors, weights)
    assert metadata == {"format": "pt"}


@given(versions(1))
def test_equal_input_gives_equal_bytes_and_comes_back_equal(chain):
    (weights,) = chain
    data = bytes(container.write(weights, {}))
    assert data == bytes(container.write({name: bits.copy() for name, bits in weights.items()}, {}))
    tensors, metadata = read_all(data)
    assert (tensors, metadata) == (weights, {})
    assert list(tensors) == list(weights)


@pytest.mark.parametrize("dtype", WIDTHS)
def test_every_dtype_has_the_name_that_safetensors_gives_it(path, dtype):
    safetensors.torch.save_file({"w": torch.zeros(3).to(getattr(torch, NAMES[dtype]))}, path)
    assert container.read_header(path.read_bytes()).entries["w"].dtype == dtype


def test_the_header_ends_on_a_multiple_of_eight_bytes():
    for length in range(1, 10):
        data = container.write({"x" * length: zeros("U8", (1,))}, {})
        assert container.read_header(data).data_start % 8 == 0


def test_a_header_can_be_written_before_its_tensors():
    weights = {"a": zeros("BF16", (2, 3)), "b": zeros("F32", ())}
    layout = {name: (bits.dtype, bits.shape) for name, bits in weights.items()}
    assert container.write(weights, {"k": "v"}).startswith(container.header_bytes(layout, {"k": "v"}))


def test_tensors_share_the_files_memory():
    data = container.write({"w": zeros("BF16", (4,))}, {})
    tensor = container.tensor(data, container.read_header(data), "w")
    data[-8:] = b"\x01\x02" * 4
    assert tensor.data.tolist() == [0x0201] * 4


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8)])
def test_bytes_views_and_mapped_arrays_are_read_alike(kind):
    data = kind(bytes(container.write({"w": as_bits(np.arange(3.0))}, {})))
    header = container.read_header(data)
    assert container.tensor(data, header, "w") == as_bits(np.arange(3.0))


def test_every_truncation_is_refused():
    data = bytes(container.write({"a": zeros("U8", (9,)), "b": zeros("F32", (2,))}, {"k": "v"}))
    for length in range(len(data)):
        with pytest.raises(Truncated):
            container.read_header(data[:length])


def test_a_header_longer_than_the_bound_is_refused_before_it_is_read():
    with pytest.raises(TooLarge, match="a header of 18,446,744,073,709,551,615 bytes"):
        container.read_header(b"\xff" * 16)
    with pytest.raises(TooLarge, match="the bound is 10"):
        container.read_header(bytes(container.write({"a": zeros("U8", (9,))}, {})), limit=10)


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [2], "data_offsets": [0, 2], **changes}


NOT_JSON, RANGE, ENTRY = "not JSON", "out of range", "not a tensor entry"
HOSTILE = {
    "not JSON": (b"{", NOT_JSON),
    "not an object": ([], "not a JSON object"),
    "not UTF-8": (b'{"\xff": 1}', NOT_JSON),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), NOT_JSON),
    "nested without end": (b"[" * 100_000, NOT_JSON),
    "metadata is a list": ({"__metadata__": []}, "not a map of strings"),
    "metadata holds a number": ({"__metadata__": {"a": 1}}, "not a map of strings"),
    "a name twice": (b'{"a": 1, "a": 1}', "stands twice"),
    "an entry is a number": ({"a": 1}, ENTRY),
    "an entry is text": ({"a": "U8"}, ENTRY),
    "an entry lacks its offsets": ({"a": {"dtype": "U8", "shape": [2]}}, ENTRY),
    "three offsets": ({"a": entry(data_offsets=[0, 1, 2])}, ENTRY),
    "unknown dtype": ({"a": entry(dtype="F4")}, "unknown dtype"),
    "dtype is a list": ({"a": entry(dtype=["U8"])}, "unknown dtype"),
    "shape is a number": ({"a": entry(shape=2)}, ENTRY),
    "shape is text": ({"a": entry(shape="2")}, RANGE),
    "shape holds true": ({"a": entry(shape=[True, 2])}, RANGE),
    "shape holds a float": ({"a": entry(shape=[2.0])}, RANGE),
    "shape is negative": ({"a": entry(shape=[-2, -1])}, RANGE),
    "a size beyond 63 bits": ({"a": entry(shape=[2**63])}, RANGE),
    "a product beyond 64 bits": ({"a": entry(shape=[2**62, 2**62])}, "2 bytes do not hold"),
    "bytes that do not hold the shape": ({"a": entry(shape=[3])}, "2 bytes do not hold"),
    "a width forgotten": ({"a": entry(dtype="BF16")}, "2 bytes do not hold"),
    "offsets backwards": ({"a": entry(data_offsets=[2, 0])}, "-2 bytes do not hold"),
    "a hole before": ({"a": entry(data_offsets=[1, 3])}, "a hole or an overlap"),
    "an overlap": ({"a": entry(), "b": entry(data_offsets=[1, 3])}, "a hole or an overlap"),
    "a hole between": (
        {"a": entry(shape=[1], data_offsets=[0, 1]), "b": entry(shape=[1], data_offsets=[2, 3])},
        "a hole or an overlap",
    ),
    "bytes of no tensor": ({"a": entry(shape=[1], data_offsets=[0, 1])}, "1 bytes belong to no tensor"),
}


@pytest.mark.parametrize(("header", "says"), HOSTILE.values(), ids=HOSTILE)
def test_a_header_that_lies_is_refused(header, says):
    with pytest.raises(FormatError, match=says):
        container.read_header(file_of(header, b"\0\0"))


def test_a_shape_of_endless_rank_is_refused_without_multiplying_it_out():
    started = time.perf_counter()
    with pytest.raises(FormatError, match="more than 64 dimensions"):
        container.read_header(file_of({"a": entry(shape=[2**62] * 500_000)}, b"\0\0"))
    assert time.perf_counter() - started < 10  # the product alone takes minutes
