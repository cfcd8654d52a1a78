"""The trainer's promise: publishing never waits for the network, and says truthfully how far it is."""

import tempfile
import threading

import numpy as np
import pytest
import torch
from faults import Faulty, down, never
from runs import PATIENCE, commits, edit, fresh, model, publish_all, publishing, read_weights, served

from deltawire import NameMap, Publisher, Subscriber, materialize, open_bucket
from deltawire.errors import (
    AccessRefused,
    DeltaWireError,
    DtypeMismatch,
    MissingTensor,
    NotFound,
    OutOfSpace,
    ShapeMismatch,
    Unavailable,
    UnknownTensor,
    UnknownVersion,
)
from deltawire.publish import uploader
from deltawire.publish.baseline import Baseline
from deltawire.publish.queue import Queue
from deltawire.runlog.log import read_head
from deltawire.weights import kernels_numba
from deltawire.weights.tensors import equal

pytestmark = pytest.mark.usefixtures("quick_retries")


def test_publish_returns_while_the_store_does_not_answer():
    bucket, weights = Faulty(fresh()), model()
    gate, inside = threading.Event(), threading.Event()

    def stall(n, key):
        inside.set()
        assert gate.wait(PATIENCE)

    with publishing(bucket) as pub:
        pub.publish(weights)
        pub.flush(timeout=PATIENCE)
        bucket.plan = stall
        edit(weights, 1)
        pub.publish(weights)
        assert inside.wait(PATIENCE)
        edit(weights, 2)
        report = pub.publish(weights)
        assert not gate.is_set()
        assert (report.version, report.waiting, report.problem) == (2, 2, None)
        assert pub.position.version == 0
        gate.set()
        assert pub.flush(timeout=PATIENCE).version == 2
    assert equal(read_weights(bucket), served(weights))


@pytest.mark.parametrize("kind", [AccessRefused, NotFound, OutOfSpace])
def test_flush_raises_at_once_what_waiting_cannot_cure_and_the_next_flush_tries_again(kind):
    bucket, weights = Faulty(fresh(), down(kind("planned"))[0]), model()
    with publishing(bucket) as pub:
        pub.publish(weights)
        for _ in range(2):
            with pytest.raises(kind, match="planned"):
                pub.flush(timeout=PATIENCE)
        bucket.plan = never
        assert pub.flush(timeout=PATIENCE).version == 0
    assert equal(read_weights(bucket), served(weights))


def test_flush_raises_at_once_even_when_the_next_try_is_half_a_minute_away(monkeypatch):
    monkeypatch.setattr(uploader, "FIRST_RETRY", 3600.0)
    plan, asked = down(AccessRefused("bad token"))
    bucket = Faulty(fresh(), plan)
    with publishing(bucket) as pub:
        pub.publish(model())
        assert asked.wait(PATIENCE)
        with pytest.raises(AccessRefused):
            pub.flush(timeout=PATIENCE)
        bucket.plan = never
        assert pub.flush(timeout=PATIENCE).version == 0


def test_flush_waits_for_a_store_that_may_come_back_and_says_so_when_time_is_up():
    bucket = Faulty(fresh(), down()[0])
    with publishing(bucket) as pub:
        pub.publish(model())
        with pytest.raises(Unavailable, match="the store is down"):
            pub.flush(timeout=0.05)
        bucket.plan = never


def test_a_bucket_that_is_not_there_is_named(tmp_path):
    url = f"file://{tmp_path}/no/such"
    with pytest.raises(NotFound, match="mkdir -p"), Publisher(open_bucket(url)) as pub:
        pub.publish(model())


def test_a_new_publisher_continues_the_run_with_the_difference_and_no_new_anchor():
    bucket, weights = fresh(), model()
    publish_all(bucket, weights)
    edit(weights, 1)
    with publishing(bucket) as pub:
        report = pub.publish(weights)
        assert 0 < report.changed < report.total / 2
    chain = commits(bucket)
    assert [(commit.parent, commit.version) for commit in chain] == [(None, 0), (0, 1)]
    assert len({commit.run for commit in chain}) == 1
    assert [stat.key for stat in bucket.list("runs/") if "anchors/" in stat.key and "step_000001" in stat.key] == []
    assert equal(read_weights(bucket), served(weights))


def test_a_run_whose_record_is_gone_is_not_silently_replaced_by_a_new_one():
    bucket = fresh()
    publish_all(bucket, model())
    bucket.delete(f"runs/{read_head(bucket).run}/run.json")
    with pytest.raises(NotFound, match=r"run\.json"):
        Publisher(bucket)


def test_metrics_and_step_may_be_any_number_and_a_loss_of_nan_does_not_spoil_the_run():
    bucket = fresh()
    metrics = {"loss": float("nan"), "reward": np.float32(0.5), "kl": torch.tensor(2.0), "n": 3, "inf": np.inf}
    with publishing(bucket) as pub:
        pub.publish(model(), step=np.int64(7), metrics=metrics)
    (commit,) = commits(bucket)
    assert commit.step == 7
    assert commit.metrics == {"loss": None, "reward": 0.5, "kl": 2.0, "n": 3.0, "inf": None}


def test_metrics_that_are_no_numbers_are_refused_before_anything_is_captured():
    bucket, weights = fresh(), model()
    with publishing(bucket) as pub:
        with pytest.raises(ValueError, match="could not convert"):
            pub.publish(weights, metrics={"reward": "good"})
        assert pub.publish(weights).version == 0


def test_a_callback_that_raises_stops_the_publisher_loudly():
    def complain(report):
        raise RuntimeError("no room in the log")

    pub = Publisher(fresh(), on_upload=complain)
    pub.publish(model())
    for thread in threading.enumerate():
        if thread.name == "deltawire-upload":
            thread.join(PATIENCE)
    for again in (pub.flush, lambda: pub.publish(model(1)), pub.close):
        with pytest.raises(DeltaWireError, match=r"uploader stopped.*no room in the log"):
            again()


def test_a_closed_publisher_refuses_and_never_hangs():
    bucket = Faulty(fresh(), down()[0])
    pub = Publisher(bucket)
    pub.publish(model())
    with pytest.raises(Unavailable):
        pub.close(timeout=0.05)
    with pytest.raises(Unavailable):
        pub.flush()
    with pytest.raises(DeltaWireError):
        pub.publish(model(1))
    pub.close()


def test_closing_twice_is_closing_once():
    pub = Publisher(fresh())
    pub.publish(model())
    pub.close(timeout=PATIENCE)
    pub.close()
    assert pub.flush(timeout=PATIENCE).version == 0
    with pytest.raises(DeltaWireError, match="closed"):
        pub.publish(model(1))


def test_an_error_in_the_training_loop_is_not_hidden_by_one_of_the_store():
    bucket = Faulty(fresh(), down(AccessRefused("bad token"))[0])
    with pytest.raises(KeyError) as caught, Publisher(bucket) as pub:
        pub.publish(model())
        raise KeyError("reward")
    assert caught.value.__notes__ == ["deltawire: bad token"]


def test_the_position_and_the_reports_tell_what_happened():
    bucket, weights, uploads = fresh(), model(), []
    with publishing(bucket, on_upload=uploads.append) as pub:
        assert pub.position is None
        first = pub.publish(weights, step=10)
        pub.flush(timeout=PATIENCE)
        edit(weights, 1, "norm", share=1.0)
        second = pub.publish(weights, step=11)
        position = pub.flush(timeout=PATIENCE)
    assert (first.version, first.step, first.density) == (0, 10, 1.0)
    assert first.wire_bytes > first.model_bytes == 2 * first.total
    assert (second.version, second.changed, second.run) == (1, 8, first.run)
    assert second.seconds >= second.compare_seconds > 0
    assert [upload.position.version for upload in uploads] == [0, 1]
    assert uploads[1].wire_bytes == second.wire_bytes
    with Subscriber(bucket) as subscriber:
        assert subscriber.latest() == position == pub.position


def test_torch_parameters_of_a_model_are_published_as_they_are():
    layer = torch.nn.Linear(8, 4)
    bucket = fresh()
    with publishing(bucket) as pub:
        pub.publish(layer.named_parameters())
        with torch.no_grad():
            layer.weight += 1
        pub.publish(layer.named_parameters())
    assert equal(read_weights(bucket), served(dict(layer.named_parameters())))


def test_host_memory_and_disk_of_an_anchor_are_given_back_once_it_is_in_the_bucket(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bucket = fresh()
    for start in (0, 1):  # the first publishes an anchor, the second rebuilds the baseline from it
        with publishing(bucket) as pub:
            pub.publish(model(start))
            pub.flush(timeout=PATIENCE)
            assert [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size] == []
    assert list(tmp_path.iterdir()) == []


def test_a_publisher_that_cannot_open_leaves_nothing_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(NotFound):
        Publisher(fresh(), base=tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_a_codec_that_cannot_be_published_is_refused():
    with pytest.raises(UnknownVersion, match="raw"):
        Publisher(fresh(), codec="raw")


def test_what_prepares_the_pairs_is_applied_in_order():
    def renamed(pairs):
        return ((name.removeprefix("module."), tensor) for name, tensor in pairs)

    def only_w(pairs):
        return ((name, tensor) for name, tensor in pairs if name == "w")

    bucket, weights = fresh(), {"w": torch.ones(4), "b": torch.zeros(4)}
    with Publisher(bucket, prepare=[renamed, only_w]) as pub:
        pub.publish({f"module.{name}": tensor for name, tensor in weights.items()})
    with Subscriber(bucket) as subscriber:
        assert [entry.name for entry in subscriber.run.table] == ["w"]


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        (7, UnknownTensor, r"int is not .* pass model.named_parameters\(\)"),
        (list(torch.nn.Linear(2, 2).parameters()), UnknownTensor, r"got Parameter: pass model.named_parameters\(\)"),
        ({7: torch.zeros(2)}, UnknownTensor, "pairs"),
        ({"a\0b": torch.zeros(2)}, UnknownTensor, "cannot be the name"),
        ({"__metadata__": torch.zeros(2)}, UnknownTensor, "cannot be the name"),
        ({"a\ud800": torch.zeros(2)}, UnknownTensor, "cannot be the name"),
        ({"weight": None}, DtypeMismatch, "weight: NoneType is not a tensor"),
        ({"weight": torch.zeros(2, device="meta")}, DtypeMismatch, "weight is on device meta"),
        ({"weight": torch.eye(2).to_sparse()}, DtypeMismatch, "weight .* torch.sparse_coo"),
        ({"weight": torch.zeros(2, dtype=torch.complex64)}, DtypeMismatch, "weight: dtype torch.complex64"),
    ],
)
def test_what_no_checkpoint_could_hold_is_refused_by_name_and_the_next_publish_works(given, kind, says):
    bucket, weights = fresh(), model()
    with publishing(bucket) as pub:
        with pytest.raises(kind, match=says):
            pub.publish(given)
        pub.publish(weights)
    assert equal(read_weights(bucket), served(weights))


def test_a_tensor_that_changed_its_kind_or_its_shape_is_named_with_the_way_out():
    weights = model()
    with publishing(fresh()) as pub:
        pub.publish(weights)
        with pytest.raises(DtypeMismatch, match="norm: I64 cannot be cast to BF16"):
            pub.publish(weights | {"norm": np.zeros(8, np.int64)})
        with pytest.raises(ShapeMismatch, match=r"norm: shape \[9\].*another bucket, or .*supersede"):
            pub.publish(weights | {"norm": np.zeros(9, np.float32)})


def test_a_tensor_that_another_thread_writes_while_it_is_compared_makes_a_version_true_to_its_digests(
    monkeypatch,
):
    bucket, live = fresh(), torch.zeros(9999, dtype=torch.bfloat16)
    real, stops = kernels_numba._collect, []

    def collect(*arguments):
        stopped = real(*arguments)
        if stopped[0] < arguments[0].size:  # the rest is compared after this write
            live[stopped[0] + 1 :: 2] += 1
            stops.append(stopped)
        return stopped

    monkeypatch.setattr(kernels_numba, "_collect", collect)
    with publishing(bucket) as pub:
        for _ in range(3):
            live[::3] += 1
            pub.publish({"w": live})
            pub.flush(timeout=PATIENCE)
            assert equal(read_weights(bucket), {"w": live})
    assert stops


@pytest.mark.parametrize("part", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"])
def test_names_of_a_wrapped_module_are_refused_at_once_with_what_to_do(part):
    bucket, weights = fresh(), model()
    wrapped = {f"{part}.{name}": tensor for name, tensor in weights.items()}
    with publishing(bucket) as pub:
        with pytest.raises(UnknownTensor, match=rf"'{part}\.embed.weight'.*is 'embed.weight' in a wrapper.*NameMap"):
            pub.publish(wrapped)
        pub.publish(weights)
        with pytest.raises(UnknownTensor, match=r"in a wrapper.*NameMap"):
            pub.publish(wrapped)
    with publishing(fresh(), prepare=[NameMap()]) as pub:
        pub.publish(wrapped)
        assert read_after(pub) == weights.keys()
    with publishing(fresh()) as pub:  # a model may call one of its parts so
        pub.publish({"module.weight": weights["norm"], "head": weights["norm"]})


def read_after(pub):
    pub.flush(timeout=PATIENCE)
    return read_weights(pub.bucket).keys()


def test_packed_weights_are_warned_of_once_unless_a_base_holds_them_so(tmp_path):
    bucket, weights = fresh(), {"q_proj": np.zeros((8, 4), np.uint8), "norm": np.zeros(4, np.float32)}
    with publishing(bucket) as pub:
        with pytest.warns(UserWarning, match=r"1 tensors of this run hold integers: q_proj \(U8 \[8, 4\]\).*base="):
            pub.publish(weights)
        pub.publish(weights)
    materialize(bucket, tmp_path / "base")
    publish_all(fresh(), weights, base=tmp_path / "base")


def test_a_misspelt_option_or_the_address_of_a_bucket_is_refused_before_anything_opens(tmp_path):
    with pytest.raises(ValueError, match='"continue" or "supersede"'):
        Publisher(fresh(), run="new")
    with pytest.raises(TypeError, match="open_bucket"):
        Publisher(f"file://{tmp_path}/bucket")
    with pytest.raises(NotFound, match="deltawire keygen"):
        Publisher(fresh(), signing_key=tmp_path / "no key")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_for_temporary_files_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(NotFound, match="TMPDIR"):
        Publisher(fresh())


@pytest.mark.parametrize("where", ["a comparison", "a fold"])
def test_after_an_interrupt_in_a_publish_only_a_new_publisher_goes_on_and_nothing_wrong_is_committed(
    where, monkeypatch
):
    bucket, weights = Faulty(fresh()), model()
    with publishing(bucket) as pub:
        pub.publish(weights)
        pub.flush(timeout=PATIENCE)
        bucket.plan = down(Unavailable("later"))[0]
        for seed in (1, 2):
            edit(weights, seed)
            pub.publish(weights)
        edit(weights, 3)
        with monkeypatch.context() as patch:
            torn = {"a comparison": (Baseline, "advance"), "a fold": (Queue, "add")}[where]
            patch.setattr(*torn, interrupted)
            with pytest.raises(KeyboardInterrupt):
                pub.publish(weights)
        with pytest.raises(DeltaWireError, match="open a new one"):
            pub.publish(weights)
        bucket.plan = never
        pub.flush(timeout=PATIENCE)
    assert read_weights(bucket)
    with publishing(bucket) as pub:
        pub.publish(weights)
    assert equal(read_weights(bucket), served(weights))


def interrupted(*_):
    raise KeyboardInterrupt


def test_tensors_of_another_model_are_named_together_three_of_them_and_a_count():
    weights = model()
    with publishing(fresh()) as pub:
        pub.publish(weights)
        with pytest.raises(UnknownTensor, match=r"'x0', 'x1', 'x2' and 4 more are not in this run's tensor table"):
            pub.publish({f"x{number}": np.zeros(3, np.float32) for number in range(7)} | weights)
        names = r"embed\.weight, layer\.0\.bias, layer\.0\.weight and 1 more;"
        with pytest.raises(MissingTensor, match=rf"^4 tensors of this run were not given: {names}"):
            pub.publish({"scale": weights["scale"]})
