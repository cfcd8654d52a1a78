"""What a model keeps in fp32 beside bf16 ships so, as routers of ERNIE 4.5, or is not rounded in silence."""

import copy
from contextlib import nullcontext

import pytest
import torch
from runs import fresh, publishing, read_weights
from safetensors.torch import load_file
from torch import nn
from transformers import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    HunYuanMoEV1Config,
    HunYuanMoEV1ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import deltawire as dw
from deltawire.prepare.fp8 import Fp8
from deltawire.prepare.names import View
from deltawire.torch import follow
from deltawire.trainers.conversion import name_map
from deltawire.trainers.hook import publish_after_step
from deltawire.trainers.state import checkpoint_tensors, fp32_marks
from deltawire.weights.tensors import as_bits, cast, mark_of, marked

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip


def ernie():
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8, "moe_num_shared_experts": 1}
    layers = {"moe_layer_start_index": 1, "moe_layer_end_index": 1}
    return Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**SMALL, **experts, **layers))


def hunyuan():
    return HunYuanMoEV1ForCausalLM(HunYuanMoEV1Config(**SMALL, num_experts=4, moe_topk=2, moe_intermediate_size=8))


def qwen3():
    return Qwen3ForCausalLM(Qwen3Config(**SMALL))


GATE, BIAS = "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"
ROUTERS = {f"model.layers.{layer}.mlp.gate.wg.weight" for layer in (0, 1)}
FAMILIES = [(ernie, {GATE, BIAS}), (hunyuan, ROUTERS), (qwen3, set())]


def seeded(make):
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def loaded(model, folder, dtype):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=dtype)


def publish_two_steps(model):
    """What a reader gets after a hook published the start and a step."""
    bucket, optimizer = fresh(), torch.optim.SGD(model.parameters(), lr=1e-3)
    with publishing(bucket) as publisher:
        publish_after_step(publisher, model, optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return read_weights(bucket)


@pytest.mark.parametrize(("make", "routers"), FAMILIES)
def test_a_hook_ships_in_fp32_what_transformers_loads_so_beside_bf16(make, routers, tmp_path):
    model = loaded(seeded(make), tmp_path, torch.bfloat16)
    assert fp32_marks(model) == dict.fromkeys(routers, "kept")
    read = publish_two_steps(model)
    for name, parameter in model.named_parameters():
        assert read[name] == as_bits(parameter if name in routers else parameter.bfloat16()), name


@pytest.mark.parametrize(("make", "routers", "mark"), [(*FAMILIES[0], "kept"), (*FAMILIES[1], "made"), (qwen3, (), "")])
def test_of_masters_that_are_all_fp32_a_hook_ships_so_what_the_class_lists_and_warns_of_what_it_only_makes_so(
    make, routers, mark
):
    model = seeded(make)
    assert fp32_marks(model) == dict.fromkeys(routers, mark)
    with (
        pytest.warns(UserWarning, match=r"2 tensors .*rounded to 16 bits: model\.layers\.\*\.mlp\.gate\.wg")
        if mark == "made"
        else nullcontext()
    ):
        read = publish_two_steps(model)
    for name, parameter in model.named_parameters():
        wide = name in routers and mark == "kept"
        assert read[name] == as_bits(parameter if wide else parameter.bfloat16()), name


def test_a_checkpoint_that_transformers_saved_in_bf16_and_loaded_mixed_is_one_and_the_same_run(tmp_path):
    model = seeded(ernie).bfloat16()
    read = {}
    for turn in ("as cast", "as loaded"):  # the router is BF16 in the first, and F32 in what transformers loads of it
        bucket = fresh()
        with publishing(bucket, prepare=[name_map(model)]) as publisher:
            publisher.publish(checkpoint_tensors(model))
        read[turn] = read_weights(bucket)
        model = loaded(model, tmp_path, "auto")
        assert load_file(tmp_path / "model.safetensors")[GATE].dtype == torch.bfloat16 or turn == "as loaded"
    assert (read["as cast"][GATE].dtype, read["as loaded"][GATE].dtype) == ("BF16", "F32")
    assert read["as loaded"][GATE] == cast(read["as cast"][GATE], "F32")
    with publishing(bucket, prepare=[name_map(model)], dtype={GATE: "F32"}) as publisher:
        publisher.publish(checkpoint_tensors(copy.deepcopy(model).bfloat16()))  # it goes on as it began
    assert read_weights(bucket)[GATE] == read["as loaded"][GATE]


def test_a_rule_of_the_users_goes_before_what_the_model_says():
    bucket = fresh()
    with publishing(bucket, dtype={"*.gate.weight": "BF16"}, prepare=[name_map(model := seeded(ernie))]) as publisher:
        publisher.publish(checkpoint_tensors(model))
    read = read_weights(bucket)
    assert (read[GATE].dtype, read["model.layers.1.mlp.moe_statics.e_score_correction_bias"].dtype) == ("BF16", "F32")


def test_a_mark_outlasts_a_view_and_keeps_fp8_away():
    model = seeded(ernie)
    pairs = dict(Fp8(skip=frozenset())(name_map(model)(checkpoint_tensors(model))))
    assert (mark_of(pairs[GATE]), pairs[GATE].dtype) == ("kept", torch.float32)
    assert pairs["model.layers.1.mlp.experts.0.up_proj.weight"].dtype == torch.float8_e4m3fn
    part = dw.NameMap({"w": (View("a", ((0, 1), (0, 3)), (1,)), View("b", ((1, 2), (0, 3)), (1,)))})
    assert [mark_of(view) for _, view in part([("w", marked(torch.ones(2, 3), "made"))])] == ["made"] * 2


def test_a_module_of_ones_own_that_is_mixed_ships_mixed_and_one_that_is_not_as_ever():
    class Own(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4, dtype=torch.bfloat16), nn.LayerNorm(4, dtype=norm)

    for norm, expected in ((torch.float32, "F32"), (torch.bfloat16, "BF16")):
        bucket = fresh()
        with publishing(bucket) as publisher:
            publisher.publish(checkpoint_tensors(Own(norm)))
        assert read_weights(bucket)["norm.weight"].dtype == expected
    assert fp32_marks(Own(torch.bfloat16).float()) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_module_follows_a_run_of_several_dtypes(dtype, tmp_path):
    model, url = seeded(ernie), (tmp_path / "bucket").as_uri()
    with dw.Publisher(dw.open_bucket(url, create=True)) as publisher:
        publisher.publish(checkpoint_tensors(model))
        publisher.flush(10)
        followed = loaded(seeded(ernie), tmp_path / "start", dtype)
        with follow(followed, url) as follower:
            for version in range(3):
                assert follower.step().version == version
                held, routers = dict(followed.named_parameters()), fp32_marks(model)
                for name, parameter in model.named_parameters():
                    expected = parameter if name in routers else parameter.bfloat16().to(dtype)
                    assert torch.equal(held[name], expected), name
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(1e-3 * torch.randn_like(parameter))
                publisher.publish(checkpoint_tensors(model))
                publisher.flush(10)
