"""What the codecs cost on four consecutive steps of a real GRPO run, and that four ways to the last version agree.

The recorded checkpoints are not in this repository; without them these tests are skipped. Sizes are shown by
`pytest tests/test_traces.py --log-cli-level=INFO`.
"""

import logging
from pathlib import Path

import numpy as np
import pytest

from deltawire.format import container, delta_file
from deltawire.weights import kernels
from deltawire.weights.bits import Bits
from deltawire.weights.delta import Delta
from deltawire.weights.digest import digest, moved
from deltawire.weights.tensors import equal

TRACES = sorted((Path(__file__).parents[2] / "shared" / "traces").glob("*/base.safetensors"))
log = logging.getLogger(__name__)
pytestmark = pytest.mark.skipif(
    not TRACES, reason="no recorded checkpoints in ../shared/traces/*/base.safetensors beside this repository"
)


def read(path: Path) -> dict[str, Bits]:
    data = path.read_bytes()
    header = container.read_header(data)
    return {name: container.tensor(data, header, name) for name in header.entries}


@pytest.fixture(scope="module")
def base() -> dict[str, Bits]:
    return read(TRACES[0])


@pytest.fixture(scope="module")
def steps() -> list[Path]:
    return sorted(TRACES[0].parent.glob("step_*.safetensors"))


@pytest.fixture(scope="module")
def deltas(base, steps) -> list[Delta]:
    """Each recorded step decoded by codec raw against the weights before it."""
    chain, current = [], base
    for step in steps:
        chain.append(delta_file.decode(step.read_bytes(), base=current))
        current = current + chain[-1]
    return chain


@pytest.fixture(scope="module")
def last(base, steps) -> dict[str, Bits]:
    """The last version by plain assignment of the recorded values: no delta, no kernel."""
    weights = {name: bits.copy() for name, bits in base.items()}
    for step in steps:
        recorded = read(step)
        for name in (key.removesuffix(".indices") for key in recorded if key.endswith(".indices")):
            where = recorded[f"{name}.indices"].data.view("<i4")
            weights[name].data[where] = recorded[f"{name}.values"].data
    return weights


def sizes(data: bytes) -> tuple[int, int]:
    """Bytes of header and of streams."""
    start = container.read_header(data).data_start
    return start, len(data) - start


def test_gap_takes_at_most_1_42_bytes_per_changed_element_and_is_4_2_times_smaller_than_raw(base, deltas):
    changed = gap_header = gap_streams = raw_streams = 0
    current = base
    for delta in deltas:
        header, streams = sizes(delta_file.encode(delta, codec="gap"))
        raw_streams += sizes(delta_file.encode(delta, codec="raw", base=current))[1]
        gap_header, gap_streams, changed = gap_header + header, gap_streams + streams, changed + delta.changed
        current = current + delta
    per_change, ratio = gap_streams / changed, raw_streams / gap_streams
    elements = sum(bits.data.size for bits in base.values())
    log.info("%d changed elements in %d steps of %d elements", changed, len(deltas), elements)
    log.info("gap streams: %d B, %.3f B a changed element, %.2f times below raw", gap_streams, per_change, ratio)
    log.info("headers beside that: %d B, %.3f B a changed element", gap_header, gap_header / changed)
    assert per_change <= 1.42
    assert ratio >= 4.2


@pytest.mark.parametrize(("codec", "most"), [("subset", 1.29), ("class", 0.92)])
def test_lists_take_a_tenth_less_than_gap_and_with_the_old_weights_a_third(base, deltas, codec, most):
    current, changed, headers, streams = base, 0, 0, 0
    for delta in deltas:
        data = delta_file.encode(delta, codec=codec, base=current)
        assert delta_file.decode(data, base=current) == delta
        header, body = sizes(data)
        frame = container.read_header(data).entries["directory"]
        headers, streams, changed = headers + header + frame.stop, streams + body, changed + delta.changed
        current = current + delta
    log.info("%s: %.3f B a changed element; header and directory %.3f", codec, streams / changed, headers / changed)
    assert streams / changed <= most
    assert headers / changed <= 0.04


def test_every_step_comes_back_from_gap_and_from_raw(base, deltas):
    current = base
    for delta in deltas:
        assert delta_file.decode(delta_file.encode(delta, codec="gap")) == delta
        assert delta_file.decode(delta_file.encode(delta, codec="raw", base=current), base=current) == delta
        current = current + delta


def test_four_deltas_applied_reach_the_weights_and_digests_that_plain_assignment_reaches(base, deltas, last):
    weights = {name: bits.copy() for name, bits in base.items()}
    sums = digest(base)
    for delta in deltas:
        for name, tensor in delta_file.decode(delta_file.encode(delta)).items():
            sums[name] = moved(sums[name], *tensor.apply_(weights[name].data))
    assert equal(weights, last)
    assert sums == digest(last) == {name: kernels.plain.digest_sweep(bits.data) for name, bits in last.items()}


def test_all_four_folded_equal_the_direct_difference_and_undo_back_to_the_base(base, deltas, last):
    folded = sum(deltas[1:], deltas[0])
    assert folded == Delta.between(base, last)
    assert equal(base, last + -folded)
    assert folded.changed < sum(delta.changed for delta in deltas)
    assert all(np.all(np.diff(tensor.sparse()[0]) > 0) for tensor in folded.values())
