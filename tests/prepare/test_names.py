"""A trainer's tensors under the checkpoint's names: views of the same memory, and a name without a place is refused."""

import numpy as np
import pytest
import torch

import deltawire as dw
from deltawire.errors import ShapeMismatch, UnknownTensor
from deltawire.prepare.names import NameMap, View

EXPERTS, WIDTH, HIDDEN = 3, 4, 5
FUSED = {
    "experts.gate_up": tuple(
        View(f"experts.{expert}.{leaf}", ((expert, expert + 1), (start, start + WIDTH), (0, HIDDEN)), dims)
        for expert in range(EXPERTS)
        for leaf, start, dims in (("gate", 0, (1, 2)), ("up", WIDTH, (2, 1)))
    ),
    "embed": (View("embed"),),
    "head": (View("embed"),),
}
"""per expert the upper half as it is and the lower half transposed, and a tied head"""


def fused(make):
    return make(range(EXPERTS * 2 * WIDTH * HIDDEN)).reshape(EXPERTS, 2 * WIDTH, HIDDEN)


@pytest.mark.parametrize("make", [torch.tensor, np.array], ids=["torch", "numpy"])
def test_each_part_of_a_fused_tensor_is_a_view_of_it_and_writing_to_it_writes_the_trainers_tensor(make):
    whole = fused(make)
    parts = dict(NameMap(FUSED)([("experts.gate_up", whole)]))
    assert len(parts) == 2 * EXPERTS
    for expert in range(EXPERTS):
        assert dw.equal({"": parts[f"experts.{expert}.gate"]}, {"": whole[expert, :WIDTH]})
        assert dw.equal({"": parts[f"experts.{expert}.up"]}, {"": whole[expert, WIDTH:].T})
    for part in parts.values():
        part[...] = 7
    assert bool((whole == 7).all())


@pytest.mark.parametrize(
    "given",
    [
        "layers.0.q.weight", "_orig_mod.layers.0.q.weight", "layers.0._orig_mod.q.weight", "module.layers.0.q.weight",
        "_orig_mod.module.layers.0._orig_mod.q.weight", "base_model.model.layers.0.q.base_layer.weight",
        "module.base_model.model.layers.0.q.weight",
        "_fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.q.weight",
    ],
)  # fmt: skip
@pytest.mark.parametrize("names", [NameMap(), NameMap({"layers.0.q.weight": (View("q"),)})], ids=["bare", "mapped"])
def test_what_wrappers_put_into_a_name_is_taken_out_again(given, names):
    tensor = torch.ones(2)
    [(name, same)] = names([(given, tensor)])
    assert name == ("layers.0.q.weight" if names.views is None else "q")
    assert same is tensor


def test_a_name_that_a_model_has_itself_is_left_as_it_is():
    names = NameMap({"module.lora_gate": (View("w"),), "a.base_layer.w": (View("v"),)})
    pairs = [("module.lora_gate", torch.ones(1)), ("a.base_layer.w", torch.ones(2))]
    assert [name for name, _ in names(pairs)] == ["w", "v"]


def test_an_unmapped_name_is_refused_with_the_closest_names():
    with pytest.raises(UnknownTensor, match=r"'experts\.gate_pu'.*closest there: experts\.gate_up"):
        list(NameMap(FUSED)([("experts.gate_pu", torch.ones(1))]))


@pytest.mark.parametrize("name", ["q.lora_A.default.weight", "q.lora_magnitude_vector.default", "h.modules_to_save.w"])
@pytest.mark.parametrize("names", [NameMap(), NameMap(FUSED)], ids=["bare", "mapped"])
def test_a_tensor_of_an_adapter_is_refused_with_the_two_ways_on(name, names):
    with pytest.raises(UnknownTensor, match=r"merge_and_unload.*deltawire\.trainers\.lora"):
        list(names([(f"base_model.model.{name}", torch.ones(1))]))


@pytest.mark.parametrize("make", [torch.ones, np.ones], ids=["torch", "numpy"])
@pytest.mark.parametrize("order", [("embed", "head"), ("head", "embed"), ("head",)], ids=" ".join)
def test_a_tied_weight_comes_once_and_under_its_canonical_name(make, order):
    tensor = make((3, 2))
    assert [name for name, _ in NameMap(FUSED)((name, tensor) for name in order)] == ["embed"]


@pytest.mark.parametrize("make", [torch.ones, np.ones], ids=["torch", "numpy"])
def test_two_tensors_under_the_names_of_a_tied_weight_are_refused_even_when_equal(make):
    with pytest.raises(UnknownTensor, match=r"head and embed are tied.*tie_weights"):
        list(NameMap(FUSED)((name, make((3, 2))) for name in ("embed", "head")))


def test_the_same_memory_read_another_way_is_not_the_same_tensor():
    square = torch.ones(2, 2)
    with pytest.raises(UnknownTensor, match="tied"):
        list(NameMap(FUSED)([("embed", square), ("head", square.T)]))


def test_a_fused_tensor_of_another_shape_is_refused():
    with pytest.raises(ShapeMismatch, match=r"experts\.gate_up: shape \[3, 8, 6\], but its views are of \[3, 8, 5\]"):
        list(NameMap(FUSED)([("experts.gate_up", torch.ones(3, 8, 6))]))


WHOLE = ((0, 4), (0, 2))


@pytest.mark.parametrize(
    "views",
    [
        (),
        (View("a", ((0, 2), (0, 2)), (0, 1)), View("b", ((3, 4), (0, 2)), (0, 1))),
        (View("a", WHOLE, (0, 1)), View("b", ((2, 4), (0, 2)), (0, 1))),
        (View("a", ((0, 2), (0, 2)), (0, 1)), View("b", ((0, 2), (0, 2)), (0, 1)), View("c", ((4, 8), (0, 2)), (0, 1))),
        (View("a", WHOLE, (0, 1)), View("b", ((0, 0),), (0,))),
        (View("a"), View("b")),
        (View("a"), View("b", WHOLE, (0, 1))),
    ],
    ids=[
        "nothing",
        "a gap",
        "a part twice",
        "a gap as large as what comes twice",
        "of several sizes",
        "all twice",
        "all and all",
    ],
)
def test_views_that_are_not_each_element_once_are_refused(views):
    with pytest.raises(ShapeMismatch, match="w: "):
        NameMap({"w": views})


@pytest.mark.parametrize("dims", [(0,), (0, 0), (0, 1, 1), (0, 1, 2), (-1, 0)])
def test_a_view_that_loses_a_dimension_or_has_one_twice_is_refused(dims):
    with pytest.raises(ShapeMismatch, match="w: dimensions"):
        View("w", WHOLE, dims)


def test_a_publisher_ships_the_checkpoints_names_and_says_which_a_base_lacks(tmp_path):
    whole, embed = fused(torch.tensor).float(), torch.ones(3, 2)
    with dw.Publisher(dw.open_bucket((tmp_path / "b").as_uri(), create=True), prepare=[NameMap(FUSED)]) as publisher:
        publisher.publish({"module.experts.gate_up": whole, "module.embed": embed, "module.head": embed})
        whole[1, 0] += 1
        report = publisher.publish({"experts.gate_up": whole, "embed": embed})
        assert (report.changed, report.total) == (HIDDEN, whole.numel() + embed.numel())
    dw.materialize(dw.open_bucket((tmp_path / "b").as_uri()), tmp_path / "base")
    with (
        dw.Publisher(dw.open_bucket("memory://"), base=tmp_path / "base", prepare=[NameMap()]) as publisher,
        pytest.raises(UnknownTensor, match=r"'experts\.gate_up' is not in this run's tensor table; closest there: exp"),
    ):
        publisher.publish({"experts.gate_up": whole})
