"""The committed delta files of format version 1 stay readable, and what they hold is what is written beside them."""

import json
from pathlib import Path

import pytest
import reference

from deltawire.errors import FormatError
from deltawire.format import container, delta_file
from deltawire.weights.bits import Bits
from deltawire.weights.delta import Delta

GOLDEN = Path(__file__).parent
NAMES = sorted(path.stem for path in GOLDEN.glob("*.json"))


def load(name: str) -> tuple[bytes, dict[str, Bits] | None, dict]:
    """A golden file, the weights before it where its codec needs them, and what it decodes to."""
    path = GOLDEN / f"{name}.base.safetensors"
    base = None
    if path.exists():
        data = path.read_bytes()
        header = container.read_header(data)
        base = {key: container.tensor(data, header, key) for key in header.entries}
    return (GOLDEN / f"{name}.safetensors").read_bytes(), base, json.loads((GOLDEN / f"{name}.json").read_text())


def spelled_out(delta: Delta) -> dict:
    return {
        name: {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "steps": {str(i): int(step) for i, step in zip(*tensor.sparse(), strict=True)},
        }
        for name, tensor in delta.items()
    }


def test_every_codec_and_encoding_has_a_golden_file():
    assert {(load(name)[2]["codec"], load(name)[2]["encoding"]) for name in NAMES} == {
        (codec, encoding) for codec, encodings in delta_file.ENCODINGS.items() for encoding in encodings
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_file_decodes_to_what_is_written_beside_it(name):
    data, base, expected = load(name)
    header = delta_file.read_header(data)
    assert (header.codec, [header.run, header.parent, header.version]) == (expected["codec"], expected["range"])
    assert set(header.encodings) == {expected["encoding"]}
    assert header.sealed
    assert spelled_out(delta_file.decode(data, base=base)) == expected["tensors"]


@pytest.mark.parametrize("name", NAMES)
def test_a_second_reader_written_from_the_specification_finds_the_same(name):
    data, base, expected = load(name)
    found = reference.delta(data, {key: bits.data.tolist() for key, bits in (base or {}).items()})
    assert expected["tensors"] == {
        key: {"dtype": dtype, "shape": shape, "steps": {str(i): step for i, step in steps.items()}}
        for key, (dtype, shape, steps) in found.items()
    }
    assert reference.seal(data) == reference.container(data)[0]["__metadata__"]["blake3"]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_golden_file_holds_is_encoded_the_same_way_today(name):
    data, base, expected = load(name)
    delta = delta_file.decode(data, base=base)
    run, parent, version = expected["range"]
    today = delta_file.encode(delta, codec=expected["codec"], base=base, run=run, parent=parent, version=version)
    if expected["codec"] == "raw":
        assert today == data  # no compressor in it whose version could change the bytes
    assert spelled_out(delta_file.decode(today, base=base)) == expected["tensors"]
    assert delta_file.read_header(today).encodings == delta_file.read_header(data).encodings
    assert len(today) <= len(data) * 1.05


@pytest.mark.parametrize("name", NAMES)
def test_every_truncation_of_a_golden_file_is_refused(name):
    data, base, _ = load(name)
    for length in range(len(data)):
        with pytest.raises(FormatError):
            delta_file.decode(data[:length], base=base)
    with pytest.raises(FormatError):
        delta_file.decode(data + b"\0", base=base)


@pytest.mark.parametrize("name", NAMES)
def test_every_flipped_bit_of_a_golden_file_is_refused(name):
    data, base, _ = load(name)
    damaged = bytearray(data)
    for at in range(len(data)):
        for flip in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            damaged[at] ^= flip
            with pytest.raises(FormatError):
                delta_file.decode(bytes(damaged), base=base)
            damaged[at] ^= flip


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_file_cites_sections_the_specification_has(name):
    text = (GOLDEN.parents[1] / "docs" / "FORMAT.md").read_text()
    headings = {line.split(" ")[1] for line in text.splitlines() if line.startswith("#") and "§" in line}
    cites = {cite.removeprefix("docs/FORMAT.md ") for cite in load(name)[2]["cites"]}
    assert cites
    assert cites <= headings
