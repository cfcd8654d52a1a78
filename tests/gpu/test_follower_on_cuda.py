"""A module on a GPU follows a run bit for bit, and takes no memory that is not there."""

import pytest
import torch
from random_models import empty_model, fill
from runs import PATIENCE, fresh, publishing

import deltawire as dw
from deltawire.torch import follow
from deltawire.weights.tensors import cast

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cpu_counts_as_a_device")]
FREE = 1 << 30
"""bytes of device memory that vLLM leaves to others"""


def expected(weights):
    return {name: cast(tensor.detach().cpu(), "BF16").copy() for name, tensor in weights.items()}


def held_by(model):
    return {name: cast(tensor.detach().cpu(), "BF16").copy() for name, tensor in model.named_parameters()}


def masters_of(model, device):
    return {name: tensor.detach().float().to(device) for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("shape", ["tiny", "moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_module_goes_from_version_to_version_and_back(shape, dtype, device):
    trained, bucket, versions = fill(empty_model(shape), device), fresh(), []
    masters = masters_of(trained, device)
    with publishing(bucket) as publisher:
        for number in range(4):
            publisher.publish(masters)
            publisher.flush(PATIENCE)
            versions.append(expected(masters))
            for name, tensor in masters.items():
                if number == 2 and "norm" in name:
                    tensor.add_(1.0)  # all of it
                tensor.view(-1)[number::97] *= 1.01
    followed = fill(empty_model(shape), device, seed=1).to(dtype)
    addresses = [parameter.data_ptr() for parameter in followed.parameters()]
    with follow(followed, bucket.url) as follower:
        for version in (0, 1, 3, 1, 2):
            assert follower.step(version).version == version
            assert dw.equal(held_by(followed), versions[version])
    assert [parameter.data_ptr() for parameter in followed.parameters()] == addresses


def test_a_join_from_foreign_weights_and_a_dense_update_need_a_gigabyte_at_most(device):
    """What vLLM leaves is little: everything beside the model is staged in an arena, and through the host."""
    if device == "cpu":
        pytest.skip("the memory of a host is not to be filled")
    bucket, followed = fresh(), fill(empty_model("0.6b"), device, seed=1)
    masters = masters_of(fill(empty_model("0.6b"), device), "cpu")
    with publishing(bucket) as publisher:
        publisher.publish(masters)
        publisher.flush(PATIENCE)
        torch.cuda.empty_cache()
        hold = torch.empty(torch.cuda.mem_get_info()[0] - FREE, dtype=torch.uint8, device=device)
        with follow(followed, bucket.url) as follower:
            assert follower.position is None
            assert follower.step().version == 0
            assert dw.equal(held_by(followed), expected(masters))
            for tensor in masters.values():
                tensor.mul_(1.01)
            publisher.publish(masters)
            publisher.flush(PATIENCE)
            assert follower.step().version == 1
        del hold
        assert dw.equal(held_by(followed), expected(masters))
