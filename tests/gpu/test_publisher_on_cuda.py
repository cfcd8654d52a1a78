"""A publisher of CUDA tensors ships the bits that they had at the call, wherever its baseline lies."""

from contextlib import nullcontext

import pytest
import torch
from runs import PATIENCE, fresh, publishing, read_weights

import deltawire as dw
from deltawire.weights.bits import Bits
from deltawire.weights.tensors import cast

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cpu_counts_as_a_device")]
SHAPES = {"embed.weight": (4096, 256), "layers.0.weight": (1000, 333), "layers.0.bias": (7,), "scale": ()}
DTYPES = [torch.float32, torch.bfloat16]
STEPS = 4
LEFT = 32 << 20
"""bytes of device memory that are left when it is full"""
BUSY = 200_000_000
"""cycles, about a tenth of a second"""


@pytest.fixture(params=["auto", "device", "host", "file"])
def bucket_and_publisher(request):
    bucket = fresh()
    with publishing(bucket, baseline=request.param) as publisher:
        yield bucket, publisher


def weights_of(device, dtype=torch.float32, seed=0):
    random = torch.Generator(device).manual_seed(seed)
    return {
        name: (0.02 * torch.randn(shape, generator=random, device=device)).to(dtype) for name, shape in SHAPES.items()
    }


def expected(weights, device) -> dict[str, Bits]:
    """The bits that a server must hold. On a device a NaN is rounded to what numpy makes of it, torch's is another."""
    held = {name: (tensor.detach().cpu(), tensor.device.type == device) for name, tensor in weights.items()}
    return {
        name: cast(tensor.numpy() if there and tensor.dtype == torch.float32 else tensor, "BF16").copy()
        for name, (tensor, there) in held.items()
    }


def step(weights, seed, share=0.01):
    """An optimizer step in place: about this share of the elements moves by some bits, some to NaN or to -0.0."""
    random = torch.Generator("cpu").manual_seed(seed)
    for tensor in weights.values():
        at = torch.randint(max(1, tensor.numel()), (max(1, int(share * tensor.numel())),), generator=random)
        flat, at = tensor.view(-1) if tensor.is_contiguous() else tensor, at.to(tensor.device)
        if flat.dim() == 1:
            flat[at] = flat[at] * 1.01
            flat[at[:1]] = [float("nan"), -0.0, 1e-40, float("inf")][seed % 4]
        else:
            flat.mul_(1.01)


def assert_ships(bucket, publisher, weights, want):
    report = publisher.publish(weights)
    publisher.flush(PATIENCE)
    assert dw.equal(read_weights(bucket, report.version), want)
    return report


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_version_is_bit_for_bit(dtype, device, bucket_and_publisher):
    bucket, publisher = bucket_and_publisher
    weights = weights_of(device, dtype)
    for number in range(STEPS):
        report = assert_ships(bucket, publisher, weights, expected(weights, device))
        assert report.changed > 0
        step(weights, number)
    everything = {name: tensor + 1 for name, tensor in weights.items()}
    assert assert_ships(bucket, publisher, everything, expected(everything, device)).density > 0.9
    assert assert_ships(bucket, publisher, everything, expected(everything, device)).changed == 0


def test_strided_tensors_and_those_of_several_devices_are_shipped(device, bucket_and_publisher):
    bucket, publisher = bucket_and_publisher
    weights = weights_of(device)
    weights["layers.0.weight"] = torch.randn(333, 1000, device=device).t()
    weights["embed.weight"] = torch.randn(4096, 512, device=device)[:, ::2]
    weights["offloaded"] = torch.randn(500, 300)
    weights["empty"] = torch.empty(0, 4, device=device)
    for number in range(STEPS):
        assert_ships(bucket, publisher, weights, expected(weights, device))
        step({name: tensor for name, tensor in weights.items() if tensor.numel()}, number)


def test_a_step_queued_right_after_publish_does_not_reach_the_version(device, bucket_and_publisher):
    """publish may return while its stream still reads; the trainer's next kernel then waits for that."""
    bucket, publisher = bucket_and_publisher
    weights = weights_of(device)
    for number in range(STEPS):
        want = expected(weights, device)
        report = publisher.publish(weights)
        for tensor in weights.values():
            tensor.add_(1.0 + number)
        publisher.flush(PATIENCE)
        assert dw.equal(read_weights(bucket, report.version), want)


def test_a_step_still_running_on_the_trainers_stream_is_waited_for(device, bucket_and_publisher):
    bucket, publisher = bucket_and_publisher
    weights = weights_of(device)
    publisher.publish(weights)
    stream = torch.cuda.stream(torch.cuda.Stream()) if device != "cpu" else nullcontext()
    with stream:
        for number in range(STEPS):
            later = {name: tensor + 1.0 for name, tensor in weights.items()}
            want = expected(later, device)
            if device != "cpu":
                torch.cuda._sleep(BUSY)
            for name, tensor in weights.items():
                tensor.copy_(later[name])
            report = publisher.publish(weights)
            for tensor in weights.values():
                tensor.add_(number)
            publisher.flush(PATIENCE)
            assert dw.equal(read_weights(bucket, report.version), want)


def test_an_iterator_that_reuses_one_buffer_ships_each_tensor(device, bucket_and_publisher):
    """As a gather of one full tensor after another does. What comes of an iterator is read before the next is asked."""
    bucket, publisher = bucket_and_publisher
    weights = weights_of(device)
    buffer = torch.empty(max(tensor.numel() for tensor in weights.values()), device=device)

    def gathered():
        for name, tensor in weights.items():
            held = buffer[: tensor.numel()].view(tensor.shape)
            held.copy_(tensor)
            yield name, held
        buffer.fill_(float("nan"))

    for number in range(STEPS):
        assert_ships(bucket, publisher, gathered(), expected(weights, device))
        step(weights, number)


@pytest.mark.parametrize("before", [0, 3], ids=["from the start", "later"])
def test_memory_of_the_device_that_runs_out_never_reaches_the_trainer(before, device):
    """Where the baseline finds no room on the device, or our work there none, it lies on the host."""
    if device == "cpu":
        pytest.skip("the memory of a host is not to be filled")
    bucket, weights, hold = fresh(), weights_of(device), None
    with publishing(bucket, baseline="auto") as publisher:
        for number in range(2 * STEPS):
            if number == before:
                torch.cuda.empty_cache()
                size = torch.cuda.mem_get_info()[0] - LEFT
                hold = torch.empty(size, dtype=torch.uint8, device=device)
            assert_ships(bucket, publisher, weights, expected(weights, device))
            for tensor in weights.values():
                tensor.mul_(1.01)
        del hold
