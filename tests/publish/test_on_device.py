"""A baseline on a device: the bytes, digests and reports are those of the host's, whatever goes wrong on the way."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from cpu_devices import CpuDevice, DevicePublisher
from device_runs import bits_of, captured, cut_short, fp32, histories, opened, sent, step
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import PATIENCE, fresh, publish_all, publishing, read_weights
from watchdog import FILES, Watchdog

from deltawire import NameMap, digest, materialize
from deltawire.errors import ConcurrentWrite, CopiesDiffer, DtypeMismatch
from deltawire.prepare.names import View
from deltawire.publish import comparing, crossing, on_device
from deltawire.publish.choice import Choice
from deltawire.publish.devices import Place
from deltawire.weights.device import torch_twin
from deltawire.weights.tensors import cast, equal

OOM = torch.OutOfMemoryError("no memory left")


@pytest.mark.filterwarnings("ignore:.*(hold integers|rounded to 16 bits)")
@given(histories(), st.sampled_from(["subset", "gap"]), st.booleans())
@settings(max_examples=50)
def test_every_file_and_digest_is_the_one_of_the_host(tmp_path_factory, history, codec, stay):
    folder = tmp_path_factory.mktemp("spool")
    host = opened(folder / "host", codec=codec)
    device = opened(folder / "device", baseline="device", codec=codec)
    across = opened(folder / "crossing", codec=codec, devices=CpuDevice())
    for version in history:
        expected = sent(captured(host, version))
        assert sent(captured(device, version, stay=stay)) == expected
        assert sent(captured(across, version, stay=stay)) == expected
        assert device.tracker.baseline.digests == digest(device.tracker.baseline.as_mapping())
    assert device.baseline.where == ("device" if device.baseline.nbytes else "host")
    assert host.baseline.device_bytes == 0


def test_every_nan_becomes_the_one_that_numpy_makes(tmp_path):
    words = np.arange(0, 1 << 16, 7, dtype=np.uint32) << 16 | 0x8001
    first, second = np.zeros(words.size, np.float32), words.view(np.float32)
    host, device = opened(tmp_path / "host"), opened(tmp_path / "device", baseline="device")
    across = opened(tmp_path / "crossing", devices=CpuDevice())
    for values in (first, second):
        expected = sent(captured(host, {"weight": values}))
        for capturer in (device, across):
            assert sent(captured(capturer, {"weight": torch.from_numpy(values)})) == expected


def test_views_of_experts_and_strided_tensors_are_compared_where_they_lie(monkeypatch):
    monkeypatch.setattr(comparing, "AT_ONCE", 1000)
    names = NameMap({
        "experts": tuple(View(f"expert.{i}", ((i, i + 1), (0, 6), (0, 5)), (2, 1)) for i in range(4)),
        "rows": (View("even"),),
        "turned": (View("turned"),),
    })  # fmt: skip
    bucket, experts, memory = fresh(), torch.randn(4, 6, 5), torch.randn(40, 30)
    weights = {"experts": experts, "rows": memory[::2, 3:9], "turned": memory.t().double()}
    with publishing(bucket, baseline="device", prepare=[names], cls=DevicePublisher) as pub:
        for seed in range(3):
            step({"experts": experts, "memory": memory, "turned": weights["turned"]}, seed)
            report = pub.publish(weights)
    assert report.baseline == "device"
    assert equal(read_weights(bucket), bits_of(dict(names(weights.items()))))


def test_a_large_model_is_compared_in_several_sweeps(monkeypatch, tmp_path):
    monkeypatch.setattr(comparing, "ELEMENTS", 500)
    sweeps, real = [], on_device.compare
    monkeypatch.setattr(on_device, "compare", lambda asked: sweeps.append(len(asked)) or real(asked))
    host, device = opened(tmp_path / "host"), opened(tmp_path / "device", baseline="device")
    weights = {f"{number}": torch.randn(10, 20) for number in range(8)}
    for seed in range(2):
        assert sent(captured(device, weights)) == sent(captured(host, weights))
        step(weights, seed)
    assert sweeps == [3, 3, 2]


def test_an_iterator_that_reuses_one_buffer_is_captured_tensor_by_tensor():
    bucket, weights = fresh(), fp32()

    def one_buffer():
        buffer = torch.empty(1000)
        for name, tensor in weights.items():
            view = buffer[: tensor.numel()].view(tensor.shape)
            view.copy_(tensor)
            yield name, view
            buffer.fill_(7.0)

    with publishing(bucket, baseline="device", cls=DevicePublisher) as pub:
        for seed in range(4):
            step(weights, seed)
            pub.publish(one_buffer())
    assert equal(read_weights(bucket), bits_of(weights))


def test_what_a_prepare_of_somebodys_own_gives_is_captured_before_the_next_is_asked_for():
    bucket, weights, buffer = fresh(), fp32(), torch.empty(1000)

    def through_a_buffer(pairs):
        for name, tensor in pairs:
            yield name, buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)

    with publishing(bucket, baseline="device", prepare=[through_a_buffer], cls=DevicePublisher) as pub:
        for seed in range(3):
            step(weights, seed)
            pub.publish(weights)
    assert equal(read_weights(bucket), bits_of(weights))


def test_weights_that_change_once_publish_has_returned_are_in_the_next_version():
    bucket, weights, seen = fresh(), fp32(), []
    with publishing(bucket, baseline="device", cls=DevicePublisher) as pub:
        for seed in range(4):
            pub.publish(weights)
            seen.append(bits_of(weights))
            step(weights, seed)
            if seed % 2:
                pub.flush(timeout=PATIENCE)
        pub.flush(timeout=PATIENCE)
    assert equal(read_weights(bucket), seen[-1])
    assert equal(read_weights(bucket, 1), seen[1])


@pytest.mark.parametrize("baseline", ["device", "host"])
def test_a_trainers_inference_mode_gradients_and_default_device_do_not_matter(baseline):
    bucket = fresh()
    with publishing(bucket, baseline=baseline, cls=DevicePublisher) as pub:
        with torch.inference_mode():
            weights = {"made.in.inference": torch.randn(40, 8)}
            pub.publish(weights)
            step(weights, 1)
            pub.publish(weights)
            step(weights, 2)
        weights["made.in.inference"] = weights["made.in.inference"].clone().requires_grad_()
        with torch.device("meta"):
            pub.publish(weights)
        with torch.no_grad():
            step(weights, 3)
        pub.publish(weights)
    assert equal(read_weights(bucket), bits_of(weights))


def test_a_module_is_published_by_its_parameters():
    bucket, model = fresh(), torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.LayerNorm(5))
    with publishing(bucket, baseline="device", cls=DevicePublisher) as pub:
        for seed in range(3):
            with torch.no_grad():
                step(dict(model.named_parameters()), seed)
            report = pub.publish(model)
    assert report.baseline == "device"
    assert equal(read_weights(bucket), bits_of(dict(model.named_parameters())))


@pytest.mark.parametrize(
    "point", ["upload", "sweeps.compare", "sweeps.digest_at", "_to_host", "sweeps.scatter", "half of a scatter"]
)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_out_of_memory_moves_the_baseline_to_the_host_and_loses_nothing(point, number, monkeypatch, tmp_path):
    calls = itertools.count(1)
    place = on_device.sweeps if "." in point else torch_twin if "half" in point else on_device
    name = "scatter" if "half" in point else point.rpartition(".")[2]
    real = getattr(place, name)

    def full(*arguments):
        if next(calls) != number:
            return real(*arguments)
        if "half" in point:
            real(*(part[:1] for part in arguments[:2]), *(part[: arguments[1][0]] for part in arguments[2:]))
        raise OOM

    monkeypatch.setattr(place, name, full)
    host, device = opened(tmp_path / "host"), opened(tmp_path / "device", baseline="device")
    weights, kept = fp32(), fp32(1)
    for seed in range(5):
        both = {**weights, **{f"kept.{name}": tensor.to(torch.float8_e4m3fn) for name, tensor in kept.items()}}
        assert sent(captured(device, both)) == sent(captured(host, both))
        step(weights, seed)
        step(kept, seed)
    assert next(calls) > number, "it never ran out of memory"
    assert device.baseline.where == "host"


@pytest.mark.filterwarnings("ignore:.*rounded to 16 bits")
@pytest.mark.parametrize("codec", ["subset", "class", "gap"])
def test_a_tensor_crosses_to_a_baseline_on_the_host_in_pieces(codec, monkeypatch, tmp_path):
    monkeypatch.setattr(crossing, "PIECE", 1000)
    monkeypatch.setattr(crossing, "WORTH", 300)
    monkeypatch.setattr(crossing.threads, "cores", lambda: 3)
    host = opened(tmp_path / "host", codec=codec, choose=lambda: Choice(by_class=True))
    device = opened(tmp_path / "device", codec=codec, devices=CpuDevice(), choose=lambda: Choice(by_class=True))
    weights = {
        "turned": torch.randn(71, 30).t(),
        "even": torch.randn(3000),
        "small": torch.randn(7),
        "none": torch.zeros(0),
    }
    kept = torch.randn(64, 64).bfloat16()
    for seed in range(4):
        both = {**weights, "kept": kept, "wide": weights["even"].double()}
        assert sent(captured(device, both)) == sent(captured(host, both))
        step({**weights, "kept": kept}, seed)
    assert device.baseline.where == "host"


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_device_without_room_for_a_cast_has_it_done_on_the_host(number, monkeypatch, tmp_path):
    monkeypatch.setattr(crossing, "PIECE", 100)
    calls, real = itertools.count(1), crossing.carrier

    def full(*arguments):
        if next(calls) == number:
            raise OOM
        return real(*arguments)

    monkeypatch.setattr(crossing, "carrier", full)
    host, device = opened(tmp_path / "host"), opened(tmp_path / "device", devices=CpuDevice())
    weights = fp32()
    for seed in range(2):
        assert sent(captured(device, weights)) == sent(captured(host, weights))
        step(weights, seed)
    assert next(calls) > number


def test_auto_stays_on_the_host_for_the_first_publish_and_moves_where_there_is_room():
    for room in (True, False):
        weights, where = fp32(), []
        devices = CpuDevice(room=room)
        kind = type("Asked", (DevicePublisher,), {"_devices": devices})
        with publishing(fresh(), cls=kind) as pub:
            for seed in range(4):
                report = pub.publish(weights)
                where.append(report.baseline)
                step(weights, seed)
        assert where == ["host", *["device" if room else "host"] * 3]
        assert (report.baseline_device_bytes > 0) == room
        assert report.baseline_bytes == sum(2 * tensor.numel() for tensor in weights.values())
        assert len(devices.asked) == 1, "one choice for the rank"
        assert report.is_encoded == ("deltawire/wire_bytes" in report.as_metrics()) == (not room)


def test_each_tensor_is_compared_where_its_baseline_is_when_some_lie_on_the_host():
    bucket, weights = fresh(), fp32()
    kind = type("Mixed", (DevicePublisher,), {"_devices": CpuDevice(only=lambda tensor: tensor.dim() != 1)})
    with publishing(bucket, baseline="device", cls=kind) as pub:
        for seed in range(4):
            report = pub.publish(weights)
            step(weights, seed)
        report = pub.publish(weights)
    assert report.baseline == "device and host"
    assert 0 < report.baseline_device_bytes < report.baseline_bytes
    assert equal(read_weights(bucket), bits_of(weights))


def test_a_baseline_follows_a_tensor_that_is_offloaded_between_two_publishes():
    bucket, weights, here = fresh(), fp32(), set()
    kind = type("Offloaded", (DevicePublisher,), {"_devices": CpuDevice(only=lambda tensor: bool(here))})
    with publishing(bucket, baseline="device", cls=kind) as pub:
        for seed in range(6):
            here.symmetric_difference_update({"device"})
            assert pub.publish(weights).baseline == ("device" if here and seed else "host"), seed
            step(weights, seed)
        pub.publish(weights)
    assert equal(read_weights(bucket), bits_of(weights))


def test_a_weight_that_is_written_meanwhile_is_an_error_and_the_next_publish_is_whole(monkeypatch):
    bucket, weights = fresh(), fp32()
    with publishing(bucket, baseline="device", cls=DevicePublisher) as pub:
        pub.publish(weights)
        step(weights, 1)
        with monkeypatch.context() as patch:
            patch.setattr(torch_twin, "_differing", written_meanwhile)
            with pytest.raises(ConcurrentWrite, match="step is queued"):
                pub.publish(weights)
        pub.publish(weights)
    assert equal(read_weights(bucket), bits_of(weights))


def written_meanwhile(new, base, kind):
    return torch.zeros(1, dtype=kind), torch.zeros(1, dtype=base.dtype), base[:1]


def test_what_a_failed_publish_captured_goes_with_the_next():
    bucket, weights = fresh(), fp32()
    with publishing(bucket, baseline="device", cls=DevicePublisher) as pub:
        for seed in range(3):
            pub.publish(weights)
            step(weights, seed)

            def broken():
                yield from list(weights.items())[:3]
                raise RuntimeError("the loader broke")

            with pytest.raises(RuntimeError, match="broke"):
                pub.publish(broken())
            step(weights, seed + 10)
        pub.publish(weights)
    assert equal(read_weights(bucket), bits_of(weights))


def test_a_dtype_that_does_not_convert_is_refused_by_name():
    weights = fp32()
    with publishing(fresh(), baseline="device", cls=DevicePublisher) as pub:
        pub.publish(weights)
        with pytest.raises(DtypeMismatch, match="norm: I32 cannot be cast to BF16"):
            pub.publish({**weights, "norm": weights["norm"].int()})
        assert pub.publish(weights).changed == 0


def test_a_tied_tensor_is_given_by_both_names_and_stays_on_the_device():
    bucket, embed = fresh(), torch.randn(30, 8)
    with publishing(bucket, baseline="device", cls=DevicePublisher) as pub:
        for seed in range(3):
            report = pub.publish({"embed": embed, "norm": embed[0].clone(), "head": embed})
            step({"embed": embed}, seed)
        assert report.baseline == "device"
        with pytest.raises(CopiesDiffer):
            pub.publish({"embed": embed, "norm": embed[0].clone(), "head": embed + 1})
        pub.publish({"embed": embed, "norm": embed[0].clone(), "head": embed})
    assert read_weights(bucket)["embed"] == cast(embed, "BF16")


def test_patterns_round_on_the_device_as_on_the_host(tmp_path):
    dtype = {"norm": "F32", "layer.*": "F16", "*": "BF16"}
    host = opened(tmp_path / "host", dtype=dtype)
    device = opened(tmp_path / "device", dtype=dtype, baseline="device")
    weights = fp32()
    for seed in range(3):
        assert sent(captured(device, weights)) == sent(captured(host, weights))
        step(weights, seed)
    assert {entry.dtype for entry in device.tracker.baseline.table(())} == {"F32", "F16", "BF16"}


@pytest.mark.parametrize("first", ["host", "device"])
def test_a_run_is_resumed_and_superseded_from_either_place(first):
    bucket, weights = fresh(), fp32()
    for number, options in enumerate(({}, {}, {"run": "supersede"}, {})):
        place = first if number % 2 else "device"
        with publishing(bucket, baseline=place, cls=DevicePublisher, **options) as pub:
            for seed in range(3):
                step(weights, seed + 10 * number)
                pub.publish(weights)
        assert equal(read_weights(bucket), bits_of(weights))


def test_a_run_on_a_base_moves_to_the_device_with_its_first_publish(tmp_path):
    first, weights = fresh(), fp32()
    publish_all(first, weights)
    materialize(first, tmp_path / "base")
    bucket = fresh()
    with publishing(bucket, baseline="device", base=tmp_path / "base", cls=DevicePublisher) as pub:
        for seed in range(3):
            step(weights, seed)
            report = pub.publish({"norm": weights["norm"], "embed.weight": weights["embed.weight"]})
            assert report.baseline == "device and host", "frozen tensors stay on the host"
    given_there = {name: weights[name] for name in ("norm", "embed.weight")}
    read = read_weights(bucket, base=tmp_path / "base")
    assert equal({name: read[name] for name in given_there}, bits_of(given_there))


WATCHED = FILES | {on_device.__file__}


NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize(("begun", "every"), [(2, 11), *(pytest.param(begun, 2, marks=NIGHTLY) for begun in (0, 1, 2))])
def test_a_publish_cut_short_at_any_line_ends_in_true_weights_or_says_that_only_a_new_publisher_goes_on(
    begun, every, quick_retries
):
    went_on = []
    for number in itertools.count(1, every):
        weights = {name: fp32()[name] for name in ("norm", "scale")}
        _, going = cut_short(Watchdog(number, WATCHED), weights, begun)
        if going is None:
            break
        went_on.append(going)
    assert went_on.count(True) > went_on.count(False) > 0


def test_the_host_never_sees_the_baseline_again_in_a_usual_publish(monkeypatch):
    weights = fp32()
    with publishing(fresh(), baseline="device", cls=DevicePublisher) as pub:
        pub.publish(weights)
        pub.publish(weights)
        monkeypatch.setattr(on_device.OnDevice, "home", lambda held: pytest.fail("the baseline came home"))
        step(weights, 1)
        assert pub.publish(weights).changed
        monkeypatch.undo()


def test_a_process_whose_tensors_are_on_the_cpu_never_touches_cuda_nor_the_sweeps():
    code = """
import sys, torch, deltawire
class Untouched:
    def __getattr__(self, name): raise AssertionError(f"torch.cuda.{name}")
weights = {"w": torch.randn(40, 8)}
real, torch.cuda = torch.cuda, Untouched()
with deltawire.Publisher(deltawire.open_bucket("memory://x")) as pub:
    for _ in range(3):
        weights["w"].add_(0.01)
        assert pub.publish(weights).baseline == "host"
torch.cuda = real
print([name for name in sys.modules if name.startswith(("deltawire.weights.device", "triton"))
       or name.endswith("on_device")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


class Gpu:
    """What torch.cuda says of a device of 100 units."""

    def __init__(self, free, reserved, peak):
        self.mem_get_info = lambda device: (free, 100)
        self.memory_reserved, self.max_memory_reserved = (lambda device: reserved), (lambda device: peak)


@pytest.mark.parametrize(
    ("free", "reserved", "peak", "fits"), [(30, 50, 50, True), (30, 50, 51, False), (29, 50, 50, False)]
)
def test_a_tenth_of_the_device_stays_free_after_the_peak(free, reserved, peak, fits, monkeypatch):
    from deltawire.publish.devices import Cuda

    monkeypatch.setattr(torch, "cuda", Gpu(free, reserved, peak))
    assert Cuda().has_room("cuda:0", 20) is fits


def test_the_choice_of_host_or_file_is_kept():
    for asked in ("host", "file"):
        place = Place(asked, CpuDevice())
        for _ in range(3):
            place.begin()
            assert not place.takes(torch.zeros(3), None)
