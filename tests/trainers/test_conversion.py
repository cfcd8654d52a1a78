"""The ready maps: what one makes of a model is what `save_pretrained` writes of it, bit for bit, or it is refused."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from runs import PATIENCE
from safetensors.torch import load_file
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

import deltawire as dw
from deltawire.errors import NoView, UnknownTensor
from deltawire.torch import follow
from deltawire.trainers.conversion import name_map

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
HEAD = {"head_dim": 8}
MOE = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
SHARED = {**MOE, "shared_expert_intermediate_size": 16}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
GROUPS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
FAMILIES = {
    "Qwen3": {**HEAD, "tie_word_embeddings": True},
    "Llama": {},
    "Gemma": HEAD,
    "Qwen3Moe": {**HEAD, **MOE},
    "Qwen2Moe": SHARED,
    "Qwen3_5Moe": {**HEAD, **SHARED},
    "Mixtral": {"num_local_experts": 4},
    "Olmoe": {"num_experts": 4, "tie_word_embeddings": True},
    "DeepseekV3": {**MOE, **LATENT, **GROUPS},
    "Glm4Moe": {**HEAD, **MOE, **GROUPS},
    "GptOss": {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
FUSED = {"Qwen3Moe", "Qwen2Moe", "Qwen3_5Moe", "Mixtral", "Olmoe", "DeepseekV3", "Glm4Moe"}
"""those whose trainer holds experts, of which there are checkpoints with one tensor each"""


def build(family, seed=0):
    """A small seeded causal model in which no two elements need be alike, norms and biases neither."""
    config = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config(**SIZES, **FAMILIES[family]))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape))
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_map_gives_what_save_pretrained_writes_and_writing_through_it_loads_that(family, tmp_path):
    model = build(family)
    names, written = name_map(model), saved(model, tmp_path)
    given = model.state_dict()
    assert dw.equal(dict(names(given.items())), written)
    assert (len(written) > len(given)) == (family in FUSED)
    other = build(family, seed=1)
    parts = dict(names(other.state_dict().items()))
    assert parts.keys() == written.keys()
    for name, part in parts.items():
        part.copy_(written[name])
    assert dw.equal(other.state_dict(), given)


TRANSPOSED = WeightConverter("mlp.experts.down_proj", "mlp.experts.down_proj", [Transpose(1, 2)])
SPLIT_AND_TURNED = WeightConverter(
    ["mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"],
    "mlp.experts.gate_up_proj",
    [MergeModulelist(0), Concatenate(1), Transpose(0, 2)],
)
RENAMED = WeightRenaming(r"^transformer\.", "model.")
WOVEN = WeightConverter("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", [Interleave(dim=1)])


def test_a_conversion_that_a_model_was_loaded_with_is_the_one_that_counts(tmp_path):
    model = build("Qwen3Moe")
    model._weight_conversions = [RENAMED, TRANSPOSED]
    written = saved(model, tmp_path)
    assert written["transformer.layers.0.mlp.experts.down_proj"].shape == (4, 16, 32)
    assert dw.equal(dict(name_map(model)(model.state_dict().items())), written)


def test_views_of_a_turned_tensor_are_what_the_conversion_makes_of_it(tmp_path):
    model = build("Qwen3Moe")
    for layer in model.model.layers:
        turned = layer.mlp.experts.gate_up_proj.detach().permute(2, 1, 0).clone()
        layer.mlp.experts.gate_up_proj = torch.nn.Parameter(turned)
    model._weight_conversions = [SPLIT_AND_TURNED]
    written = saved(model, tmp_path)
    assert written["model.layers.0.mlp.experts.3.up_proj"].shape == (16, 32)
    assert dw.equal(dict(name_map(model)(model.state_dict().items())), written)


def woven():
    model = build("Qwen3Moe")
    model._weight_conversions = [WOVEN]
    return model


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            lambda: transformers.NomicBertModel(
                transformers.NomicBertConfig(
                    vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
                )
            ),
            r"'nomic_bert'.*torch\.cat of layers\.0\.self_attn\.q_proj\.weight and .*revert_weight_conversion",
        ),
        (woven, r"'qwen3_moe'.*reshape of model\.layers\.0\.mlp\.experts\.gate_up_proj"),
        (lambda: torch.nn.Linear(2, 2), "Linear holds no transformers model"),
    ],
    ids=["a checkpoint tensor of several", "rows woven", "no transformers model"],
)
def test_a_model_whose_checkpoint_is_no_view_of_it_is_refused_by_its_type_and_what_is_done(model, says):
    with pytest.raises(NoView, match=says):
        name_map(model())


def compiled(module):
    return torch.compile(module, backend="eager")  # the name is what matters; the default backend takes seconds to load


def wrap_a_layer(model):
    model.model.layers[0] = compiled(model.model.layers[0])
    return model


def merged(model):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "k_proj"])).merge_and_unload()  # adds zero


@pytest.mark.parametrize(
    "wrap",
    [compiled, wrap_a_layer, torch.nn.DataParallel, lambda model: torch.nn.DataParallel(compiled(model)), merged],
    ids=["compiled", "one layer compiled", "in parallel", "compiled in parallel", "adapter merged"],
)
def test_a_wrapped_model_is_published_under_the_checkpoints_names(wrap, tmp_path):
    model = build("Qwen3Moe")
    written = saved(model, tmp_path)
    wrapped = wrap(model)
    assert dw.equal(dict(name_map(wrapped)(wrapped.state_dict().items())), written)


def test_a_model_with_an_adapter_in_it_is_refused_and_its_base_alone_has_the_checkpoints_names(tmp_path):
    model = build("Qwen3Moe")
    written = saved(model, tmp_path)
    targets = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapted = get_peft_model(model, targets)
    names = name_map(adapted)
    with pytest.raises(UnknownTensor, match="merge_and_unload"):
        list(names(adapted.named_parameters()))
    base = [(name, tensor) for name, tensor in adapted.named_parameters() if "base_layer" in name or "experts" in name]
    given = dict(names(base))
    assert len(given) == 2 + 2 * 3 * 4
    assert dw.equal(given, {name: written[name] for name in given})


def test_a_fused_model_follows_a_run_that_has_one_tensor_per_expert(tmp_path):
    trained, url = build("Qwen3Moe"), (tmp_path / "bucket").as_uri()
    followed = build("Qwen3Moe", seed=1).bfloat16()
    bucket = dw.open_bucket(url, create=True)
    with dw.Publisher(bucket, prepare=[name_map(trained)]) as publisher:
        publisher.publish(trained.named_parameters())
        publisher.flush(PATIENCE)
        with follow(followed, url, names=name_map(followed)) as follower:
            assert follower.step().version == 0
            for _ in range(2):
                with torch.no_grad():
                    for parameter in trained.parameters():
                        parameter[torch.rand(parameter.shape) < 0.1] += 1
                publisher.publish(trained.named_parameters())
                publisher.flush(PATIENCE)
            assert follower.step().version == 2
    right = copy.deepcopy(trained).bfloat16()
    assert dw.equal(followed.state_dict(), right.state_dict())
    dw.materialize(bucket, tmp_path / "version")
    right.config.save_pretrained(tmp_path / "version")
    loaded = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "version", dtype=torch.bfloat16)
    assert dw.equal(loaded.state_dict(), right.state_dict())
