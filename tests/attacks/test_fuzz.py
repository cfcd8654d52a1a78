"""Mutations of good files for a while: readers raise typed errors or succeed, whatever comes.

Files are sealed again after mutation, so that the seal does not hide the checks behind it. `DELTAWIRE_FUZZ_SECONDS`
says for how long each of three readers is tried (default 8; `make nightly` sets a minute).
"""

import os
import random
import time
from pathlib import Path

import pytest
from blake3 import blake3
from runs import chain_of_four, commits

from deltawire.errors import DeltaWireError
from deltawire.format import container, delta_file
from deltawire.runlog.heartbeats import Heartbeat
from deltawire.runlog.records import Commit, Derived, Head, Run, read, write
from deltawire.runlog.signing import trust

SECONDS = float(os.environ.get("DELTAWIRE_FUZZ_SECONDS", "8"))
GOLDEN = Path(__file__).parents[1] / "golden"
TOKENS = b'" { [ ] : , -1 0 1e999 NaN null 18446744073709551616 \\u0000 .. /'.split()


def mutate(draw, data):
    """A few edits: bits, slices, tokens, repeats."""
    data = bytearray(data)
    for _ in range(draw.randrange(1, 5)):
        at = draw.randrange(len(data) + 1) if data else 0
        match draw.randrange(5):
            case 0 if data:
                data[at % len(data)] ^= 1 << draw.randrange(8)
            case 1:
                del data[at : at + draw.randrange(1, 9)]
            case 2:
                data[at:at] = draw.choice(TOKENS)
            case 3:
                data[at : at + draw.randrange(1, 5)] = draw.choice(TOKENS)
            case _:
                piece = data[at : at + draw.randrange(1, 64)]
                data[at:at] = piece
    return bytes(data)


def sealed(draw, data):
    """A mutated header or body, its length stated right and its seal right."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    if draw.random() < 0.7:
        header = mutate(draw, header)
    else:
        body = mutate(draw, body)
    file = bytearray(len(header).to_bytes(8, "little") + header + body)
    at = file.find(b'"blake3":"')
    if at >= 0:
        file[at + 10 : at + 74] = b"0" * 64
        file[at + 10 : at + 74] = blake3(file).hexdigest().encode()
    return bytes(file)


def play(seed, make, use):
    """Until time is up; how many inputs were refused and how many accepted."""
    draw, until, counts = random.Random(seed), time.monotonic() + SECONDS, [0, 0]
    while time.monotonic() < until:
        data = make(draw)
        try:
            use(data)
            counts[1] += 1
        except DeltaWireError:
            counts[0] += 1
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} for {data!r}") from error
    return counts


def test_delta_files():
    files = [(GOLDEN / f"{name}.safetensors").read_bytes() for name in ("gap", "dense", "raw")]
    data = (GOLDEN / "raw.base.safetensors").read_bytes()
    header = container.read_header(data)
    base = {name: container.tensor(data, header, name) for name in header.entries}

    def use(data):
        delta_file.read_header(data)
        for tensor in delta_file.decode(data, base=base).values():
            positions, steps = tensor.sparse()
            assert positions.size == steps.size
            assert not positions.size or 0 <= positions[0] <= positions[-1] < tensor.total

    refused, _ = play(1, lambda draw: sealed(draw, draw.choice(files)), use)
    assert refused > 100


@pytest.fixture(scope="module")
def records():
    bucket, _ = chain_of_four()
    last = commits(bucket)[-1]
    head = Head(last.run, last.version, "runs/x/commits/000003.json")
    run = bucket.get(f"runs/{last.run}/run.json", limit=1 << 20)
    fold = Derived(last.run, 3, 0, last.root, last.digests, last.payloads, "0" * 64)
    return [(Run, run), (Commit, write(last)), (Head, write(head)), (Derived, write(fold))]


def test_records(records):
    anyone = trust(["0" * 64])

    def use(pair):
        kind, data = pair
        record = read(kind, data, where="fuzz")
        if kind is not Head:
            anyone.check(data, record.signer, record.signature, where="fuzz")

    def make(draw):
        kind, data = draw.choice(records)
        return kind, mutate(draw, data)

    refused, _ = play(2, make, use)
    assert refused > 100


def test_containers():
    whole = (GOLDEN / "raw.base.safetensors").read_bytes()

    def use(data):
        header = container.read_header(data)
        for name in header.entries:
            container.tensor(data, header, name).data.sum()

    refused, _ = play(3, lambda draw: sealed(draw, whole), use)
    assert refused > 100


def test_heartbeats_are_hints_that_never_stop_a_prune():
    from runs import fresh

    from deltawire.runlog import heartbeats

    bucket, draw = fresh(), random.Random(4)
    heartbeats.beat(bucket, Heartbeat("a", "0" * 16, 3))
    good = bucket.get("replicas/a.json", limit=1 << 16)
    for _ in range(300):
        bucket.put("replicas/b.json", mutate(draw, good))
        assert ("replicas/a.json", 3) in [(stat.key, beat.version) for stat, beat in heartbeats.read_all(bucket)]
