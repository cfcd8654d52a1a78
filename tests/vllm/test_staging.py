"""Staging compares everything before anything is written; applying it puts all back when a write fails."""

import secrets

import pytest
import torch
from torch import nn

import deltawire as dw
from deltawire.errors import BadDigest, WrongBase
from deltawire.subscriber import Subscriber
from deltawire.vllm import staging
from deltawire.vllm.live import LiveWeights


class Fused(nn.Module):
    """A server's model: two checkpoint matrices in one parameter, and a vector."""

    def __init__(self, weights):
        super().__init__()
        self.ab = nn.Parameter(torch.cat([weights["a"], weights["b"]]).bfloat16(), requires_grad=False)
        self.v = nn.Parameter(weights["v"].bfloat16(), requires_grad=False)

    def load_weights(self, weights):
        for name, tensor in weights:
            if name == "v":
                self.v.data.copy_(tensor)
            else:
                self.ab.data.narrow(0, 0 if name == "a" else 8, 8).copy_(tensor)

    def served(self):
        return {"a": self.ab[:8].clone(), "b": self.ab[8:].clone(), "v": self.v.clone()}


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return {"a": torch.randn(8, 100), "b": torch.randn(8, 100), "v": torch.randn(16)}


@pytest.fixture
def publisher():
    with dw.Publisher(dw.open_bucket(f"memory://{secrets.token_hex(4)}")) as publisher:
        yield publisher


def publish(publisher, weights):
    publisher.publish(weights)
    publisher.flush(10)
    return {name: tensor.bfloat16() for name, tensor in weights.items()}


def follow(publisher, model):
    """The model's weights as the run names them, their digests, and where they stand."""
    subscriber = Subscriber(publisher.bucket)
    live = LiveWeights(model, subscriber.run.table, transformed={})
    return live, live.digests(), subscriber


def test_a_plan_leads_to_the_published_bits_and_writes_nothing_before_it_is_applied(publisher, weights):
    publish(publisher, weights)
    model = Fused(weights)
    live, digests, subscriber = follow(publisher, model)
    since = subscriber.latest()
    weights["a"][3, 7] += 1
    weights["b"][0, 0] = -weights["b"][0, 0]
    weights["v"] += 1  # changes everywhere: a fill, not a scatter
    before, wanted = model.served(), publish(publisher, weights)
    plan = staging.stage(live, digests, subscriber, since, 1)
    assert dw.equal(model.served(), before)
    staging.apply(plan.writes)
    assert dw.equal(model.served(), wanted)
    assert live.digests() == plan.digests
    staging.undo(plan.writes)
    assert dw.equal(model.served(), before)


def test_several_commits_become_one_plan(publisher, weights):
    publish(publisher, weights)
    model = Fused(weights)
    live, digests, subscriber = follow(publisher, model)
    since = subscriber.latest()
    for step in range(4):
        weights["a"][step] += 0.5
        wanted = publish(publisher, weights)
    plan = staging.stage(live, digests, subscriber, since, 4)
    staging.apply(plan.writes)
    assert dw.equal(model.served(), wanted)


def test_weights_that_are_no_committed_version_start_from_the_anchor(publisher, weights):
    model = Fused({name: torch.zeros_like(tensor) for name, tensor in weights.items()})
    publish(publisher, weights)
    weights["b"][2] *= 3
    wanted = publish(publisher, weights)
    live, digests, subscriber = follow(publisher, model)
    plan = staging.stage(live, digests, subscriber, None, 1)
    assert plan.since is None
    staging.apply(plan.writes)
    assert dw.equal(model.served(), wanted)


def test_live_weights_that_are_not_what_they_should_be_are_refused_and_left_alone(publisher, weights):
    publish(publisher, weights)
    model = Fused(weights)
    live, digests, subscriber = follow(publisher, model)
    since = subscriber.latest()
    weights["a"][3, 7] += 1
    publish(publisher, weights)
    model.ab.data[3, 7] = 42.0  # someone wrote where the delta will
    drifted = model.served()
    with pytest.raises((WrongBase, BadDigest), match="a"):
        staging.stage(live, digests, subscriber, since, 1)
    assert dw.equal(model.served(), drifted)


def test_a_write_that_fails_puts_everything_back(publisher, weights):
    publish(publisher, weights)
    model = Fused(weights)
    live, digests, subscriber = follow(publisher, model)
    since, before = subscriber.latest(), model.served()
    weights["a"][3, 7] += 1
    weights["b"][3, 7] += 1
    publish(publisher, weights)
    plan = staging.stage(live, digests, subscriber, since, 1)

    class Broken:
        def write(self):
            raise MemoryError("no room on the device")

        def undo(self):
            pass

    with pytest.raises(MemoryError):
        staging.apply((*plan.writes, Broken()))
    assert dw.equal(model.served(), before)
    assert live.digests() == digests
