"""What a server does to a module's weights after loading: followed, repeated, or refused, and never patched stale."""

import uuid

import pytest
import torch
from runs import PATIENCE
from torch import nn

import deltawire as dw
from deltawire.errors import EngineUnsupported
from deltawire.follow.status import audited
from deltawire.live.coverage import Coverage
from deltawire.live.live_weights import LiveWeights, watch_loading
from deltawire.live.memory import same_bits
from deltawire.live.post_load import held
from deltawire.live.worker import LiveWorker
from deltawire.live.writes import Swap
from deltawire.weights.digest import digest_bits
from deltawire.weights.table import TensorEntry
from deltawire.weights.tensors import as_bits

SHAPE = (4, 32, 6)


class Method:
    """What vLLM calls a quant method: here one that keeps the weight as it is."""

    def process_weights_after_loading(self, layer):
        pass

    def apply(self, layer, inputs):
        return inputs @ layer.weight.t()


class Blocks(Method):
    """Rows in blocks of 16, columns first, as a grouped matrix product wants its experts; only the first time."""

    packed = False

    def process_weights_after_loading(self, layer):
        if self.packed:
            return
        experts, rows, columns = layer.weight.shape
        blocks = layer.weight.data.reshape(experts, rows // 16, 16, columns).transpose(2, 3).contiguous()
        layer.weight = nn.Parameter(blocks.reshape(layer.weight.shape), requires_grad=False)
        self.packed = True


class Halves(Method):
    def process_weights_after_loading(self, layer):
        layer.weight.data = torch.cat(layer.weight.data.chunk(2)[::-1])


class Rounded(Method):
    def process_weights_after_loading(self, layer):
        layer.weight.data = (layer.weight.data * 8).round() / 8


class Padded(Method):
    def process_weights_after_loading(self, layer):
        layer.weight = nn.Parameter(nn.functional.pad(layer.weight.data, (0, 2)), requires_grad=False)


class Scaled(Method):
    """Eight bits and a scale for each row, as quantised linear weights are."""

    def process_weights_after_loading(self, layer):
        weight = layer.weight.data.float()
        scale = weight.abs().amax(dim=-1, keepdim=True) / 448
        layer.weight = nn.Parameter((weight / scale).to(torch.float8_e4m3fn), requires_grad=False)
        layer.weight_scale = nn.Parameter(scale, requires_grad=False)

    def apply(self, layer, inputs):
        return inputs @ (layer.weight.float() * layer.weight_scale).t().to(inputs.dtype)


class Hidden(Method):
    def process_weights_after_loading(self, layer):
        kept = layer.weight.data.t().clone()
        layer.linear = lambda inputs: inputs @ kept
        layer.weight = nn.Parameter(torch.empty(0, dtype=torch.bfloat16), requires_grad=False)

    def apply(self, layer, inputs):
        return layer.linear(inputs)


class Derived(Method):
    def process_weights_after_loading(self, layer):
        layer.transposed = layer.weight.data.transpose(0, 1).contiguous()


class Noisy(Method):
    def process_weights_after_loading(self, layer):
        layer.weight.data = layer.weight.data + torch.rand(())


class Once(Method):
    done = False

    def process_weights_after_loading(self, layer):
        if Once.done:
            raise RuntimeError("the device was set up already")
        Once.done = True
        layer.weight.data = layer.weight.data + 1


def rebinds(layer, name, new, **marks):
    """How vLLM's `replace_parameter` puts a result in place up to 0.32: as a new parameter."""
    parameter = nn.Parameter(new, requires_grad=False)
    parameter.__dict__.update(marks)
    setattr(layer, name, parameter)


def copies_in_place(layer, name, new, **marks):
    """And since 0.33: into the parameter there is, which keeps its marks, or under it."""
    old = getattr(layer, name)
    if (old.shape, old.stride(), old.dtype) == (new.shape, new.stride(), new.dtype):
        old.data.copy_(new)
    else:
        old.data = new
    old.__dict__.update(marks)


class Strided(Method):
    """Puts the weight into rows that are wider than they look, as vLLM 0.33 does on gfx11."""

    def process_weights_after_loading(self, layer):
        layer.weight.data = nn.functional.pad(layer.weight.data, (0, 2))[..., :-2]


class Replacing(Method):
    def __init__(self, replace):
        self.replace = replace


class Doubled(Replacing):
    def process_weights_after_loading(self, layer):
        self.replace(layer, "weight", layer.weight.data * 2)


class Marked(Replacing):
    """Leaves a mark on the weight and one on the layer, and does nothing where it finds one."""

    def process_weights_after_loading(self, layer):
        if getattr(layer.weight, "is_doubled", False) or getattr(layer, "is_done", False):
            return
        self.replace(layer, "weight", layer.weight.data * 2, is_doubled=True)
        layer.is_done = True


class Wider(Replacing):
    def process_weights_after_loading(self, layer):
        self.replace(layer, "weight", layer.weight.data.float() * 3)


class Measured(Replacing):
    """Keeps a number that is computed from the weight, beside a weight that only moves."""

    def process_weights_after_loading(self, layer):
        layer.largest = float(layer.weight.data.abs().max())
        self.replace(layer, "weight", layer.weight.data.flip(0))


class Accumulating(Replacing):
    """Writes into tensors that it finds, in a list of the layer's and in one of its own."""

    def __init__(self, replace):
        super().__init__(replace)
        self.totals = [torch.zeros(())]

    def process_weights_after_loading(self, layer):
        scale = 2 + self.totals[0] + layer.totals[0]
        self.replace(layer, "weight", layer.weight.data * scale.bfloat16())
        self.totals[0] += 1
        layer.totals[0] += 1


class Layer(nn.Module):
    def __init__(self, method, shape):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16), requires_grad=False)
        self.quant_method = method
        self.totals = [torch.zeros(())]


class Model(nn.Module):
    def __init__(self, method, shape=SHAPE):
        super().__init__()
        self.layer, self.norm = Layer(method, shape), Layer(Method(), (3,))
        self.shape = shape

    def load_weights(self, weights):
        for name, tensor in weights:
            self.get_submodule(name).weight.data.copy_(tensor)

    def loaded(self, weights):
        """As vLLM loads it: the loader, then each module's transform."""
        self.load_weights(weights.items())

        def process():
            for module in self.modules():
                if hasattr(module, "quant_method"):
                    module.quant_method.process_weights_after_loading(module)

        _, loading = watch_loading(self, process)
        table = [TensorEntry(name, "BF16", tuple(tensor.shape)) for name, tensor in weights.items()]
        return LiveWeights(self, table, loading=loading), loading


def weights_of(shape=SHAPE, seed=0):
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=random).bfloat16() for name, size in (("layer", shape), ("norm", (3,)))}


def totals(live):
    return Coverage(live.sizes, [live.parts]).digests([live.digests()])[0]


def digests(weights):
    return {name: digest_bits(as_bits(tensor).data) for name, tensor in weights.items()}


@pytest.mark.parametrize("method", [Blocks, Halves, Padded])
def test_a_step_that_only_moves_elements_is_learned_and_its_weights_are_read_where_they_lie(method):
    weights = weights_of()
    live, loading = Model(method()).loaded(weights)
    assert [one.prefix for one in loading.transforms] == ["layer"]
    assert live.remade() == []
    assert totals(live) == digests(weights)


@pytest.mark.parametrize(("method", "shape"), [(Rounded, SHAPE), (Scaled, (8, 6)), (Hidden, (8, 6)), (Derived, (8, 6))])
def test_what_any_other_step_made_of_new_weights_is_what_it_makes_of_them_when_loaded(method, shape):
    model, before, after = Model(method(), shape), weights_of(shape), weights_of(shape, seed=1)
    live, _ = model.loaded(before)
    (transform,) = live.remade()
    assert totals(live) == digests(before)
    assert transform.is_current()

    transform.loaded["weight"].data.copy_(after["layer"])
    assert totals(live)["layer"] == digests(after)["layer"]
    assert not transform.is_current()  # the weights are new, what was made of them is not
    fresh = Model(method(), shape)
    fresh.loaded(after)
    shadow = transform.shadow(transform.loaded)
    mine, right = transform.results(shadow), transform.results(model.layer)
    assert mine.keys() == right.keys()
    for name in mine:
        assert same_bits(mine[name], getattr(fresh.layer, name)), name
    if transform.hidden:
        inputs = torch.ones(2, shape[1], dtype=torch.bfloat16)
        assert torch.equal(shadow.linear(inputs), fresh.layer.linear(inputs))


@pytest.mark.usefixtures("held_on")
@pytest.mark.parametrize("method", [Method, Strided, Blocks, Halves, Padded, Rounded, Scaled, Hidden, Derived])
def test_an_update_leaves_a_module_as_one_that_loaded_the_new_weights_and_so_does_the_way_back(method):
    assert_updated_as_loaded(method, (8, 6) if method in (Scaled, Hidden, Derived) else SHAPE)


@pytest.mark.parametrize("replace", [rebinds, copies_in_place])
@pytest.mark.parametrize("method", [Doubled, Marked, Wider, Measured, Accumulating])
def test_a_step_is_done_again_alike_whichever_way_it_puts_its_result_in_place(method, replace):
    model, weights = Model(method(replace)), weights_of()
    live, _ = model.loaded(weights)
    (transform,) = live.remade()
    for _ in range(3):
        assert transform.is_current()
    assert totals(live) == digests(weights)
    assert_updated_as_loaded(lambda: method(replace), SHAPE)


def two_versions(shape):
    """A run of two versions, and their weights."""
    url, weights, versions = f"memory://{uuid.uuid4()}", weights_of(shape), []
    with dw.Publisher(dw.open_bucket(url, create=True)) as publisher:
        for _ in range(2):
            publisher.publish(weights)
            publisher.flush(PATIENCE)
            versions.append({name: tensor.clone() for name, tensor in weights.items()})
            weights["layer"].view(-1)[::17] *= 1.5
            weights["norm"] += 1
    return url, versions


def serving(model, url, weights):
    """A worker whose model loaded these weights."""
    _, loading = model.loaded(weights)
    worker = LiveWorker(model, loading=loading)
    worker.attach(url)
    return worker


@pytest.mark.usefixtures("held_on")
def test_a_result_that_cannot_be_put_back_quarantines_the_worker_though_its_weights_are_back(monkeypatch):
    def out_of_order(swap):
        raise RuntimeError("the device is out of order")

    model, (url, versions) = Model(Scaled(), (8, 6)), two_versions((8, 6))
    worker, write = serving(model, url, versions[0]), Swap.write
    with monkeypatch.context() as broken:
        broken.setattr(Swap, "write", lambda swap: (write(swap), out_of_order(swap)))
        broken.setattr(Swap, "undo", out_of_order)
        worker.commit({"bucket": url, "version": 1})
        assert worker.status().error.kind == "RuntimeError"
    assert (worker.position, worker.status().quarantined) == (None, True)
    worker.commit({"bucket": url, "version": 1})
    assert (worker.status().error, worker.position.version) == (None, 1)
    assert audited([worker.live.audit(None)]).mismatched == []


def assert_updated_as_loaded(method, shape):
    """After each update, forward and back, a module is what one is that loaded those weights."""
    model, (url, versions) = Model(method(), shape), two_versions(shape)
    worker = serving(model, url, versions[0])
    for version in (1, 0, 1):
        worker.commit({"bucket": url, "version": version})
        assert worker.status().error is None
        assert worker.position.version == version
        fresh = Model(method(), shape)
        fresh.loaded(versions[version])
        mine, right = held(model.layer), held(fresh.layer)
        assert mine.keys() == right.keys()
        assert all(same_bits(mine[name], right[name]) for name in mine)
        assert vars(model.layer).get("largest") == vars(fresh.layer).get("largest")
        assert same_bits(model.norm.weight, fresh.norm.weight)
        if hasattr(model.layer, "linear"):
            inputs = torch.ones(2, shape[-1], dtype=torch.bfloat16)
            assert torch.equal(model.layer.linear(inputs), fresh.layer.linear(inputs))
        assert audited([worker.live.audit(None)]).mismatched == []


def test_a_step_that_gives_something_else_each_time_is_refused_at_start_up():
    with pytest.raises(
        EngineUnsupported, match="what the server makes of layer after loading is not the same every time"
    ):
        Model(Noisy()).loaded(weights_of())


def test_a_step_that_cannot_be_done_again_does_not_keep_vllm_from_starting_and_is_refused_with_a_bucket():
    with pytest.raises(EngineUnsupported, match=r"layer after loading cannot be done again .RuntimeError: the device"):
        Model(Once()).loaded(weights_of())


def test_a_module_that_no_step_touches_is_left_alone():
    weights = weights_of()
    live, loading = Model(Method()).loaded(weights)
    assert (loading.transforms, loading.unexplained) == ([], {})
    assert totals(live) == digests(weights)


def test_the_watch_is_gone_when_the_model_is_loaded():
    model = Model(Blocks())
    model.loaded(weights_of())
    assert "process_weights_after_loading" not in vars(model.layer.quant_method)
