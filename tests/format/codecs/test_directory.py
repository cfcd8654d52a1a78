"""The directory of a delta file comes back, names and shapes cost few bytes, and what no writer writes is refused."""

import tracemalloc

import numpy as np
import pytest
import zstandard

from deltawire.errors import FormatError, TooLarge
from deltawire.format import container, delta_file
from deltawire.format.codecs import directory
from deltawire.format.codecs.base import compress
from deltawire.format.codecs.directory import Listed
from deltawire.format.codecs.lists import ClassLists
from deltawire.format.codecs.subset import NOTHING, TileEntry
from deltawire.weights.bits import Bits
from deltawire.weights.delta import Delta, TensorDelta
from deltawire.weights.table import TensorSpec

LISTED = [
    Listed(TensorSpec("a.w", "BF16", (30, 10), 5), "class", (20, 10), (
        TileEntry(3, 7, (ClassLists(2, 3, 1, 0, True, (2, 2, 1)), ClassLists(15, 2, 2, 4, False, ()))), NOTHING,
    )),
    Listed(TensorSpec("b.ω", "F32", (), 1), "dense", (0, 0), (TileEntry(20, 0, ()),)),
    Listed(TensorSpec("c", "U8", (9,), 2), "subset", (1, 9), (
        TileEntry(2, 0, (ClassLists(0, 2, 2, 1, False, (1,)),)),
    )),
]  # fmt: skip


def read(content: bytes, codec: str = "class", payload: int = 25) -> list[Listed]:
    return directory.read(compress(np.frombuffer(content, np.uint8)), codec=codec, payload=payload)


def plain(listed: list[Listed]) -> list:
    return [
        (
            tensor.spec,
            tensor.encoding,
            tensor.tile,
            [(entry.nbytes, entry.dead, entry.lists) for entry in tensor.entries],
        )
        for tensor in listed
    ]


CONTENT = zstandard.decompress(directory.write(LISTED).tobytes())


def test_a_directory_comes_back():
    found = directory.read(directory.write(LISTED[:1] + LISTED[2:]), codec="class", payload=5)
    assert plain(found) == plain(LISTED[:1] + LISTED[2:])
    assert [tensor.spec.changed for tensor in found] == [5, 2]
    assert found[0].entries[1] is NOTHING


def test_every_truncation_is_refused():
    for length in range(len(CONTENT)):
        with pytest.raises(FormatError):
            read(CONTENT[:length])


def test_every_changed_byte_is_refused_or_another_directory_in_bounds():
    damaged = bytearray(CONTENT)
    for at in range(len(CONTENT)):
        for value in (0, 1, 0x7F, 0x80, 0xFF, CONTENT[at] ^ 1, CONTENT[at] + 1 & 255):
            damaged[at] = value
            try:
                found = read(bytes(damaged))
            except FormatError:
                continue
            assert sum(tensor.nbytes for tensor in found) == 25
            for tensor in found:
                assert 0 < tensor.spec.changed <= max(tensor.spec.total, 8 * tensor.nbytes)
        damaged[at] = CONTENT[at]


def one(*entry: int, dtype: int = 1, encoding: int = 1, dims: tuple[int, ...] = (1, 9), tile: tuple = (1, 9)) -> bytes:
    """The content of a directory of one tensor `c`, U8 [9] unless said otherwise."""
    return bytes([1, 1, ord("c"), dtype, encoding, *dims, *tile, *entry])


GOOD = (2, 0, 1, 0, 1, 2, 1, 0)
WRONG = {
    "a dtype that is not there": one(*GOOD, dtype=16),
    "an encoding that is not there": one(*GOOD, encoding=3),
    "classes of a dtype that has none": one(*GOOD, encoding=2),
    "more than 64 dimensions": one(*GOOD, dims=(65, *[1] * 65)),
    "a shape without elements": one(*GOOD, dims=(2, 0, 9)),
    "2^48 elements": one(*GOOD, dims=(2, *[0x80] * 6, 0x40, 1)),
    "a number of nine bytes": one(*GOOD, dims=(1, *[0x80] * 8, 1)),
    "a number not in its shortest form": one(*GOOD, dims=(1, 0x89, 0)),
    "tiles without rows": one(*GOOD, tile=(0, 9)),
    "tiles wider than the tensor": one(*GOOD, tile=(1, 10)),
    "all rows dead": one(2, 1, 1, 0, 1, 2, 1, 0),
    "no class": one(2, 0, 0, 0),
    "a second class of one": one(2, 0, 2, 0, 1, 2, 1, 0),
    "k beyond its bound": one(2, 0, 1, 0, 48, 2, 1, 0),
    "no change in a class": one(2, 0, 1, 0, 1, 0),
    "more changes than elements": one(2, 0, 1, 0, 1, 10, 0),
    "more changes and unchanged than elements": one(2, 0, 1, 0, 0x81, 6, 4, 0),
    "as many unchanged as changes": one(2, 0, 1, 0, 0x81, 4, 4, 0),
    "a rung wider than the changes": one(2, 0, 1, 0, 1, 2, 3, 0),
    "a rung wider than the one below": one(2, 0, 1, 0, 1, 4, 2, 3, 0),
    "more bits than the payload has": one(1, 0, 1, 0, 0, 9, 0),
    "a tile longer than the payload": one(3, 0, 1, 0, 1, 2, 1, 0),
    "bytes of the payload that no tile has": one(1, 0, 1, 0, 1, 2, 1, 0),
    "a tensor in which nothing changes": one(0),
    "bytes behind the last entry": one(*GOOD, 0),
    "more tensors than bytes of the payload": bytes([3, 1, ord("a"), 1, ord("b")]) + one(*GOOD)[1:],
    "names out of order": bytes([2, 1, ord("d"), 1, ord("c")]) + one(*GOOD)[3:8] * 2 + bytes([*GOOD, *GOOD]),
    "a name that is not UTF-8": b"\x01\x01\xff" + one(*GOOD)[3:],
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG)
def test_what_no_writer_writes_is_refused(content):
    assert read(one(*GOOD), payload=2)[0].spec.changed == 2
    with pytest.raises(FormatError):
        read(content, payload=2)


def test_classes_in_a_file_without_them_are_refused():
    content = bytes([1, 1, ord("c"), 9, 2, 1, 9, 1, 9, *GOOD])
    assert read(content, payload=2)[0].encoding == "class"
    with pytest.raises(FormatError, match="codec 'subset'"):
        read(content, codec="subset", payload=2)


def test_tiles_without_end_cost_no_memory():
    numbers = bytes([*[0x80] * 6, 1])
    content = bytes([1, 1, ord("c"), 1, 1, 1, *numbers[1:], 1, 1]) + bytes(1 << 20)
    packed = compress(np.frombuffer(content, np.uint8))
    tracemalloc.start()
    with pytest.raises(FormatError, match="tiles in a file"):
        directory.read(packed, codec="subset", payload=2)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_a_directory_that_no_reader_takes_is_not_written(monkeypatch):
    for limit, most in (("MAX_TILES", 3), ("MAX_DIRECTORY", len(CONTENT))):
        monkeypatch.setattr(directory, limit, most)
        assert directory.write(LISTED).size
        monkeypatch.setattr(directory, limit, most - 1)
        with pytest.raises(TooLarge, match="for one file"):
            directory.write(LISTED)
        monkeypatch.undo()


def test_names_without_end_cost_neither_time_nor_memory():
    packed = compress(np.frombuffer(bytes([*[0xFF] * 3, 0x1F]) + bytes(directory.MAX_DIRECTORY - 4), np.uint8))
    assert packed.size < 100_000
    with pytest.raises(FormatError, match=r"67,108,863 in the directory, where at most 100,000 can be"):
        directory.read(packed, codec="subset", payload=100_000)


def test_a_frame_that_claims_a_gigabyte_is_refused_before_memory_is_spent_on_it():
    frame = zstandard.ZstdCompressor().compress(bytes(1 << 20))
    lying = frame[:4] + b"\xa0" + (1 << 30).to_bytes(4, "little") + frame[9:]
    tracemalloc.start()
    with pytest.raises(TooLarge, match="directory: 1,073,741,824 bytes where at most"):
        directory.read(np.frombuffer(lying, np.uint8), codec="subset", payload=2)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_names_and_shapes_of_a_model_cost_a_few_bytes_a_tensor():
    kinds = (
        "mlp.down_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
    )
    names = [f"model.layers.{layer}.{kind}.weight" for layer in range(30) for kind in kinds]
    step = np.ones(1, np.uint16)
    delta = Delta({name: TensorDelta("BF16", (576, 1536), np.array([9]), step) for name in names})
    sizes = {codec: len(delta_file.encode(delta, codec=codec)) for codec in ("gap", "subset")}
    header = container.read_header(delta_file.encode(delta, codec="subset"))
    assert header.data_start < 400
    assert sizes["subset"] < 10 * len(names) < sizes["gap"] / 20


def test_another_version_of_the_format_is_refused_by_name():
    delta = Delta({"w": TensorDelta("U8", (9,), np.array([3]), np.ones(1, np.uint8))})
    data = delta_file.encode(delta, codec="subset")
    for old, new in ((b'"version":"2"', b'"version":"1"'), (b'"version":"2"', b'"version":"3"')):
        with pytest.raises(FormatError, match="this deltawire reads version 1 with codecs gap and raw, version 2 with"):
            delta_file.decode(data.replace(old, new))


def test_streams_other_than_a_directory_and_a_payload_are_refused():
    entry = Bits("U8", (2,), np.zeros(2, np.uint8))
    metadata = {
        "format": "deltawire-delta",
        "version": "2",
        "codec": "subset",
        "blake3": "0" * 64,
        "range": "[null,null,null]",
    }
    for names in (("directory",), ("payload", "directory"), ("directory", "payload", "more")):
        data = delta_file._seal(container.write(dict.fromkeys(names, entry), metadata))
        with pytest.raises(FormatError, match="not a directory and a payload"):
            delta_file.read_header(data)
