"""Where receivers cut tensors, in a heartbeat: few words for many tensors, and nothing that a stranger's do harm by."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import fresh

from deltawire.follow.status import as_one
from deltawire.live.messages import WorkerStatus
from deltawire.publish.receivers import Receivers
from deltawire.runlog import cuts, heartbeats
from deltawire.runlog.heartbeats import MAX_HEARTBEAT, Heartbeat

CUTS = st.dictionaries(st.sampled_from("abc"), st.tuples(st.integers(0, 64), st.integers(0, 64)))


def test_layers_and_experts_are_one_pattern():
    assert cuts.pattern("model.layers.12.mlp.experts.7.up_proj.weight") == "model.layers.*.mlp.experts.*.up_proj.weight"
    assert cuts.pattern("a1.2b.٣.weight") == "a1.2b.٣.weight"
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight" for layer in range(60) for expert in range(256)
    ]
    found = cuts.said((name, (1024, 0)) for name in names)
    assert found == {"model.layers.*.mlp.experts.*.up_proj.weight": (1024, 0)}
    assert cuts.cut_at(found, names[7]) == (1024, 0)
    assert cuts.cut_at(found, "model.norm.weight") == (0, 0)


def test_tensors_of_one_pattern_that_are_cut_at_several_places_are_cut_so_that_it_suits_all():
    assert cuts.said([("a.0", (12, 0)), ("a.1", (8, 6)), ("a.2", (0, 0)), ("b", (0, 0))]) == {"a.*": (4, 6)}


@given(st.lists(CUTS, max_size=4))
def test_what_suits_all_receivers_divides_each_one_s(receivers):
    found = cuts.merged(receivers)
    for each in receivers:
        for name, cut in each.items():
            assert all(at == 0 or (own and at % own == 0) for at, own in zip(cut, found[name], strict=True))


def test_more_words_than_a_heartbeat_has_are_not_said():
    assert cuts.said((f"n{number}w" * 30, (64, 0)) for number in range(1000)) is None
    most = cuts.said((f"{'n' * 100}{number:04}w", (2**40, 2**40)) for number in range(150))
    bucket = fresh()
    heartbeats.beat(bucket, Heartbeat("a", cuts=dict(most)))
    [stat] = bucket.list("replicas/")
    assert stat.size < MAX_HEARTBEAT
    assert heartbeats.read_all(bucket)[0][1].cuts == most


def test_words_that_json_makes_longer_and_those_of_several_workers_together_count_as_they_are_written():
    assert cuts.said((f"{number}" + "\x01" * 60, (64, 0)) for number in range(200)) is None
    workers = [worker(dict(cuts.said((f"{rank}{'n' * 80}{at:04}w", (64, 0)) for at in range(200)))) for rank in "abc"]
    assert as_one(workers[:1]).cuts == workers[0].cuts
    assert as_one(workers).cuts is None


def worker(own):
    nothing = dict.fromkeys(("attached", "run", "position", "staged", "applied", "error"))
    return WorkerStatus(**nothing, joined=True, staging=False, quarantined=False, cuts=own)


@pytest.mark.parametrize(
    "wrong", [{"w": [-1, 0]}, {"w": [1]}, {"w": [1, 2, 3]}, {"w": 5}, {"w": ["1", 0]}, [["w", 1, 2]], {"w": [0.5, 0]}]
)
def test_a_heartbeat_whose_cuts_are_none_counts_as_none(wrong):
    bucket = fresh()
    bucket.put("replicas/a.json", json.dumps({"replica": "a", "cuts": wrong}).encode())
    assert heartbeats.read_all(bucket) == []
    assert Receivers(bucket, asked=True).heard.cuts == {}
