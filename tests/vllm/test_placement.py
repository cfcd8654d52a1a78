"""A loader is watched once, nothing is written, and every element is found where the loader would put it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deltawire.errors import EngineUnsupported
from deltawire.manifests import TensorEntry
from deltawire.tensors import as_bits
from deltawire.vllm.live import LiveWeights
from deltawire.vllm.memory import Memory
from deltawire.vllm.placement import Placement, probe


class Model(nn.Module):
    """Parameters by shape, and a loader given as a function of (model, name, tensor)."""

    def __init__(self, loader, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16), requires_grad=False))
        self._loader = loader

    def load_weights(self, weights):
        for name, tensor in weights:
            self._loader(self, name, tensor)


def watch(model: Model, **shapes) -> Placement:
    table = [TensorEntry(name, "BF16", shape) for name, shape in shapes.items()]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    placement = probe(table, model.load_weights, dict(model.named_parameters()))
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    return placement


def assert_found(model: Model, placement: Placement, **shapes) -> None:
    """Load real values by the model's loader and read every one back through the placement."""
    values = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    model.load_weights(iter(values.items()))
    live = dict(model.named_parameters())
    for name, value in values.items():
        bits = as_bits(value).data
        positions = np.arange(bits.size)
        found, hits = np.zeros_like(bits), np.zeros(bits.size, int)
        for box in placement.boxes[name]:
            memory = Memory(live[box.parameter])
            inside, offsets = box.locate(positions)
            found[inside] = memory.gather(memory.on_device(offsets))
            hits[inside] += 1
        assert (hits == 1).all()
        assert np.array_equal(found, bits)


def fused(model, name, tensor):
    model.qkv.data.narrow(0, 4 * "qkv".index(name), 4).copy_(tensor)


def transposed(model, name, tensor):
    model.w.data.copy_(tensor.t())


def per_expert(model, name, tensor):
    for expert, part in enumerate(tensor.clone().unbind(0)):
        model.w.data[expert].copy_(part.contiguous().t())


def padded(model, name, tensor):
    model.w[: tensor.shape[0]].data.copy_(tensor)
    model.w[tensor.shape[0] :].data.fill_(0)


def by_item(model, name, tensor):
    model.w.data[...] = tensor.to(torch.bfloat16).view(tensor.shape)


def columns(model, name, tensor):
    for half, part in enumerate(tensor.chunk(2, dim=1)):
        model.w.data[half].copy_(part)


@pytest.mark.parametrize(
    ("loader", "parameters", "checkpoint"),
    [
        (fused, {"qkv": (12, 8)}, {"q": (4, 8), "k": (4, 8), "v": (4, 8)}),
        (transposed, {"w": (5, 7)}, {"w": (7, 5)}),
        (per_expert, {"w": (3, 4, 6)}, {"w": (3, 6, 4)}),
        (padded, {"w": (16, 4)}, {"w": (10, 4)}),
        (by_item, {"w": (3, 3)}, {"w": (3, 3)}),
        (columns, {"w": (2, 5, 3)}, {"w": (5, 6)}),
    ],
    ids=["fused", "transposed", "cloned and cut", "padded", "set by item", "columns"],
)
def test_what_a_loader_copies_is_found_and_nothing_is_written(loader, parameters, checkpoint):
    model = Model(loader, **parameters)
    placement = watch(model, **checkpoint)
    assert placement.unfit == {}
    assert_found(model, placement, **checkpoint)


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    before=st.integers(0, 3),
    after=st.integers(0, 3),
    turned=st.booleans(),
    copied=st.booleans(),
)
def test_any_slice_or_turn_of_a_matrix_is_found(rows, columns, before, after, turned, copied):
    def loader(model, name, tensor):
        part = tensor.clone() if copied else tensor
        part = part.t() if turned else part
        model.w.data.narrow(1, before, part.shape[1]).copy_(part)

    height, width = (columns, rows) if turned else (rows, columns)
    model = Model(loader, w=(height, before + width + after))
    placement = watch(model, x=(rows, columns))
    assert placement.unfit == {}
    assert_found(model, placement, x=(rows, columns))


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (lambda model, name, tensor: model.w.data.copy_(tensor + 1), "computed"),
        (lambda model, name, tensor: (model.w.data.copy_(tensor), model.w.data[1:2].fill_(0)), "runs aten.fill_"),
        (lambda model, name, tensor: model.w.data.copy_(tensor[0]), "no rectangle"),
        (lambda model, name, tensor: model.w.data[:2].copy_(tensor[:2]), "8 of its 16 elements"),
        (lambda model, name, tensor: model.w.data.copy_(tensor.float()), "computed|copied from"),
        (lambda model, name, tensor: None, "does not load it"),
    ],
    ids=["computed", "filled over", "spread", "half of it", "converted", "not loaded"],
)
def test_what_is_not_a_whole_plain_copy_is_refused_by_name(loader, reason):
    model = Model(loader, w=(4, 4))
    placement = watch(model, x=(4, 4))
    with pytest.raises(EngineUnsupported, match=f"x .*({reason})"):
        placement.require(["x"])


def test_a_loader_that_rebinds_a_parameter_is_caught():
    def loader(model, name, tensor):
        model.w.data = tensor

    model = Model(loader, w=(4, 4))
    with pytest.raises(EngineUnsupported, match="changed live weights"):
        LiveWeights(model, [TensorEntry("x", "BF16", (4, 4))], transformed={})


def test_a_parameter_that_was_changed_after_loading_is_refused_by_name():
    model = Model(lambda model, name, tensor: model.w.data.copy_(tensor), w=(4, 4))
    with pytest.raises(EngineUnsupported, match="w was rewritten after loading"):
        LiveWeights(model, [TensorEntry("x", "BF16", (4, 4))], transformed={"w": "rewritten after loading"})


def test_a_server_of_another_dtype_is_refused():
    model = Model(lambda model, name, tensor: model.w.data.copy_(tensor), w=(4, 4))
    with pytest.raises(EngineUnsupported, match=r"BF16|float16"):
        LiveWeights(model, [TensorEntry("x", "F16", (4, 4))], transformed={})
