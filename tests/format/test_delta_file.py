"""A delta as one file: it comes back bit for bit, equal input gives equal bytes, and TRL's layout is read too."""

import tracemalloc

import numpy as np
import pytest
import reference
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from small_delta import DELTA, NEW, OLD
from strategies import every_dtype_far_apart, versions

from deltawire.errors import (
    DtypeMismatch,
    FormatError,
    NeedsBase,
    ShapeMismatch,
    UnknownTensor,
    UnknownVersion,
)
from deltawire.format import delta_file
from deltawire.weights.bits import Bits
from deltawire.weights.delta import Delta
from deltawire.weights.tensors import as_torch, equal

codecs = st.sampled_from(delta_file.CODECS)


@given(versions(2), codecs)
def test_a_delta_comes_back_from_its_file(chain, codec):
    old, new = chain
    delta = Delta.between(old, new)
    back = delta_file.decode(delta_file.encode(delta, codec=codec, base=old), base=old)
    assert back == delta
    assert equal(new, old + back)


@given(versions(2), codecs)
def test_torch_weights_go_through_a_file_bit_for_bit(chain, codec):
    old, new = ({name: as_torch(bits) for name, bits in weights.items()} for weights in chain)
    back = delta_file.decode(delta_file.encode(Delta.between(old, new), codec=codec, base=old), base=old)
    assert equal(new, old + back)


@pytest.mark.parametrize("codec", delta_file.CODECS)
def test_every_dtype_survives_gaps_of_more_than_65535(codec):
    old, new = every_dtype_far_apart()
    back = delta_file.decode(delta_file.encode(Delta.between(old, new), codec=codec, base=old), base=old)
    assert equal(new, old + back)


@given(versions(2), codecs)
def test_a_second_reader_written_from_the_specification_finds_the_same_change(chain, codec):
    old, new = chain
    delta = Delta.between(old, new)
    data = delta_file.encode(delta, codec=codec, base=old)
    found = reference.delta(data, {name: bits.data.tolist() for name, bits in old.items()})
    assert found.keys() == delta.keys()
    for name, (dtype, shape, steps) in found.items():
        assert (dtype, shape) == (delta[name].dtype, list(delta[name].shape))
        assert steps == dict(zip(*(part.tolist() for part in delta[name].sparse()), strict=True))
    assert reference.seal(data) == reference.container(data)[0]["__metadata__"]["blake3"]


@given(versions(2), codecs)
def test_equal_input_gives_equal_bytes_whatever_order_it_comes_in(chain, codec):
    old, new = chain
    delta = Delta.between(old, new)
    backwards = Delta({name: delta[name] for name in reversed(list(delta))})
    assert delta_file.encode(delta, codec=codec, base=old) == delta_file.encode(backwards, codec=codec, base=dict(old))


def test_the_header_says_what_is_in_the_file_without_decoding_it():
    header = delta_file.read_header(delta_file.encode(DELTA, run="r1", parent=41, version=44))
    assert (header.codec, header.run, header.parent, header.version) == ("subset", "r1", 41, 44)
    assert [(t.name, t.dtype, t.shape, t.changed, t.total) for t in header.tensors] == [
        ("a", "BF16", (100, 3), 3, 300),
        ("b", "F32", (8,), 8, 8),
    ]
    assert header.encodings == ("subset", "subset")
    assert header.sealed


def test_a_file_without_changes_is_a_file():
    header = delta_file.read_header(delta_file.encode(Delta()))
    assert (header.tensors, header.run, header.parent, header.version) == ((), None, None, None)
    assert delta_file.decode(delta_file.encode(Delta())) == Delta()


@pytest.mark.parametrize("codec", ["gap", "subset"])
def test_a_tensor_that_changed_everywhere_is_dense_and_one_that_barely_changed_is_not(codec):
    rng = np.random.default_rng(0)
    old = {"w": Bits("BF16", (10_000,), np.zeros(10_000, np.uint16))}
    sizes = {}
    for share, encoding in ((0.001, codec), (0.1, codec), (1.0, "dense")):
        new = {"w": old["w"].copy()}
        new["w"].data[rng.random(10_000) < share] += 1
        data = delta_file.encode(Delta.between(old, new), codec=codec)
        assert delta_file.read_header(data).encodings == (encoding,)
        sizes[share] = len(data)
    assert sizes[1.0] < sizes[0.1]


def test_safe_open_shows_a_delta_file(tmp_path):
    (tmp_path / "delta.safetensors").write_bytes(delta_file.encode(DELTA, codec="raw", base=OLD))
    with safe_open(tmp_path / "delta.safetensors", "pt") as file:
        assert file.metadata()["format"] == "deltawire-delta"
        assert file.get_tensor("a.indices").tolist() == [0, 9, 299]
        assert equal({"a": file.get_tensor("a.values")}, {"a": Bits("BF16", (3,), NEW["a"].data[[0, 9, 299]])})


def test_an_unknown_codec_is_refused_with_those_there_are():
    with pytest.raises(UnknownVersion, match=f"'zip' is not known; choose from {', '.join(delta_file.CODECS)}"):
        delta_file.encode(DELTA, codec="zip")


def test_absolute_values_need_the_weights_before_them_both_ways():
    with pytest.raises(NeedsBase, match="base="):
        delta_file.encode(DELTA, codec="raw")
    with pytest.raises(NeedsBase, match="base="):
        delta_file.decode(delta_file.encode(DELTA, codec="raw", base=OLD))
    assert delta_file.read_header(delta_file.encode(DELTA, codec="raw", base=OLD)).codec == "raw"


@pytest.mark.parametrize(
    ("base", "error"),
    [
        ({"b": OLD["b"]}, UnknownTensor),
        ({**OLD, "a": Bits("BF16", (300,), OLD["a"].data)}, ShapeMismatch),
        ({**OLD, "a": Bits("F16", (100, 3), OLD["a"].data)}, DtypeMismatch),
        ({**OLD, "a": Bits("BF16", (2,), OLD["a"].data[:2])}, ShapeMismatch),
    ],
)
def test_weights_that_are_not_those_before_the_delta_are_refused_both_ways(base, error):
    with pytest.raises(error, match="a"):
        delta_file.encode(DELTA, codec="raw", base=base)
    with pytest.raises(error, match="a"):
        delta_file.decode(delta_file.encode(DELTA, codec="raw", base=OLD), base=base)


def trl_file(path, tensors: dict[str, torch.Tensor]) -> bytes:
    safetensors.torch.save_file(tensors, path, {"sparse": "True", "model_version": "1", "changed_params": '["a"]'})
    return path.read_bytes()


def pair(indices: object, values: object, name: str = "a") -> dict[str, torch.Tensor]:
    return {f"{name}.indices": indices, f"{name}.values": values}


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_a_file_in_the_layout_of_trls_post_decodes_against_base_and_encodes_to_gap(tmp_path, index):
    positions = torch.tensor([0, 9, 299], dtype=index)
    tensors = pair(positions, as_torch(NEW["a"]).reshape(-1)[positions.long()])
    data = trl_file(tmp_path / "step.safetensors", tensors)
    header = delta_file.read_header(data)
    assert (header.codec, header.run, header.parent, header.version) == ("raw", None, None, None)
    assert not header.sealed
    with pytest.raises(NeedsBase):
        delta_file.decode(data)
    delta = delta_file.decode(data, base=OLD)
    assert delta == Delta({"a": DELTA["a"]})
    assert delta_file.decode(delta_file.encode(delta)) == delta


TRL_HOSTILE = {
    "unsorted": pair(torch.tensor([1, 0], dtype=torch.int32), torch.zeros(2, dtype=torch.bfloat16)),
    "doubled": pair(torch.tensor([1, 1], dtype=torch.int32), torch.zeros(2, dtype=torch.bfloat16)),
    "out of range": pair(torch.tensor([300], dtype=torch.int32), torch.zeros(1, dtype=torch.bfloat16)),
    "negative": pair(torch.tensor([-1], dtype=torch.int32), torch.zeros(1, dtype=torch.bfloat16)),
    "fewer values": pair(torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.bfloat16)),
    "float indices": pair(torch.tensor([0.0]), torch.zeros(1, dtype=torch.bfloat16)),
    "unsigned indices": pair(torch.tensor([0], dtype=torch.uint8), torch.zeros(1, dtype=torch.bfloat16)),
    "indices of rank 2": pair(torch.zeros((1, 1), dtype=torch.int32), torch.zeros((1, 1), dtype=torch.bfloat16)),
    "values without indices": {"a.values": torch.zeros(1)},
    "a third tensor": {**pair(torch.zeros(1, dtype=torch.int32), torch.zeros(1)), "b": torch.zeros(1)},
    "a checkpoint": {"a": torch.zeros(300, dtype=torch.bfloat16)},
    "nothing": {},
}


@pytest.mark.parametrize("tensors", TRL_HOSTILE.values(), ids=TRL_HOSTILE)
def test_a_file_that_is_nearly_in_that_layout_is_refused(tmp_path, tensors):
    with pytest.raises(FormatError):
        delta_file.decode(trl_file(tmp_path / "step.safetensors", tensors), base=OLD)


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        (pair(torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.float16)), DtypeMismatch),
        (pair(torch.zeros(1, dtype=torch.int32), torch.zeros(1), "c"), UnknownTensor),
    ],
)
def test_an_import_that_is_not_of_base_says_so(tmp_path, tensors, error):
    with pytest.raises(error):
        delta_file.decode(trl_file(tmp_path / "step.safetensors", tensors), base=OLD)


def test_reading_a_delta_costs_memory_for_one_delta():
    rng = np.random.default_rng(0)
    old = {f"w{i}": Bits("BF16", (1 << 20,), rng.integers(0, 1 << 16, 1 << 20, np.uint16)) for i in range(8)}
    new = {name: bits.copy() for name, bits in old.items()}
    for bits in new.values():
        bits.data[rng.choice(1 << 20, 10_000, replace=False)] += 1
    delta = Delta.between(old, new)
    data = delta_file.encode(delta)
    assert delta_file.decode(data) == delta
    tracemalloc.start()
    back = delta_file.decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert back.nbytes == delta.nbytes == 8 * 10_000 * 10
    assert peak < delta.nbytes + 2 * delta.nbytes / 8
