"""A worker that decodes its own parts of a change stages what one does that decodes all of it."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from class_runs import class_run
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import PATIENCE, fresh, position
from sliced import MLP, SHAPES, Worker

import deltawire as dw
from deltawire.buckets.base import Bucket
from deltawire.format.codecs import subset, tiles
from deltawire.live import staging, writes
from deltawire.live.live_weights import LiveWeights
from deltawire.live.transforms import AfterLoading
from deltawire.read.subscriber import Subscriber
from deltawire.upkeep.compactor import Compactor
from deltawire.weights.boxes import Box
from deltawire.weights.delta import Delta
from deltawire.weights.kept import Kept

SHARES = (0.02, 0.3, 1.0, 0.02, 0.005)
LAST = len(SHARES)


class Run(NamedTuple):
    """A run, and the bits of each version."""

    bucket: Bucket
    versions: list[dict[str, torch.Tensor]]

    def __repr__(self):
        return self.bucket.url


def publish(codec):
    """A run whose steps are sparse and dense, with a fold over the first four."""
    bucket, random, versions = fresh(), torch.Generator().manual_seed(0), []
    weights = {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
    with dw.Publisher(bucket, codec=codec) as publisher:
        for share in (*SHARES, 0.0):
            publisher.publish(weights)
            publisher.flush(PATIENCE)
            versions.append({name: tensor.bfloat16() for name, tensor in weights.items()})
            for tensor in weights.values():
                tensor[torch.rand(tensor.shape, generator=random) < share] *= 1.02
    with tempfile.TemporaryDirectory() as folder, Compactor(bucket, Path(folder), levels=(4,), anchors="never") as one:
        one.step()
    return Run(bucket, versions)


@pytest.fixture(scope="module", params=["gap", "subset", "class"])
def run(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "LEAST", 1 << 11)
        patch.setattr(tiles, "TARGET", 1 << 13)
        return publish(request.param)


def loaded(rank, size, weights):
    model = Worker(rank, size)
    model.load_weights(iter(weights.items()))
    return model


def same(one, other):
    return dw.equal(dict(one.named_parameters()), dict(other.named_parameters()))


class CutAfterwards(Subscriber):
    """Decodes all of a change, and then cuts it."""

    def change(self, since, version, *, kept, **options):
        found = super().change(since, version, **options)
        delta = {name: kept[name].cut(tensor) for name, tensor in found.delta.items() if name in kept}
        return replace(found, kept=kept, delta=Delta(delta))


def staged(bucket, model, weights, since, version, *, whole):
    """The weights of a worker and its plan, made of all of the change or of what it holds. `weights` are all tensors
    at the start, which a delta of `class` is then read against; None: what the worker holds."""
    with pytest.MonkeyPatch.context() as patch, (CutAfterwards if whole else Subscriber)(bucket) as subscriber:
        if weights is not None:
            patch.setattr(staging, "TensorsAtHand", lambda live: weights)
        live = LiveWeights(model, subscriber.run.table, loading=AfterLoading())
        assert live.kept is not None
        start = None if since is None else position(bucket, since)
        return staging.stage(live, live.digests(), subscriber, start, version)


@settings(max_examples=12)
@given(
    rank=st.integers(0, 7),
    size=st.sampled_from([2, 4, 8]),
    since=st.sampled_from([None, *range(LAST + 1)]),
    version=st.integers(0, LAST),
    at_hand=st.booleans(),
)
def test_a_part_of_a_change_is_staged_as_the_whole_change_is(run, rank, size, since, version, at_hand):
    bucket, versions = run
    rank, before = rank % size, versions[since or 0]
    models = [loaded(rank, size, before) for _ in range(2)]
    own, other = (
        staged(bucket, model, before if at_hand else None, since, version, whole=whole)
        for model, whole in zip(models, (False, True), strict=True)
    )
    assert own.digests == other.digests
    assert (own.after, own.since, own.wire_bytes) == (other.after, other.since, other.wire_bytes)
    for plan, model in ((own, models[0]), (other, models[1])):
        writes.apply(plan.writes)
        assert same(model, loaded(rank, size, versions[version]))
        writes.undo(plan.writes)
        assert same(model, loaded(rank, size, before))


def test_what_is_not_a_workers_is_not_decoded(monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TARGET", 1 << 13)
        bucket, versions = publish("subset")
    decoded, done = [], subset.decode_tile
    monkeypatch.setattr(subset, "decode_tile", lambda job, twin: decoded.append(job) or done(job, twin))
    plan = staged(bucket, loaded(1, 8, versions[0]), None, 0, 1, whole=False)
    elements = sum(box.size for kept in plan.way.kept.values() for box in kept.boxes)
    assert 0 < plan.changed < 0.05 * elements
    names = {job.spec.name for job in decoded}
    assert not {name for name in names if ".experts." in name and "gate_up" not in name}, "rank 1 holds none of these"
    assert len([job for job in decoded if job.spec.name == f"{MLP}gate_proj.weight"]) == 1


def test_what_was_decoded_of_other_parts_leads_nobody_back():
    bucket, versions = class_run(3)
    with Subscriber(bucket) as subscriber:
        here = {name: bits.copy() for name, bits in versions[1].items()}
        halves = [{"embed.weight": Kept((60, 8), [Box(start, (240,), (1,))])} for start in (0, 240)]
        change = subscriber.change(position(bucket, 1), 2, weights=here, anchors=False, kept=halves[0])
        assert [*change.delta] == ["embed.weight"]
        subscriber.keep(change)
        back = subscriber.change(position(bucket, 2), 1, anchors=False, kept=halves[0])
        assert back.delta["embed.weight"] == -change.delta["embed.weight"]
        for kept in (halves[1], None):
            with pytest.raises(dw.DeltaWireError):
                subscriber.change(position(bucket, 2), 1, anchors=False, kept=kept)
