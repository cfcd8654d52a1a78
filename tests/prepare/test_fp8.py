"""Weights become fp8 deterministically, in the checkpoint layout loaders know, and keep their scales while they can."""

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import PATIENCE, commits, fresh, publish_all, publishing, read_weights
from strategies import seeds
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Linear

import deltawire as dw
from deltawire.errors import DtypeMismatch
from deltawire.format.checkpoint import Checkpoint
from deltawire.prepare.fp8 import Fp8, quantise
from deltawire.torch import follow
from deltawire.weights.bits import Bits
from deltawire.weights.tensors import as_bits, as_torch

log = logging.getLogger(__name__)
KINDS = ["power-of-two", "amax"]
BLOCKS = [(128, 128), (2, 3), None]


def dequantised(weight, scale: Bits, block) -> torch.Tensor:
    """fp8 number times scale, as a loader computes it."""
    weight, factors = as_torch(as_bits(weight)).float(), as_torch(scale)
    if block is None:
        return weight * factors
    wide = factors.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return weight * wide[: weight.shape[0], : weight.shape[1]]


def matrix(seed, rows=40, columns=50, spread=0.02):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * spread


@given(seeds, st.sampled_from(KINDS), st.sampled_from(BLOCKS), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_numpy_torch_and_bits_give_the_same_bits(seed, kind, block, spread):
    weights = matrix(seed, spread=spread) * torch.tensor([1.0, 1e-4]).repeat(25)
    answers = [quantise(given, block, scales=kind) for given in (weights, weights.numpy(), as_bits(weights))]
    assert [as_bits(weight) for weight, _ in answers] == 3 * [as_bits(answers[0][0])]
    assert [scale for _, scale in answers] == 3 * [answers[0][1]]
    assert isinstance(answers[0][0], torch.Tensor)
    half = weights.bfloat16()
    assert (
        as_bits(quantise(half, block)[0])
        == quantise(as_bits(half), block)[0]
        == as_bits(quantise(half.float(), block)[0])
    )


def test_every_bf16_number_rounds_as_torch_does_to_the_nearest_even():
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[numbers.float().abs() <= 448].reshape(2, -1)
    numbers[0, 0] = 448.0  # so that the scale of a tensor is 1
    weight, scale = quantise(as_bits(numbers), None)
    assert as_torch(scale).tolist() == [1.0]
    assert weight == as_bits(numbers.float().to(torch.float8_e4m3fn))
    between = np.array([[448.0, 17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10, -0.0]], np.float32)
    assert as_torch(quantise(between, None)[0]).float().tolist() == [[448.0, 16.0, 20.0, -16.0, 0.0, 2.0**-8, 0.0]]


@given(seeds, st.sampled_from(KINDS), st.sampled_from(BLOCKS))
def test_what_is_served_is_within_half_a_step_of_fp8_of_the_weight(seed, kind, block):
    weights = matrix(seed, rows=130, columns=140)
    weight, scale = quantise(weights, block, scales=kind)
    steps = dequantised(torch.full(weights.shape, 2.0**-9).to(torch.float8_e4m3fn), scale, block)
    error = (dequantised(weight, scale, block) - weights).abs()
    assert (error <= torch.maximum(weights.abs() / 16, steps / 2) * (1 + 1e-6)).all()
    assert error.max() > 0


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_a_scale_is_the_smallest_power_of_two_that_holds_the_largest_number(amax):
    _, scale = quantise(np.array([[amax, 0.0]], np.float32), None)
    factor = float(as_torch(scale)[0])
    assert np.frexp(factor)[0] == 0.5
    assert amax / factor <= 448 < 2 * amax / factor


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_the_smallest_numbers_have_scales_that_are_normal(kind):
    for number in (0.0, 1e-45, 1e-38, 3e38):
        weight, scale = quantise(np.full((2, 2), number, np.float32), (1, 2), scales=kind)
        factors = as_torch(scale)
        assert torch.isfinite(as_torch(weight).float()).all() and (factors >= torch.finfo().tiny).all()
        assert number or factors.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_weights_that_are_no_numbers_are_refused_by_name(number):
    weights = np.zeros((3, 3), np.float32)
    weights[1, 1] = number
    for tensor in (weights, torch.from_numpy(weights)):
        with pytest.raises(DtypeMismatch, match=r"^mlp\.weight: holds an infinity or NaN"):
            list(Fp8()([("mlp.weight", tensor)]))


def test_a_tiny_move_of_the_largest_number_moves_no_other_value_of_its_block():
    weights = matrix(0, 128, 128)
    weights[3, 4] = 0.1
    moved = weights.clone()
    moved[3, 4] *= 1 + 1e-5
    before, after = (dequantised(*quantise(tensor), (128, 128)) for tensor in (weights, moved))
    assert torch.equal(before, after)
    before, after = (dequantised(*quantise(tensor, scales="amax"), (128, 128)) for tensor in (weights, moved))
    assert (before != after).float().mean() > 0.99


def test_a_scale_that_doubles_keeps_every_value_but_those_that_become_subnormal():
    weights = matrix(1, 128, 128)
    weights[3, 4] = 0.437  # just below 1.75 / 4
    grown = weights.clone()
    grown[3, 4] = 0.438
    (small, narrow), (large, wide) = quantise(weights), quantise(grown)
    scale = float(as_torch(wide))
    assert scale == 2 * float(as_torch(narrow)) == 2.0**-9
    before, after = dequantised(small, narrow, (128, 128)), dequantised(large, wide, (128, 128))
    exact = weights.abs() >= 2.0**-6 * scale
    exact[3, 4] = False
    assert torch.equal(before[exact], after[exact])
    assert 0.9 < exact.float().mean() < 1
    assert ((before - after).abs() <= scale * 2.0**-10).all()
    delta = dw.Delta.between({"w": as_bits(small), "s": narrow}, {"w": as_bits(large), "s": wide})
    assert delta.changed > 0.99 * weights.numel()
    assert len(dw.encode(delta)) < 0.05 * weights.numel()  # nearly every byte moves, by the same step


def drift(kind, lr, steps=8):
    """The shares, per step, of fp8 bytes, scales and values that changed under AdamW with fp32 masters and noise."""
    random = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(256, 256, generator=random) * 0.02)
    optimizer = torch.optim.AdamW([weights], lr=lr, weight_decay=0.0)
    shares, last = [], None
    for _ in range(steps + 1):
        weight, scale = quantise(weights, scales=kind)
        now = (as_bits(weight).data, scale.data, as_bits(dequantised(weight, scale, (128, 128))).data)
        if last is not None:
            shares.append([np.mean(new != old) for new, old in zip(now, last, strict=True)])
        weights.grad, last = torch.randn(256, 256, generator=random), now
        optimizer.step()
    return dict(zip(("bytes", "scales", "values"), np.mean(shares, 0).round(4).tolist(), strict=True))


def test_at_rl_learning_rates_power_of_two_scales_stay_and_amax_scales_move_every_value():
    """At lr 1e-5 1.5 % of the bytes change a step with either; of scales and values 0 % and 1.5 %, or 100 % of both."""
    kept, moving = drift("power-of-two", 1e-5), drift("amax", 1e-5)
    log.info("changed per step at lr 1e-5: power-of-two %s, amax %s", kept, moving)
    assert kept["scales"] == 0 and kept["values"] == kept["bytes"]
    assert 0.005 < kept["bytes"] < 0.03
    assert moving["scales"] > 0.9 and moving["values"] > 0.9
    assert abs(moving["bytes"] - kept["bytes"]) < 0.005  # most numbers of a block stay what they are, at another scale


def small_qwen():
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    sizes = {"vocab_size": 128, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=False))


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_a_published_fp8_checkpoint_loads_in_transformers_as_the_weights_it_was_made_of(tmp_path, master):
    model, fp8, bucket, assets = small_qwen().to(master), Fp8(), fresh(), tmp_path / "assets"
    model.config.quantization_config = fp8.quantization_config(model.named_parameters())
    model.config.save_pretrained(assets)
    with publishing(bucket, prepare=[fp8], assets=assets) as publisher:
        for step in range(3):
            publisher.publish(model.named_parameters(), step=step)
            publisher.flush(PATIENCE)
            with torch.no_grad():
                if step < 2:
                    for parameter in model.parameters():
                        parameter.add_(1e-3 * torch.randn_like(parameter))
    dw.materialize(bucket, tmp_path / "out")
    held = Checkpoint(tmp_path / "out")
    assert held["model.layers.0.mlp.down_proj.weight"].dtype == "F8_E4M3"
    scale = held["model.layers.0.mlp.down_proj.weight_scale_inv"]
    assert (scale.dtype, scale.shape) == ("F32", (2, 3))
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
    )
    served = dict(loaded.named_parameters())
    for name, weights in model.named_parameters():
        if {"embed_tokens", "lm_head"}.isdisjoint(name.split(".")) and weights.ndim == 2:
            assert torch.equal(served[name], dequantised(*quantise(weights), (128, 128)))
        else:
            assert torch.equal(served[name], weights.to(torch.bfloat16).float())
    assert [commit.version for commit in commits(bucket)] == [0, 1, 2]


def test_a_module_that_holds_fp8_weights_follows_in_place_through_a_scale_that_changes(tmp_path):
    bucket = dw.open_bucket(tmp_path.as_uri())
    weights, held = matrix(0, 200, 130), FP8Linear(130, 200, block_size=(128, 128), has_bias=False)
    assert {name: tensor.dtype for name, tensor in held.named_parameters()} == {
        "weight": torch.float8_e4m3fn,
        "weight_scale_inv": torch.float32,
    }
    model = torch.nn.ModuleDict({"layer": held})
    with publishing(bucket, prepare=[Fp8()]) as publisher:
        for growth in (1.0, 1.001, 4.0):
            weights *= growth
            publisher.publish({"layer.weight": weights})
            publisher.flush(PATIENCE)
            with follow(model, tmp_path.as_uri()) as follower:
                follower.step()
            weight, scale = quantise(weights)
            assert as_bits(held.weight) == as_bits(weight)
            assert as_bits(held.weight_scale_inv) == scale


def test_a_restarted_publisher_finds_the_same_bits_and_sends_nothing():
    weights, bucket = {"a.weight": matrix(2), "norm.weight": matrix(2)[0]}, fresh()
    publish_all(bucket, weights, prepare=[Fp8(scales="amax")])
    held = read_weights(bucket)
    with publishing(bucket, prepare=[Fp8(scales="amax")]) as publisher:
        assert publisher.publish(weights).changed == 0
    assert {name: bits.dtype for name, bits in held.items()} == {
        "a.weight": "F8_E4M3",
        "a.weight_scale_inv": "F32",
        "norm.weight": "BF16",
    }
    assert held["a.weight_scale_inv"] == quantise(weights["a.weight"], scales="amax")[1]


def test_one_scale_for_a_tensor_has_the_name_and_shape_of_a_checkpoint():
    pairs = [
        ("q_proj.weight", matrix(0)),
        ("q_proj.bias", matrix(0)[0]),
        ("gate.weight", matrix(0)),
        ("lm_head.weight", matrix(0)),
    ]
    fp8 = Fp8(block=None)
    kinds = {name: (as_bits(tensor).dtype, tuple(tensor.shape)) for name, tensor in fp8(pairs)}
    assert kinds == {
        "q_proj.weight": ("F8_E4M3", (40, 50)),
        "q_proj.weight_scale": ("F32", (1,)),
        "q_proj.bias": ("F32", (50,)),
        "gate.weight": ("F32", (40, 50)),
        "lm_head.weight": ("F32", (40, 50)),
    }
    assert fp8.quantization_config(pairs)["modules_to_not_convert"] == ["gate", "lm_head"]
    assert "weight_block_size" not in fp8.quantization_config(pairs)


def test_numpy_weights_become_fp8_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from deltawire.prepare.fp8 import quantise\n"
        "weight, scale = quantise(np.eye(3, dtype=np.float32))\n"
        "print(weight.data.tolist()[:2], scale.shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("(") == ["[120, 0] ", "1, 1)\n"]


def test_blocks_or_scales_that_are_none_are_refused_and_an_empty_matrix_is_left_alone():
    for wrong in ({"block": (0, 128)}, {"block": (-1, 4)}, {"block": (128,)}, {"scales": "pow2"}):
        with pytest.raises(ValueError, match=min(wrong)):
            Fp8(**wrong)
    empty = ("x.weight", torch.zeros(0, 7))
    assert list(Fp8()([empty])) == [empty]
