"""Every one-byte change and every truncation of the golden files is refused; an import without a seal harms nobody."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from deltawire.errors import DeltaWireError, FormatError
from deltawire.format import container, delta_file
from deltawire.weights.bits import Bits

GOLDEN = Path(__file__).parents[1] / "golden"
SEALED = ["gap", "dense", "raw"]
GUARD = 0xA5


def base():
    data = (GOLDEN / "raw.base.safetensors").read_bytes()
    header = container.read_header(data)
    return {name: container.tensor(data, header, name) for name in header.entries}


def read(data):
    delta_file.read_header(data)
    return delta_file.decode(data, base=base() if b'"codec":"raw"' in data else None)


@pytest.mark.parametrize("name", SEALED)
@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80, 0xFF])
def test_every_flipped_byte_is_refused(name, mask):
    data = (GOLDEN / f"{name}.safetensors").read_bytes()
    weights = base()
    for at in range(len(data)):
        damaged = data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]
        with pytest.raises(FormatError):
            delta_file.decode(damaged, base=weights)


@pytest.mark.parametrize("name", SEALED)
def test_every_truncation_is_refused(name):
    data = (GOLDEN / f"{name}.safetensors").read_bytes()
    weights = base()
    for length in range(len(data)):
        with pytest.raises(FormatError):
            delta_file.decode(data[:length], base=weights)


def imported():
    """A file in the layout of TRL's post, which has no seal."""
    streams = {
        "w.indices": Bits("I32", (3,), np.array([0, 5, 9], np.uint32)),
        "w.values": Bits("BF16", (3,), np.array([1, 2, 3], np.uint16)),
    }
    return bytes(container.write(streams, {}))


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_a_damaged_import_is_refused_or_stays_within_bounds(mask):
    data = imported()
    memory = np.full(30, GUARD * 0x101, np.uint16)
    weights = {"w": Bits("BF16", (10,), memory[10:20])}
    accepted = 0
    for at in range(len(data)):
        for damaged in (data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :], data[:at]):
            memory[10:20] = 0
            try:
                delta = delta_file.decode(damaged, base=weights)
                delta.apply_(weights)
                accepted += 1
            except DeltaWireError:
                continue
            finally:
                assert (memory[:10] == GUARD * 0x101).all()
                assert (memory[20:] == GUARD * 0x101).all()
    assert accepted  # values carry no seal: this is why our own files do


def test_refusing_a_file_takes_little_memory_whatever_it_claims():
    data = (GOLDEN / "gap.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    lies = [
        (2**63 - 1).to_bytes(8, "little") + data[8:],
        (1 << 40).to_bytes(8, "little") + data[8:],
        (length + 1).to_bytes(8, "little") + data[8:],
        (2).to_bytes(8, "little") + b"{}",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
        (400_000).to_bytes(8, "little") + b'{"a":' * 80_000,
        (24).to_bytes(8, "little") + b'{"__metadata__":{"a":NaN',
    ]
    tracemalloc.start()
    try:
        for lie in lies:
            with pytest.raises(FormatError):
                delta_file.decode(lie)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
