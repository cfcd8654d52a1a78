"""A loader is watched once, nothing is written, and every element is found where the loader would put it."""

from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from locating import located
from torch import nn

import deltawire as dw
from deltawire.errors import EngineUnsupported
from deltawire.live.accelerator import Accelerators
from deltawire.live.boxes import Placement, box_of
from deltawire.live.coverage import Coverage
from deltawire.live.digests import fingerprints
from deltawire.live.live_weights import LiveWeights, changes_between, tensors_of, watch_loading
from deltawire.live.memory import Memory
from deltawire.live.placement import probe
from deltawire.live.transforms import AfterLoading
from deltawire.weights.table import TensorEntry
from deltawire.weights.tensors import as_bits


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


def table_of(**shapes) -> list[TensorEntry]:
    return [TensorEntry(name, "BF16", shape) for name, shape in shapes.items()]


def watch(model: Model, **shapes) -> Placement:
    table = table_of(**shapes)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    placement = probe(table, model.load_weights, dict(model.named_parameters()))
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    return placement


def test_the_loader_sees_a_checkpoints_tensors_on_the_host_whatever_the_default_device_is():
    seen = []
    model = Model(lambda self, name, tensor: seen.append(tensor.device.type), w=(4, 3))
    with torch.device("meta"):
        probe([TensorEntry("w", "BF16", (4, 3), aliases=("again",))], model.load_weights, {"w": model.w})
    assert seen == ["cpu", "cpu"]


def judge(placement: Placement, **shapes) -> None:
    """Raise EngineUnsupported when this one worker does not hold these tensors whole, as plain copies."""
    placement.require(shapes)
    Coverage({name: int(np.prod(shape)) for name, shape in shapes.items()}, [placement.parts], placement.computed)


def totals(live: LiveWeights) -> dict[str, int]:
    return Coverage(live.sizes, [live.parts]).digests([live.digests()])[0]


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
            inside, offsets = located(box, positions)
            found[inside] = memory.as_checkpoint(memory.gather(offsets))
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


def turn(part, number):
    dims = list(range(part.dim()))
    return part.permute(dims[number % len(dims) :] + dims[: number % len(dims)]) if dims else part


def cut(part, number):
    if not part.dim():
        return part
    dim = number % part.dim()
    start = number // 3 % part.shape[dim]
    return part.narrow(dim, start, 1 + number // 5 % (part.shape[dim] - start))


def piece(part, number):
    if not part.dim():
        return part
    pieces = part.chunk(2, dim=number % part.dim())
    return pieces[number // 2 % len(pieces)]


STEPS = {
    "turn": turn,
    "cut": cut,
    "piece": piece,
    "clone": lambda part, number: part.clone(),
    "contiguous": lambda part, number: part.contiguous(),
    "flatten": lambda part, number: part.reshape(-1),
    "fold": lambda part, number: part.reshape(2, -1) if part.numel() % 2 == 0 else part,
    "every other": lambda part, number: part[::2] if part.dim() else part,
    "select": lambda part, number: part[number % part.shape[0]] if part.dim() > 1 else part,
    "new axis": lambda part, number: part.unsqueeze(number % (part.dim() + 1)),
}
Steps = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 60)), max_size=5)


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), steps=Steps, into=Steps)
def test_whatever_views_and_copies_a_loader_makes_each_element_is_found_where_it_would_put_it(shape, steps, into):
    """`steps` cut the checkpoint's tensor, `into` the parameter; a probe may refuse, but may not be wrong."""

    def source(tensor):
        for name, number in steps:
            tensor = STEPS[name](tensor, number)
        return tensor

    def target(tensor):
        for name, number in into:
            if name not in ("clone", "contiguous", "flatten", "fold"):
                tensor = STEPS[name](tensor, number)
        return tensor

    numbers = torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.int16).reshape(shape)
    wanted = source(numbers)
    room = target(torch.arange(4096).reshape(8, 8, 64))
    if room.dim() < wanted.dim() or any(a < b for a, b in zip(room.shape, wanted.shape, strict=False)):
        return

    def loader(model, name, tensor):
        part = source(tensor)
        place = target(model.w.data)
        for dim, size in enumerate(part.shape):
            place = place.narrow(dim, 0, size)
        while place.dim() > part.dim():
            place = place.select(-1, 0)
        place.copy_(part)

    model = Model(loader, w=(8, 8, 64))
    placement = watch(model, x=tuple(shape))
    model.load_weights([("x", numbers.view(torch.bfloat16))])
    flat = model.w.data.view(torch.int16).reshape(-1)
    positions = np.arange(numbers.numel())
    for box in placement.boxes.get("x", []):
        inside, offsets = located(box, positions)
        assert flat[torch.from_numpy(offsets)].tolist() == (positions[inside] + 1).tolist()
    with suppress(EngineUnsupported):
        judge(placement, x=tuple(shape))
        assert int((flat != 0).sum()) == numbers.numel()


@given(data=st.data())
def test_locating_positions_is_what_walking_the_whole_box_says(data):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    whole = torch.arange(int(np.prod(sizes))).reshape(sizes)
    view = whole
    for name, number in data.draw(Steps):
        if name in ("turn", "cut", "piece", "select", "every other"):
            view = STEPS[name](view, number)
    apart = data.draw(st.sampled_from([1, 3]))  # elements of the storage from one of the box's to the next
    places = 7 + apart * torch.arange(view.numel()).reshape(view.shape)
    dims = zip(view.shape, view.stride(), (apart * stride for stride in places.stride()), strict=True)
    box = box_of(dims, view.storage_offset(), "w", 7)
    wanted = dict(zip(view.flatten().tolist(), places.flatten().tolist(), strict=True))
    positions = np.array(
        sorted(data.draw(st.sets(st.integers(0, whole.numel() - 1), max_size=whole.numel()))), dtype=np.int64
    )
    inside, offsets = located(box, positions)
    assert positions[inside].tolist() == [at for at in positions.tolist() if at in wanted]
    assert offsets.tolist() == [wanted[at] for at in positions.tolist() if at in wanted]


def into(model):
    return model.w.data


def interleaved(model, name, tensor):
    into(model)[:, "xy".index(name) :: 2].copy_(tensor)


def test_two_tensors_whose_elements_alternate_in_one_parameter_are_both_found():
    model = Model(interleaved, w=(3, 8))
    placement = watch(model, x=(3, 4), y=(3, 4))
    assert placement.unfit == {}
    assert_found(model, placement, x=(3, 4), y=(3, 4))


def test_a_buffer_and_a_tied_parameter_are_found_under_the_one_name_that_is_loaded():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16), requires_grad=False)
            self.head = nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed
            self.register_buffer("bias", torch.zeros(5, dtype=torch.bfloat16), persistent=False)

        def load_weights(self, weights):
            for name, tensor in weights:
                getattr(self, name).data.copy_(tensor)

    model = Tied()
    live = LiveWeights(model, table_of(embed=(4, 3), bias=(5,)), loading=AfterLoading())
    values = {"embed": torch.randn(4, 3).bfloat16(), "bias": torch.randn(5).bfloat16()}
    model.load_weights(values.items())
    assert totals(live) == dw.digest(values)


class TwoNames(nn.Module):
    """An embedding and a head, each loaded under its name where `known` has it."""

    def __init__(self, known):
        super().__init__()
        self.known = known
        self.embed = nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16), requires_grad=False)
        self.head = nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16), requires_grad=False)

    def load_weights(self, weights):
        for name, tensor in weights:
            {known: getattr(self, known) for known in self.known}[name].data.copy_(tensor)

    def tie(self):
        self.head = self.embed


ONE = [TensorEntry("embed", "BF16", (4, 3), aliases=("head",))]


@pytest.mark.parametrize("known", [("embed", "head"), ("embed",)])
def test_a_parameter_that_is_tied_again_after_loading_is_one_more_name_of_the_other(known):
    model = TwoNames(known)
    _, loading = watch_loading(model, model.tie)
    assert loading.unexplained == {}
    live = LiveWeights(model, ONE, loading=loading)
    assert [len(parts) for parts in live.parts.values()] == [1]
    model.embed.data.copy_(torch.randn(4, 3))
    assert totals(live) == dw.digest({"embed": model.embed.data})
    if known == ("embed", "head"):
        with pytest.raises(EngineUnsupported, match="this server ties what are two tensors in the run"):
            LiveWeights(model, table_of(embed=(4, 3), head=(4, 3)), loading=loading)


def test_a_model_that_holds_a_tensor_under_each_of_its_names_has_it_twice():
    model = TwoNames(("embed", "head"))
    live = LiveWeights(model, ONE, loading=AfterLoading())
    assert {box.parameter for _, box in live.places("embed")} == {"embed", "head"}
    model.embed.data.fill_(1)
    coverage = Coverage(live.sizes, [live.parts])
    assert coverage.digests([live.digests()])[1] == ["embed"]
    model.head.data.fill_(1)
    assert coverage.digests([live.digests()]) == (dw.digest({"embed": model.head.data}), [])


def test_tensors_without_elements_and_scalars_are_found():
    model = Model(lambda model, name, tensor: getattr(model, name).data.copy_(tensor), none=(0, 4), one=())
    live = LiveWeights(model, table_of(none=(0, 4), one=()), loading=AfterLoading())
    model.one.data.fill_(3)
    assert totals(live) == dw.digest({"none": model.none.data, "one": model.one.data})


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (lambda model, name, tensor: into(model).copy_(tensor + 1), "computed"),
        (lambda model, name, tensor: into(model).add_(tensor), "computed"),
        (lambda model, name, tensor: (into(model).copy_(tensor), into(model)[1:2].fill_(0)), "runs aten.fill_"),
        (lambda model, name, tensor: into(model).copy_(tensor[0]), "no rectangle"),
        (lambda model, name, tensor: into(model).copy_(tensor[0, 0].expand(4, 4)), "no rectangle"),
        (lambda model, name, tensor: into(model).view(2, 8).copy_(tensor.t().contiguous().view(2, 8)), "no rectangle"),
        (lambda model, name, tensor: into(model)[:2].copy_(tensor[:2]), "8 of its 16 elements"),
        (lambda model, name, tensor: [into(model).copy_(tensor[:1]), into(model)[:1].copy_(tensor[1:2])], "no rec"),
        (lambda model, name, tensor: into(model)[[2, 0, 1, 3]].copy_(tensor), "does not load it|computed|no parameter"),
        (lambda model, name, tensor: into(model).__setitem__(torch.tensor([2, 0, 1, 3]), tensor), "computed"),
        (lambda model, name, tensor: into(model).copy_(torch.cat([tensor[2:], tensor[:2]])), "computed"),
        (lambda model, name, tensor: into(model).copy_(tensor.float()), "computed|copied from"),
        (lambda model, name, tensor: into(model).set_(tensor), "computed"),
        (lambda model, name, tensor: None, "does not load it"),
    ],
    ids=[
        "computed", "added", "filled over", "spread", "expanded", "turned and cut across", "half of it", "twice",
        "into a copy", "by index", "joined", "converted", "storage exchanged", "not loaded",
    ],
)  # fmt: skip
def test_what_is_not_a_whole_plain_copy_is_refused_by_name(loader, reason):
    model = Model(loader, w=(4, 4))
    placement = watch(model, x=(4, 4))
    with pytest.raises(EngineUnsupported, match=f"x .*({reason})"):
        judge(placement, x=(4, 4))


def edited_copy(model, name, tensor):
    part = tensor.clone()
    part.add_(1)
    into(model).copy_(part)


def edited_row(model, name, tensor):
    part = tensor.clone()
    part[0].zero_()
    into(model).copy_(part)


def edited_source(model, name, tensor):
    into(model).copy_(tensor.mul_(2))


def overlapping(model, name, tensor):
    into(model).copy_(tensor.as_strided((4, 4), (1, 1)))


@pytest.mark.parametrize("loader", [edited_copy, edited_row, edited_source])
def test_a_temporary_that_a_loader_edits_in_place_is_no_plain_copy_any_more(loader):
    """As a norm that keeps `1 + w` would load: served as `w`, its digests would agree with themselves."""
    placement = watch(Model(loader, w=(4, 4)), x=(4, 4))
    with pytest.raises(EngineUnsupported, match=r"x .its loader writes w .* from values it computed"):
        judge(placement, x=(4, 4))


def test_a_view_that_overlaps_itself_does_not_pass_for_the_whole_tensor():
    placement = watch(Model(overlapping, w=(4, 4)), x=(16,))
    with pytest.raises(EngineUnsupported, match="16 of its 16 elements arrive, or some arrive twice"):
        judge(placement, x=(16,))


def rebinds_data(model, name, tensor):
    model.w.data = tensor


def rebinds_the_parameter(model, name, tensor):
    model.w = nn.Parameter(tensor, requires_grad=False)


@pytest.mark.parametrize("loader", [rebinds_data, rebinds_the_parameter])
def test_a_loader_that_rebinds_a_parameter_is_refused_and_the_parameter_put_back(loader):
    model = Model(loader, w=(4, 4))
    model.w.data.copy_(torch.randn(4, 4))
    parameter, address, bits = model.w, model.w.data_ptr(), model.w.data.clone()
    with pytest.raises(EngineUnsupported, match=r"rebinds \(w\): all is put back"):
        LiveWeights(model, table_of(x=(4, 4)), loading=AfterLoading())
    assert model.w is parameter
    assert model.w.data_ptr() == address
    assert torch.equal(model.w.data, bits)


def test_a_loader_that_refuses_the_runs_tensors_is_a_typed_error_and_nothing_is_written():
    def loader(model, name, tensor):
        raise KeyError(f"no module named {name}")

    model = Model(loader, w=(4, 4))
    with pytest.raises(EngineUnsupported, match=r"refused x .*no module named x"):
        LiveWeights(model, table_of(x=(4, 4)), loading=AfterLoading())


def test_two_tensors_of_the_run_that_land_in_one_place_are_refused():
    model = Model(lambda model, name, tensor: into(model).copy_(tensor), w=(4, 4))
    with pytest.raises(EngineUnsupported, match=r"y .another tensor of the run lands in the same part of w"):
        LiveWeights(model, table_of(x=(4, 4), y=(4, 4)), loading=AfterLoading())


def test_weights_from_which_a_module_derived_others_after_loading_are_refused():
    class Attention(nn.Module):
        def __init__(self, projection):
            super().__init__()
            self.projection = projection

        def after_loading(self):
            self.derived = self.projection.weight.data.t().contiguous()  # a plain attribute, as vLLM's MLA has

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.projection = nn.Linear(3, 4, bias=False, dtype=torch.bfloat16)
            self.attention = Attention(self.projection)
            self.norm = nn.Linear(3, 3, bias=False, dtype=torch.bfloat16)

        def load_weights(self, weights):
            for name, tensor in weights:
                getattr(self, name).weight.data.copy_(tensor)

    model = Outer()
    before = tensors_of(model)
    known = fingerprints(before, Accelerators())
    assert changes_between(before, tensors_of(model), known) == {}
    model.attention.after_loading()
    transformed = changes_between(before, tensors_of(model), known)
    assert transformed == {"attention.derived": "made after loading"}
    with pytest.raises(EngineUnsupported, match=r"^1 tensors .*projection \(attention.derived was made after loading"):
        LiveWeights(model, table_of(projection=(4, 3), norm=(3, 3)), loading=AfterLoading(transformed))
    LiveWeights(model, table_of(norm=(3, 3)), loading=AfterLoading(transformed))


def test_what_a_step_after_loading_changes_is_told_by_how():
    model = Model(None, a=(2, 2), b=(2, 2), c=(2, 2), d=(2, 2))
    before = tensors_of(model)
    known = fingerprints(before, Accelerators())
    model.a.data.fill_(1)
    model.b.data = torch.ones(2, 2, dtype=torch.bfloat16)
    model.c = nn.Parameter(torch.zeros(0, dtype=torch.bfloat16), requires_grad=False)
    assert changes_between(before, tensors_of(model), known) == {
        "a": "rewritten after loading",
        "b": "rewritten after loading",
        "c": "replaced after loading",
    }


def test_a_parameter_that_was_changed_after_loading_is_refused_by_name():
    model = Model(lambda model, name, tensor: model.w.data.copy_(tensor), w=(4, 4))
    with pytest.raises(EngineUnsupported, match="w was rewritten after loading"):
        LiveWeights(model, table_of(x=(4, 4)), loading=AfterLoading({"w": "rewritten after loading"}))


def test_a_server_of_another_dtype_is_refused():
    model = Model(lambda model, name, tensor: model.w.data.copy_(tensor), w=(4, 4))
    with pytest.raises(EngineUnsupported, match=r"BF16|float16"):
        LiveWeights(model, [TensorEntry("x", "F16", (4, 4))], loading=AfterLoading())
