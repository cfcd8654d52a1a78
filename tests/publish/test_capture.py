"""Comparing with the baseline: whatever breaks off a publish, what was captured is in the next version."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import edit, fresh, model, publish_all, publishing, read_weights, served, table
from strategies import seeds

from deltawire.errors import (
    AccessRefused,
    DtypeMismatch,
    MissingTensor,
    NotFound,
    OutOfSpace,
    ShapeMismatch,
    UnknownTensor,
)
from deltawire.format import checkpoint
from deltawire.format.checkpoint import Checkpoint
from deltawire.format.delta_file import decode
from deltawire.publish import capture
from deltawire.publish.capture import WholeCapturer
from deltawire.publish.capturer import CaptureOptions
from deltawire.publish.pending import fold, freeze
from deltawire.runlog.records import BaseCheckpoint
from deltawire.weights.bits import Bits
from deltawire.weights.delta import Delta
from deltawire.weights.digest import digest
from deltawire.weights.tensors import equal


def opened(tmp_path, bucket=None, **options):
    (tmp_path / "spool").mkdir(exist_ok=True)
    chosen = {"base": None, "dtype": "BF16", "assets": None, "clock": lambda: 1.5} | options
    return WholeCapturer(bucket or fresh(), tmp_path / "spool", CaptureOptions(**chosen))


def captured(capturer, pairs, **about):
    pairs = pairs.items() if isinstance(pairs, dict) else pairs
    return capturer.capture(pairs, **({"step": None, "metrics": {}} | about)).versions


def as_base(folder, weights):
    folder.mkdir()
    checkpoint.write(folder, table(served(weights)), served(weights))
    return folder


def breaking(items, at):
    for number, item in enumerate(items):
        if number == at:
            raise RuntimeError("the gather timed out")
        yield item


def replaced(weights, name, tensor):
    return [(key, tensor if key == name else value) for key, value in weights.items()]


BROKEN = {
    "a wrong shape": (ShapeMismatch, lambda w: replaced(w, "norm", np.zeros(9, np.float32))),
    "a dtype with no cast": (DtypeMismatch, lambda w: replaced(w, "norm", np.zeros(8, np.int64))),
    "a dtype that cannot be shipped": (DtypeMismatch, lambda w: replaced(w, "norm", np.zeros(8, np.complex64))),
    "an unknown name": (UnknownTensor, lambda w: [*w.items(), ("layer.0.wieght", w["norm"])]),
    "a name given twice": (UnknownTensor, lambda w: [*w.items(), ("norm", w["norm"])]),
    "a missing tensor": (MissingTensor, lambda w: list(w.items())[:-1]),
    "an iterator that raises": (RuntimeError, lambda w: breaking(w.items(), 3)),
    "no tensors": (MissingTensor, lambda w: []),
}
FIRST_BROKEN = ["a dtype that cannot be shipped", "a name given twice", "an iterator that raises", "no tensors"]
"""the rest is right in a run's first publish, which defines names, shapes and dtypes"""


@pytest.mark.parametrize("how", BROKEN)
def test_a_publish_that_breaks_off_loses_nothing(tmp_path, how):
    error, broken = BROKEN[how]
    capturer, weights = opened(tmp_path), model()
    captured(capturer, weights)
    old = served(weights)
    edit(weights, 1)
    with pytest.raises(error):
        captured(capturer, broken(weights))
    edit(weights, 2)
    (version,) = captured(capturer, weights)
    assert (version.version, version.parent) == (1, 0)
    assert equal(old + version.delta, served(weights))
    assert version.digests == digest(served(weights))


@pytest.mark.parametrize("how", FIRST_BROKEN)
def test_a_first_publish_that_breaks_off_captures_nothing_and_the_next_one_all(tmp_path, how):
    error, broken = BROKEN[how]
    capturer, weights = opened(tmp_path), model()
    with pytest.raises(error):
        captured(capturer, broken(weights))
    edit(weights, 1)
    (version,) = captured(capturer, weights)
    files = {key.rsplit("/")[-1]: path for key, path in version.payloads.items()}
    assert (version.version, version.parent) == (0, None)
    assert equal(dict(Checkpoint(files["model.safetensors"].parent)), served(weights))


@pytest.mark.parametrize("how", [how for how in BROKEN if how != "a missing tensor"])
def test_a_first_publish_on_a_base_that_breaks_off_loses_nothing(tmp_path, how):
    error, broken = BROKEN[how]
    weights = model()
    capturer = opened(tmp_path, base=as_base(tmp_path / "base", weights))
    base = served(weights)
    edit(weights, 1)
    with pytest.raises(error):
        captured(capturer, broken(weights))
    edit(weights, 2)
    first, second = captured(capturer, weights)
    assert (first.parent, first.payloads, first.digests) == (None, {}, digest(base))
    assert equal(base + second.delta, served(weights))
    assert second.digests == digest(served(weights))


def test_a_frozen_tensor_that_only_a_failed_first_publish_gave_stays_as_the_base_has_it(tmp_path):
    weights = model()
    base = served(weights)
    capturer = opened(tmp_path, base=as_base(tmp_path / "base", weights))
    edit(weights, 1, share=1.0)
    with pytest.raises(RuntimeError):
        captured(capturer, breaking(weights.items(), 3))
    first, second = captured(capturer, {"norm": weights["norm"]})
    assert [entry.name for entry in first.run.table if entry.trainable] == ["norm"]
    assert set(second.delta) == {"norm"}
    assert second.digests == digest(base | {"norm": served(weights)["norm"]})


@pytest.mark.parametrize("based", [False, True])
def test_memory_that_runs_out_while_encoding_loses_neither_the_change_nor_a_number(tmp_path, monkeypatch, based):
    weights = model()
    base = served(weights)
    capturer = opened(tmp_path, base=as_base(tmp_path / "base", weights) if based else None)
    if not based:
        captured(capturer, weights)
    edit(weights, 1)
    with monkeypatch.context() as patch:
        patch.setattr(capture, "encode", lambda captured, coded=None, stored=(): (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            captured(capturer, weights)
    versions = captured(capturer, weights)
    assert [version.version for version in versions] == ([0, 1] if based else [1])
    assert equal(base + versions[-1].delta, served(weights))


@given(st.lists(st.tuples(seeds, st.integers(0, 5), st.sampled_from([0.0, 0.05, 1.0])), max_size=6))
def test_any_sequence_of_captures_and_broken_ones_adds_up_to_the_trainers_weights(tmp_path_factory, steps):
    capturer, weights = opened(tmp_path_factory.mktemp("capture")), model()
    captured(capturer, weights)
    held = served(weights)
    for seed, stop, share in steps:
        edit(weights, seed, share=share)
        try:
            (version,) = captured(capturer, breaking(weights.items(), stop))
        except RuntimeError:
            continue
        held = held + version.delta
        assert equal(held, served(weights))
        assert version.digests == digest(held)
    (version,) = captured(capturer, weights)
    assert equal(held + version.delta, served(weights))


def test_folding_two_captures_covers_both_and_says_what_the_later_says(tmp_path):
    capturer, weights = opened(tmp_path), model()
    captured(capturer, weights)
    old = served(weights)
    edit(weights, 1)
    (first,) = captured(capturer, weights, step=1, metrics={"reward": 0.1})
    edit(weights, 2)
    (second,) = captured(capturer, weights, step=2, metrics={"reward": 0.2})
    both = fold(first, second)
    assert (both.parent, both.version, both.versions, both.step, both.metrics) == (0, 2, 2, 2, {"reward": 0.2})
    attempt = freeze(both)
    (data,) = attempt.payloads.values()
    assert equal(old + decode(data), served(weights))
    assert set(attempt.commit.digests) == set(both.delta)
    assert attempt.commit.created == 1.5


def test_freezing_the_same_capture_twice_gives_the_same_bytes(tmp_path):
    capturer, weights = opened(tmp_path), model()
    captured(capturer, weights)
    edit(weights, 1)
    (version,) = captured(capturer, weights)
    assert freeze(version) == freeze(version)


def test_what_the_trainer_does_to_its_metrics_later_does_not_reach_the_commit(tmp_path):
    metrics = {"reward": 0.5}
    (version,) = captured(opened(tmp_path), model(), metrics=metrics)
    metrics["reward"] = 9.0
    assert version.metrics == {"reward": 0.5}


def test_a_change_below_half_a_bf16_step_is_not_shipped_until_it_adds_up(tmp_path):
    weights = {"norm": np.ones(8, np.float32)}
    capturer = opened(tmp_path)
    captured(capturer, weights)
    weights["norm"] += np.float32(2**-9)
    (small,) = captured(capturer, weights)
    weights["norm"] += np.float32(2**-8)
    (grown,) = captured(capturer, weights)
    assert (small.delta.changed, grown.delta.changed) == (0, 8)


def test_integers_and_bools_keep_their_dtype_beside_bf16(tmp_path):
    weights = {"ids": np.arange(5), "mask": np.array([True, False]), "w": np.ones(3, np.float32)}
    (version,) = captured(opened(tmp_path), weights)
    assert [entry.dtype for entry in version.run.table] == ["I64", "BOOL", "BF16"]


def test_the_dtype_of_the_server_is_the_trainers_choice(tmp_path):
    (version,) = captured(opened(tmp_path, dtype="F16"), model())
    assert {entry.dtype for entry in version.run.table} == {"F16"}


def test_version_0_may_be_a_folder_with_part_of_it_frozen(tmp_path):
    bucket, weights = fresh(), model()
    base = as_base(tmp_path / "base", weights)
    with publishing(bucket, base=base) as pub:
        edit(weights, 1, share=1.0)
        report = pub.publish({"norm": weights["norm"], "scale": weights["scale"]})
        assert report.version == 1
        with pytest.raises(UnknownTensor, match="frozen"):
            pub.publish({"norm": weights["norm"], "scale": weights["scale"], "embed.weight": weights["embed.weight"]})
        with pytest.raises(MissingTensor, match="scale"):
            pub.publish({"norm": weights["norm"]})
    expected = served(model()) | {name: served(weights)[name] for name in ("norm", "scale")}
    assert equal(read_weights(bucket, base=base), expected)
    assert equal(read_weights(bucket, 0, base=base), served(model()))
    assert [stat.key for stat in bucket.list("runs/") if "anchors" in stat.key] == []


def test_a_first_publish_equal_to_its_base_is_version_0(tmp_path):
    bucket, weights = fresh(), model()
    with publishing(bucket, base=as_base(tmp_path / "base", weights)) as pub:
        assert pub.publish(weights).version == 0
        assert pub.publish(weights).version == 1
    assert equal(read_weights(bucket, base=tmp_path / "base"), served(weights))


def test_a_run_on_a_base_is_continued_from_wherever_the_base_is_now(tmp_path):
    bucket, weights = fresh(), model()
    base = as_base(tmp_path / "base", weights)
    edit(weights, 1)
    publish_all(bucket, weights, base=base)
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(NotFound, match="pass base="):
        opened(tmp_path, bucket)
    edit(weights, 2)
    publish_all(bucket, weights, base=moved)
    assert equal(read_weights(bucket, base=moved), served(weights))


def test_a_base_that_is_altered_while_training_does_not_reach_the_run(tmp_path):
    bucket, weights = fresh(), model()
    base = as_base(tmp_path / "base", weights)
    capturer = opened(tmp_path, bucket, base=base)
    checkpoint.write(base, table(served(model(5))), served(model(5)))
    edit(weights, 1)
    first, _ = captured(capturer, weights)
    assert first.digests == digest(served(model()))


def test_a_base_is_pinned_in_the_run_record(tmp_path):
    base = as_base(tmp_path / "base", model())
    first, *_ = captured(opened(tmp_path, base=base), model())
    assert first.run.base == BaseCheckpoint(str(base.resolve()))


def test_an_anchor_carries_config_and_tokenizer_whatever_they_are_called(tmp_path):
    assets = tmp_path / "assets"
    assets.mkdir()
    wanted = ["config.json", "chat template (1).jinja", "tokenizer ω.json", "merges.txt", "spiece.model", "empty.txt"]
    unwanted = ["pytorch_model.bin", "model.safetensors.index.json", "modeling_evil.py", ".hidden.json", "weights.h5"]
    for name in wanted + unwanted:
        (assets / name).write_text("" if name == "empty.txt" else "{}")
    bucket = fresh()
    publish_all(bucket, model(), assets=assets)
    names = {stat.key.rsplit("/", 1)[-1] for stat in bucket.list("runs/") if "anchors/" in stat.key}
    assert names == {*wanted, "model.safetensors"}
    assert equal(read_weights(bucket), served(model()))


def test_assets_that_are_not_there_are_named(tmp_path):
    with pytest.raises(NotFound, match="no-assets"):
        opened(tmp_path, assets=tmp_path / "no-assets")


@pytest.mark.parametrize(("code", "kind"), [(28, OutOfSpace), (13, AccessRefused)])
def test_an_anchor_that_cannot_be_written_is_a_typed_error_and_a_later_publish_succeeds(
    tmp_path, monkeypatch, code, kind
):
    capturer, weights = opened(tmp_path), model()

    def refuse(*anything):
        raise OSError(code, "planned")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.container, "header_bytes", refuse)
        with pytest.raises(kind, match=r"model\.safetensors"):
            captured(capturer, weights)
    (version,) = captured(capturer, weights)
    assert version.version == 0


COUNT, ELEMENTS = 40, 250_000


def big_model(seed):
    rng = np.random.default_rng(seed)
    return {f"layer.{n}": rng.integers(0, 1 << 16, ELEMENTS, np.uint16) for n in range(COUNT)}


def test_capturing_costs_one_tensor_and_one_delta_beside_the_baseline(tmp_path):
    """40 tensors of 250,000 bf16 elements, 20 MB; 1 % changes. Half a megabyte is the one tensor."""
    bits = big_model(0)
    weights = {name: Bits("BF16", (ELEMENTS,), data) for name, data in bits.items()}
    capturer = opened(tmp_path)
    captured(capturer, weights)
    captured(capturer, weights)  # compiles what compares
    for data in bits.values():
        data[::100] += 1
    tracemalloc.start()
    (version,) = captured(capturer, weights)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert version.delta.changed == COUNT * ELEMENTS // 100
    allowed = 2 * ELEMENTS + version.delta.nbytes + 3 * version.payload_bytes + 200_000
    assert peak < allowed, f"{peak:,} bytes at the peak; one tensor, one delta and its file are {allowed:,}"


def test_capturing_fp32_weights_casts_one_tensor_at_a_time(tmp_path):
    """40 tensors of 250,000 fp32 elements, 40 MB; rounding one to bf16 takes twice its own 1 MB in numpy."""
    weights = {name: data.astype(np.float32) for name, data in big_model(0).items()}
    capturer = opened(tmp_path)
    tracemalloc.start()
    captured(capturer, weights)
    held, peak_first = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    (version,) = captured(capturer, weights)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tensor = 4 * ELEMENTS
    assert version.delta.changed == 0
    assert held < 2 * COUNT * ELEMENTS + 500_000, "the baseline is two bytes an element"
    assert peak_first - held < 2.5 * tensor
    assert peak - held < 2.5 * tensor


def test_nothing_of_a_delta_is_shared_with_the_trainers_memory(tmp_path):
    data = np.zeros(1000, np.uint16)
    weights = {"w": Bits("BF16", (1000,), data)}
    capturer = opened(tmp_path)
    captured(capturer, weights)
    data[:] = 7
    (version,) = captured(capturer, weights)
    kept = Delta(dict(version.delta))
    data[:] = 9
    assert equal({"w": Bits("BF16", (1000,), np.zeros(1000, np.uint16))} + kept, {"w": Bits("BF16", (1000,), data - 2)})
