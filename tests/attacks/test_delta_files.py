"""Delta files made to mislead: damage is told from forgery, a right seal buys no trust, a lie about size no memory."""

import json
import tracemalloc

import numpy as np
import pytest
import reference
from blake3 import blake3
from small_delta import DELTA, OLD

from deltawire.errors import BadDigest, FormatError, TooLarge, UnknownVersion
from deltawire.format import container, delta_file
from deltawire.format.codecs.base import compress
from deltawire.weights.bits import Bits
from deltawire.weights.delta import Delta


def test_a_damaged_delta_never_passes_for_an_import_without_a_seal():
    data = delta_file.encode(DELTA, codec="raw", base=OLD)
    with pytest.raises(FormatError, match="its format is not 'deltawire-delta'"):
        delta_file.decode(data.replace(b"deltawire-delta", b"deltawire-dElta"), base=OLD)


def test_an_altered_byte_is_reported_as_damage():
    data = bytearray(delta_file.encode(DELTA, codec="gap"))
    data[-1] ^= 1
    with pytest.raises(BadDigest, match="damaged or altered"):
        delta_file.decode(bytes(data))


@pytest.mark.parametrize(("field", "value"), [("version", "2"), ("version", "01"), ("codec", "class"), ("codec", None)])
def test_another_format_version_or_codec_is_named(field, value):
    with pytest.raises(UnknownVersion, match=repr(value)):
        delta_file.decode(forged(metadata={field: value}))


@pytest.mark.parametrize("stated", ["", "0" * 64, "A" * 64, "0" * 63, "\ud800" * 64])
def test_a_seal_that_is_not_one_is_refused(stated):
    data = delta_file.encode(DELTA, codec="gap")
    text = json.dumps(stated)[1:-1].encode() if stated.isascii() else b"\\ud800" * 64
    header, _ = reference.container(data)
    length = int.from_bytes(data[:8], "little")
    changed = data[8 : 8 + length].replace(header["__metadata__"]["blake3"].encode(), text)
    with pytest.raises(FormatError, match=r"blake3|damaged"):
        delta_file.decode(len(changed).to_bytes(8, "little") + changed + data[8 + length :])


def forged(
    *,
    metadata: dict[str, str | None] | None = None,
    facts: object = None,
    streams: dict[str, Bits] | None = None,
) -> bytes:
    """A file with a right seal and any content, as an attacker would make it."""
    good = reference.container(delta_file.encode(DELTA, codec="gap"))[0]["__metadata__"]
    fields = {**good, "blake3": "0" * 64, **(metadata or {})}
    if facts is not None:
        fields["tensors"] = json.dumps(facts)
    if streams is None:
        data = delta_file.encode(DELTA, codec="gap")
        box = container.read_header(data)
        streams = {name: container.tensor(data, box, name) for name in box.entries}
    file = container.write(streams, {key: value for key, value in fields.items() if value is not None})
    if (at := file.find(b'"blake3":"' + b"0" * 64)) >= 0:
        file[at + 10 : at + 74] = blake3(file).hexdigest().encode()
    return bytes(file)


def stream(*data: int) -> Bits:
    part = compress(np.array(data, np.uint8))
    return Bits("U8", part.shape, part)


A, B = ["a", "BF16", [100, 3], 3, "gap"], ["b", "F32", [8], 8, "dense"]
GAPS = {"a.gaps": stream(0, 8, 255, 34), "a.steps": stream(2, 2, 2)}


def test_the_forger_forges_well():
    assert delta_file.decode(forged()) == DELTA
    assert delta_file.decode(forged(facts=[A], streams=GAPS)) == Delta({"a": DELTA["a"]})


FORGED = {
    "range is missing": {"metadata": {"range": None}},
    "range is not JSON": {"metadata": {"range": "["}},
    "range is a number": {"metadata": {"range": "7"}},
    "range has two entries": {"metadata": {"range": "[null,1]"}},
    "parent is negative": {"metadata": {"range": '["r",-1,2]'}},
    "version is true": {"metadata": {"range": '["r",1,true]'}},
    "version is a float": {"metadata": {"range": '["r",1,2.0]'}},
    "run is a number": {"metadata": {"range": "[7,1,2]"}},
    "tensors is missing": {"metadata": {"tensors": None}},
    "tensors nests without end": {"metadata": {"tensors": "[" * 100_000}},
    "tensors is a map": {"facts": {"a": A, "b": B}},
    "a fact is a number": {"facts": [7, B]},
    "a fact is too short": {"facts": [A[:4], B]},
    "a name is a number": {"facts": [[7, *A[1:]], B]},
    "a name is a list": {"facts": [[["a"], *A[1:]], B]},
    "a dtype is a list": {"facts": [["a", ["BF16"], *A[2:]], B]},
    "a dtype is unknown": {"facts": [["a", "F4", *A[2:]], B]},
    "a shape is a number": {"facts": [["a", "BF16", 300, *A[3:]], B]},
    "a shape is text": {"facts": [["a", "BF16", "300", *A[3:]], B]},
    "a shape is negative": {"facts": [["a", "BF16", [-100, -3], *A[3:]], B]},
    "a shape of endless rank": {"facts": [["a", "BF16", [2**47] * 300_000, *A[3:]], B]},
    "more elements than there can be": {"facts": [["a", "BF16", [2**30, 2**30], *A[3:]], B]},
    "no change": {"facts": [[*A[:3], 0, "gap"], B]},
    "more changes than elements": {"facts": [[*A[:3], 301, "gap"], B]},
    "a count that is true": {"facts": [[*A[:3], True, "gap"], B]},
    "fewer changes than the streams hold": {"facts": [[*A[:3], 2, "gap"], B]},
    "more changes than the streams hold": {"facts": [[*A[:3], 4, "gap"], B]},
    "fewer dense changes than there are": {"facts": [A, [*B[:3], 7, "dense"]]},
    "an unknown encoding": {"facts": [[*A[:4], "class"], B]},
    "an encoding that is a list": {"facts": [[*A[:4], ["gap"]], B]},
    "an encoding of another codec": {
        "facts": [["a", "BF16", [300], 1, "raw"]],
        "streams": {
            "a.indices": Bits("I32", (1,), np.zeros(1, np.uint32)),
            "a.values": Bits("BF16", (1,), np.zeros(1, np.uint16)),
        },
    },
    "the wrong encoding": {"facts": [[*A[:4], "dense"], B]},
    "a tensor twice": {"facts": [A, A, B]},
    "a tensor without streams": {"facts": [A, B, ["c", *B[1:]]]},
    "streams of no tensor": {"facts": [A]},
    "tensors out of order": {"facts": [B, A]},
    "streams out of order": {"facts": [A], "streams": dict(reversed(GAPS.items()))},
    "a stream that is not bytes": {
        "facts": [A],
        "streams": {**GAPS, "a.steps": Bits("I8", GAPS["a.steps"].shape, GAPS["a.steps"].data)},
    },
    "a stream of rank 2": {
        "facts": [A],
        "streams": {**GAPS, "a.steps": Bits("U8", (1, *GAPS["a.steps"].shape), GAPS["a.steps"].data)},
    },
    "a position out of range": {"facts": [A], "streams": {**GAPS, "a.gaps": stream(0, 8, 255, 35)}},
}


@pytest.mark.parametrize("lie", FORGED.values(), ids=FORGED)
def test_a_well_sealed_file_that_lies_is_refused(lie):
    with pytest.raises(FormatError):
        delta_file.decode(forged(**lie))
    with pytest.raises(FormatError):
        delta_file.decode(forged(**lie), base=OLD)


RAW_A = ["a", "BF16", [100, 3], 2, "raw"]
FORGED_RAW = {
    "unsorted": ("I32", [9, 0], 2, "BF16"),
    "doubled": ("I32", [9, 9], 2, "BF16"),
    "beyond the end": ("I32", [0, 300], 2, "BF16"),
    "negative": ("I32", [-1, 3], 2, "BF16"),
    "of another length": ("I32", [0, 1, 2], 2, "BF16"),
    "of unsigned type": ("U32", [0, 9], 2, "BF16"),
    "with values of another dtype": ("I32", [0, 9], 2, "F16"),
    "with values of another length": ("I32", [0, 9], 3, "BF16"),
}


@pytest.mark.parametrize(("index", "indices", "values", "dtype"), FORGED_RAW.values(), ids=FORGED_RAW)
def test_well_sealed_absolute_values_with_indices_that_lie_are_refused(index, indices, values, dtype):
    streams = {
        "a.indices": Bits(index, (len(indices),), np.array(indices, np.int32).view(np.uint32)),
        "a.values": Bits(dtype, (values,), np.zeros(values, np.uint16)),
    }
    with pytest.raises(FormatError):
        delta_file.decode(forged(metadata={"codec": "raw"}, facts=[RAW_A], streams=streams), base=OLD)


@pytest.mark.parametrize("changed", [2**32, 2**47])
def test_a_huge_count_is_refused_without_spending_memory(changed):
    data = forged(facts=[["a", "BF16", [2**47], changed, "gap"]], streams=GAPS)
    tracemalloc.start()
    with pytest.raises(FormatError):
        delta_file.decode(data)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_header_that_claims_to_be_endless_is_refused_before_it_is_read():
    with pytest.raises(TooLarge):
        delta_file.decode((65 << 20).to_bytes(8, "little") + b"{}")
