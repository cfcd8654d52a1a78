"""The driver of the scenarios that run on GPUs (tests/gpu), here on the CPU server of the session."""

import dataclasses

import pytest
from follow_scenario import Load, equals_a_fresh_server, updates_under_load
from servers import START_SECONDS, Server

import deltawire as dw

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2 * START_SECONDS)]
LIGHT = Load(streams=1, updates=2, cadence=0, window=0.3)


def test_updates_under_load_are_bit_for_bit_and_what_they_cost_is_said(server, checkpoint, tmp_path):
    said = []
    served = updates_under_load(server, checkpoint, tmp_path, LIGHT, said.append, device="cpu")
    text = "\n".join(said)
    for words in ("fp32 masters on cpu", "without updates", "vLLM's own pauses of", "with 2 updates", "audit: "):
        assert words in text
    assert text.count("version ") >= 3
    assert text.count("the longest gap") == 2
    other = dataclasses.replace(served, checksums=dict.fromkeys(served.checksums, "0"))
    with pytest.raises(AssertionError):
        equals_a_fresh_server(other, server, said.append)
    assert said[-1].startswith("0 of ")


@pytest.mark.nightly
def test_after_updates_under_load_a_server_equals_one_started_on_its_version(server, checkpoint, tmp_path):
    served = updates_under_load(server, checkpoint, tmp_path, Load(streams=4), print, device="cpu")
    dw.materialize(served.bucket, tmp_path / "full", base=checkpoint)
    fresh = Server(tmp_path / "full", tmp_path / "fresh.log")
    try:
        equals_a_fresh_server(served, fresh.wait(), print)
    finally:
        fresh.stop()
