"""Codec `class` from a baseline on a device: the host's files, and none against other bits than the parent's."""

import itertools
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from class_runs import codecs, require_exact
from cpu_devices import CpuDevice, DevicePublisher
from device_runs import bits_of, captured, cut_short, fp32, histories, opened, sent, step
from faults import Faulty, down, never
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import PATIENCE, commits, fresh, publishing, read_weights
from watchdog import FILES, Watchdog

from deltawire.format.codecs import ranks, tiles
from deltawire.format.codecs.classes import SCHEMES
from deltawire.publish import on_device
from deltawire.publish.choice import Choice
from deltawire.runlog.cuts import pattern
from deltawire.upkeep.verify import verify
from deltawire.weights.tensors import equal

OOM = torch.OutOfMemoryError("no memory left")
BY_CLASS = Choice(by_class=True, reason="asked for")
CUT = Choice(by_class=True, cuts={pattern("layer.0.weight"): (0, 8)}, reason="asked for")
"""tiles of which several stand side by side"""
CLASS = {"codec": "class", "choose": lambda: BY_CLASS}


@contextmanager
def small_tiles():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("LEAST", 8), ("TARGET", 128), ("STEP", 2)):
            patch.setattr(tiles, name, value)
        yield


@pytest.mark.filterwarnings("ignore:.*(hold integers|rounded to 16 bits)")
@given(histories(dtypes=[*SCHEMES]), st.sampled_from([BY_CLASS, CUT]), st.booleans())
@settings(max_examples=25)
def test_every_file_and_digest_is_the_one_of_the_host(tmp_path_factory, history, choice, stay):
    folder = tmp_path_factory.mktemp("spool")
    how = {"codec": "class", "choose": lambda: choice}
    with small_tiles():
        host = opened(folder / "host", **how)
        device = opened(folder / "device", baseline="device", **how)
        for version in history:
            assert sent(captured(device, version, stay=stay)) == sent(captured(host, version))


@pytest.mark.filterwarnings("ignore:.*(hold integers|rounded to 16 bits)")
@given(histories())
@settings(max_examples=10)
def test_tensors_without_classes_and_some_on_the_host_are_beside_them(tmp_path_factory, history):
    folder = tmp_path_factory.mktemp("spool")
    host = opened(folder / "host", **CLASS)
    mixed = CpuDevice(only=lambda tensor: tensor.dim() != 1)
    device = opened(folder / "device", baseline="device", devices=mixed, **CLASS)
    for version in history:
        assert sent(captured(device, version)) == sent(captured(host, version))


def test_versions_are_of_class_and_a_commit_says_why():
    bucket, weights = fresh(), fp32()
    with publishing(bucket, codec="class", cls=DevicePublisher) as pub:
        reports = []
        for seed in range(4):
            reports.append(pub.publish(weights))
            pub.flush(timeout=PATIENCE)
            step(weights, seed)
    assert [report.codec for report in reports[1:]] == ["class"] * 3
    assert reports[-1].baseline == "device"
    assert not reports[-1].is_encoded
    assert codecs(bucket) == dict.fromkeys(range(1, 4), "class")
    assert commits(bucket)[-1].choice == "class: asked for, and every replica reads it"
    assert verify(bucket).deltas == 3


@pytest.mark.parametrize("point", ["upload", "sweeps.compare", "sweeps.digest_at", "_to_host", "sweeps.scatter"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_where_the_baseline_comes_home_the_files_are_the_same(point, number, monkeypatch, tmp_path):
    calls = itertools.count(1)
    place, name = on_device.sweeps if "." in point else on_device, point.rpartition(".")[2]
    real = getattr(place, name)

    def full(*arguments):
        if next(calls) == number:
            raise OOM
        return real(*arguments)

    monkeypatch.setattr(place, name, full)
    host, device = opened(tmp_path / "host", **CLASS), opened(tmp_path / "device", baseline="device", **CLASS)
    weights = fp32()
    for seed in range(5):
        assert sent(captured(device, weights)) == sent(captured(host, weights))
        step(weights, seed)
    assert next(calls) > number, "it never ran out of memory"
    assert device.baseline.where == "host"


def test_without_memory_to_rank_a_version_is_of_subset_and_the_baseline_stays(monkeypatch):
    bucket, weights, versions, calls = fresh(), fp32(), {}, itertools.count()
    real = ranks.rank

    def full(*arguments):
        if next(calls) == 1:
            raise OOM
        return real(*arguments)

    monkeypatch.setattr(ranks, "rank", full)
    with publishing(bucket, codec="class", baseline="device", cls=DevicePublisher) as pub:
        for seed in range(4):
            report = pub.publish(weights)
            pub.flush(timeout=PATIENCE)
            versions[report.version] = bits_of(weights)
            step(weights, seed)
    assert report.baseline == "device"
    assert codecs(bucket) == {1: "class", 2: "subset", 3: "class"}
    require_exact(bucket, versions)


@pytest.mark.usefixtures("quick_retries")
def test_versions_that_waited_or_folded_are_of_subset_and_the_next_one_is_of_class_again():
    bucket, weights, versions = Faulty(fresh()), fp32(), {}
    with publishing(bucket, codec="class", baseline="device", cls=DevicePublisher) as pub:

        def send(seed):
            step(weights, seed)
            versions[pub.publish(weights).version] = bits_of(weights)

        send(0)
        pub.flush(PATIENCE)
        bucket.plan, asked = down()
        send(1)
        assert asked.wait(PATIENCE)
        send(2)  # waits
        send(3)  # folds into it
        bucket.plan = never
        pub.flush(PATIENCE)
        send(4)
        pub.flush(PATIENCE)
    assert codecs(bucket) == {1: "class", 3: "subset", 4: "class"}
    assert [commit.choice for commit in commits(bucket)[1:]] == [
        "class: asked for, and every replica reads it",
        "subset: it waited for the store",
        "class: asked for, and every replica reads it",
    ]
    require_exact(bucket, versions)
    assert equal(read_weights(bucket), versions[4])


def test_what_a_failed_publish_left_is_ranked_by_no_bits(tmp_path):
    host, device = opened(tmp_path / "host", **CLASS), opened(tmp_path / "device", baseline="device", **CLASS)
    bucket, weights, versions = fresh(), fp32(), {}

    def broken():
        yield from list(weights.items())[:3]
        raise RuntimeError("the loader broke")

    with publishing(bucket, codec="class", baseline="device", cls=DevicePublisher) as pub:
        for seed in range(4):
            assert sent(captured(device, weights)) == sent(captured(host, weights))
            report = pub.publish(weights)
            pub.flush(timeout=PATIENCE)
            versions[report.version] = bits_of(weights)
            step(weights, seed)
            if seed == 1:
                for fails in (pub.publish, *(partial(each.capture, step=1, metrics=None) for each in (host, device))):
                    with pytest.raises(RuntimeError, match="broke"):
                        fails(broken())
                step(weights, seed + 10)
    require_exact(bucket, versions)
    assert codecs(bucket) == dict.fromkeys(range(1, 4), "class")


def test_tied_tensors_and_a_resumed_run_are_of_class_too():
    bucket, embed, versions = fresh(), torch.randn(30, 8), {}
    for number in range(2):
        with publishing(bucket, codec="class", baseline="device", cls=DevicePublisher) as pub:
            for seed in range(2):
                report = pub.publish({"embed": embed, "norm": embed[0].clone(), "head": embed})
                pub.flush(timeout=PATIENCE)
                versions[report.version] = bits_of({"embed": embed, "norm": embed[0]})
                step({"embed": embed}, 10 * number + seed)
    assert codecs(bucket) == dict.fromkeys(range(1, 4), "class")
    require_exact(bucket, versions)


@pytest.mark.usefixtures("quick_retries")
def test_a_publish_cut_short_at_any_line_leaves_no_delta_of_other_bits():
    watched, went_on = FILES | {on_device.__file__, ranks.__file__}, []
    for number in itertools.count(3, 37):
        weights = {name: fp32()[name] for name in ("norm", "scale", "layer.0.weight")}
        bucket, going = cut_short(Watchdog(number, watched), weights, 2, codec="class")
        if going is None:
            break
        assert verify(bucket).deltas
        went_on.append(going)
    assert True in went_on
