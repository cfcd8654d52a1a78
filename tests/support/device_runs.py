"""Runs whose baseline lies on a device, beside the same on the host: what each captures and ships."""

import numpy as np
import torch
from cpu_devices import CpuDevice, DevicePublisher
from hypothesis import strategies as st
from runs import PATIENCE, fresh, publish_all, read_weights
from strategies import changed, random_bits, seeds
from watchdog import publish

from deltawire.publish.capture import WholeCapturer
from deltawire.publish.capturer import CaptureOptions
from deltawire.publish.pending import ship
from deltawire.publish.requirements import LISTED
from deltawire.weights.tensors import as_torch, cast, equal

DTYPES = ["F32", "BF16", "F16", "F64", "F8_E4M3", "F8_E5M2", "I8", "U8", "I32", "I64", "BOOL"]
SHAPES = [(), (0,), (1,), (7,), (5, 13), (64, 40), (3, 4, 50)]
HERE = CpuDevice(only=lambda tensor: False)
"""no tensor is on a device"""


def opened(folder, bucket=None, *, baseline="host", codec="subset", dtype="BF16", devices=None, **how):
    """A capturer of a run whose every number is fixed."""
    folder.mkdir(exist_ok=True)
    about = CaptureOptions(
        None, dtype, None, clock=lambda: 1.0, codecs=LISTED[codec], new_run_id=lambda: "0" * 16,
        baseline=baseline, devices=devices or (HERE if baseline == "host" else CpuDevice()), **how,
    )  # fmt: skip
    return WholeCapturer(bucket or fresh(), folder, about)


def captured(capturer, weights, *, stay=True):
    """A publish's versions: what each ships, and its digests."""
    capture = capturer.capture(weights.items(), step=None, metrics=None, stay=stay)
    capturer.transition.end()
    return [(dict(ship(version).payloads), version.digests) for version in capture.versions]


def sent(versions):
    """Payloads by key; an anchor's are files of the same name elsewhere."""
    return [
        ({key: data if isinstance(data, bytes) else data.read_bytes() for key, data in files.items()}, digests)
        for files, digests in versions
    ]


@st.composite
def histories(draw, dtypes=DTYPES):
    """Versions of some tensors of any dtypes, without a NaN that a cast would make: those differ by torch's device."""
    rng = np.random.default_rng(draw(seeds))
    kinds = draw(st.lists(st.tuples(st.sampled_from(dtypes), st.sampled_from(SHAPES)), min_size=1, max_size=5))
    weights = {f"layer.{number}.weight": tame(random_bits(rng, *kind)) for number, kind in enumerate(kinds)}
    versions = [weights]
    for how in draw(st.lists(st.sampled_from(["nothing", "a few by one", "half", "anything"]), min_size=2, max_size=4)):
        versions.append({name: tame(changed(rng, bits, how)) for name, bits in versions[-1].items()})
    return [{name: as_torch(bits.copy()) for name, bits in version.items()} for version in versions]


def tame(bits):
    if bits.dtype in ("F32", "F64", "F16"):
        data = bits.data.view({"F32": np.float32, "F64": np.float64, "F16": np.float16}[bits.dtype])
        data[np.isnan(data)] = 1.0
    return bits


def fp32(seed=0):
    torch.manual_seed(seed)
    shapes = {"embed.weight": (60, 8), "layer.0.weight": (16, 8), "layer.0.bias": (16,), "norm": (8,), "scale": ()}
    return {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}


def step(weights, seed, share=0.2):
    """An optimizer step, in place."""
    torch.manual_seed(seed)
    for tensor in weights.values():
        tensor.add_(torch.randn_like(tensor) * 0.02 * (torch.rand_like(tensor) < share))


def bits_of(weights):
    return {name: cast(tensor.contiguous(), "BF16").copy() for name, tensor in weights.items()}


def cut_short(watchdog, weights, begun, **how):
    """Publish from a device under a watchdog, after `begun` publishes, then publish other weights, which are read back.
    The bucket, and whether the publisher went on; None for that if the watchdog did not raise."""
    bucket = fresh()
    pub = DevicePublisher(bucket, baseline="device", **how)
    try:
        for seed in range(begun):
            pub.publish(weights)
            step(weights, seed, 1.0)
        pub.flush(timeout=PATIENCE)
        try:
            with watchdog:
                pub.publish(weights)
            return bucket, None
        except TimeoutError:
            step(weights, 8, 1.0)
        went_on = publish(pub, weights)
    finally:
        pub.close(timeout=PATIENCE)
    if not went_on:
        publish_all(bucket, weights, **how)
    assert equal(read_weights(bucket), bits_of(weights)), watchdog.where
    return bucket, went_on
