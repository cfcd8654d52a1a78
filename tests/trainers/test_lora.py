"""An adapter is a run of its own, whose every version PEFT loads; merged weights are a run of the whole model."""

import json
from pathlib import Path

import peft
import pytest
import torch
from adapters import Learner, load, logprobs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import deltawire as dw
from deltawire.errors import BucketError, NotFound, ShapeMismatch, UnknownTensor, WrongBase
from deltawire.trainers import lora
from deltawire.upkeep.compactor import Compactor

PROMPT = [1, 2, 3]
CLOSE = 0.02
"""of log-probabilities that bf16 kernels round in another order"""


def tiny_base() -> Qwen3ForCausalLM:
    """A tied Qwen3 of about 13,000 parameters, the same on every call."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=True))


@pytest.fixture
def base(tmp_path) -> Path:
    tiny_base().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def learner() -> Learner:
    return Learner(tiny_base(), rate=1e-2)


def publish(learner: Learner, folder: Path, versions: int, **options) -> tuple[str, list[dw.PublishReport]]:
    """The bucket's address and a report for each version, trained one step apart."""
    url, reports = (folder / "bucket").as_uri(), []
    assets = lora.save_config(learner.model, folder / "config")
    with dw.Publisher(dw.open_bucket(url, create=True), assets=assets, **options) as publisher:
        for version in range(versions):
            if version:
                learner.train()
            reports.append(publisher.publish(lora.adapter_tensors(learner.model)))
            publisher.flush(30)
    return url, reports


def test_a_version_of_an_adapter_run_is_a_folder_that_peft_loads_and_that_answers_as_the_trainers_model(
    learner, base, tmp_path
):
    before = logprobs(learner.served(), PROMPT)
    url, _ = publish(learner, tmp_path, 3)
    report = dw.materialize(dw.open_bucket(url), tmp_path / "adapter")
    assert report.deltas == 2
    assert sorted(path.name for path in report.folder.iterdir() if not path.name.startswith("."))[:2] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    after = logprobs(learner.served(), PROMPT)
    assert torch.allclose(logprobs(load(base, report.folder), PROMPT), after, atol=CLOSE)
    assert float((after - before).abs().max()) > 5 * CLOSE


def test_only_the_adapter_travels_and_each_delta_is_smaller_than_its_anchor(learner, tmp_path):
    _, reports = publish(learner, tmp_path, 3)
    whole = sum(tensor.numel() for tensor in learner.model.parameters())
    adapter = sum(tensor.numel() for tensor in learner.model.parameters() if tensor.requires_grad)
    assert all(report.total == adapter for report in reports)
    assert all(report.changed > 0 and report.wire_bytes < reports[0].wire_bytes for report in reports[1:])
    assert adapter < whole / 2


def test_an_adapter_in_fp32_arrives_as_peft_saves_it(learner, tmp_path):
    url, _ = publish(learner, tmp_path, 2, dtype="F32")
    dw.materialize(dw.open_bucket(url), tmp_path / "adapter")
    learner.model.save_pretrained(tmp_path / "saved")
    arrived, saved = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "saved"))
    assert arrived.keys() == saved.keys()
    assert all(torch.equal(arrived[name], saved[name]) for name in saved)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("adapter", "saved")]
    for config in configs:
        config["target_modules"].sort()
    assert configs[0] == configs[1]


def test_a_folder_that_holds_one_version_of_an_adapter_is_moved_by_deltas_and_an_anchor_is_written_of_any(
    learner, base, tmp_path
):
    url, _ = publish(learner, tmp_path, 3)
    bucket = dw.open_bucket(url)
    dw.materialize(bucket, tmp_path / "adapter", 1)
    with Compactor(bucket, tmp_path / "mirror", anchors=1) as compactor:
        assert [report.version for report in compactor.step() if report.parent is None] == [2]
    assert dw.materialize(bucket, tmp_path / "adapter").deltas == 1
    fresh = dw.materialize(bucket, tmp_path / "fresh")
    assert fresh.deltas == 0  # from the anchor of version 2, which is an adapter too
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (fresh.folder, tmp_path / "adapter")]
    assert dw.equal(*weights)
    assert dw.equal(weights[0], bf16(lora.adapter_tensors(learner.model)))


def test_an_adapter_may_start_from_one_that_both_sides_have(learner, base, tmp_path):
    learner.train()
    learner.model.to(torch.bfloat16).save_pretrained(tmp_path / "start")
    url = (tmp_path / "bucket").as_uri()
    with dw.Publisher(dw.open_bucket(url, create=True), base=tmp_path / "start") as publisher:
        with torch.no_grad():
            next(p for p in learner.model.parameters() if p.requires_grad).add_(1)
        report = publisher.publish(lora.adapter_tensors(learner.model))
    assert report.version == 1
    folder = dw.materialize(dw.open_bucket(url), tmp_path / "adapter", base=tmp_path / "start").folder
    assert dw.equal(load_file(folder / "adapter_model.safetensors"), bf16(lora.adapter_tensors(learner.model)))


def test_an_adapter_without_its_config_is_refused_before_anything_is_published(learner, base, tmp_path):
    bucket = dw.open_bucket((tmp_path / "bucket").as_uri(), create=True)
    for assets in (None, base):
        with dw.Publisher(bucket, assets=assets) as publisher, pytest.raises(NotFound, match="adapter_config"):
            publisher.publish(lora.adapter_tensors(learner.model))
    assert list(bucket.list("")) == []


def test_an_adapter_the_model_does_not_have_is_named(learner, tmp_path):
    with pytest.raises(UnknownTensor, match="'other'; it has default"):
        next(lora.adapter_tensors(learner.model, adapter="other"))
    with pytest.raises(UnknownTensor, match="'other'"):
        lora.save_config(learner.model, tmp_path, adapter="other")
    with pytest.raises(UnknownTensor, match="Qwen3ForCausalLM has no adapter"):
        next(lora.adapter_tensors(tiny_base()))


def test_a_folder_for_the_config_that_is_a_file_is_named(learner, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BucketError, match="file"):
        lora.save_config(learner.model, tmp_path / "file")


def test_an_adapter_of_another_rank_is_refused_with_the_way_out_which_works(learner, base, tmp_path):
    url, _ = publish(learner, tmp_path, 1)
    wider = Learner(tiny_base(), rate=1e-2, rank=2 * learner.model.peft_config["default"].r)
    assets = lora.save_config(wider.model, tmp_path / "wider")
    with (
        dw.Publisher(dw.open_bucket(url), assets=assets) as publisher,
        pytest.raises(ShapeMismatch, match="supersede"),
    ):
        publisher.publish(lora.adapter_tensors(wider.model))
    with dw.Publisher(dw.open_bucket(url), assets=assets, run="supersede") as publisher:
        publisher.publish(lora.adapter_tensors(wider.model))
    dw.materialize(dw.open_bucket(url), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == wider.model.peft_config["default"].r


def test_one_of_several_adapters_is_published_alone(learner, base, tmp_path):
    learner.model.add_adapter("other", learner.model.peft_config["default"])
    names = {name for name, _ in lora.adapter_tensors(learner.model, adapter="other")}
    assert names == {name for name, _ in lora.adapter_tensors(learner.model)}
    publish(learner, tmp_path, 1)
    folder = dw.materialize(dw.open_bucket((tmp_path / "bucket").as_uri()), tmp_path / "adapter").folder
    assert load_file(folder / "adapter_model.safetensors").keys() == names


def bf16(pairs) -> dict[str, torch.Tensor]:
    """Tensors as a server holds them."""
    return {name: tensor.detach().to(torch.bfloat16, copy=True) for name, tensor in pairs}


def merged(model: torch.nn.Module):
    """A merged PeftModel's weights under the base model's own names."""
    for name, tensor in model.named_parameters():
        if ".lora_" not in name:
            yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), tensor


def test_merged_weights_are_a_run_of_the_whole_model(learner, base, tmp_path):
    bucket = dw.open_bucket((tmp_path / "bucket").as_uri(), create=True)
    policies = []
    with dw.Publisher(bucket, assets=base) as publisher:
        for _ in range(3):
            learner.model.merge_adapter()
            publisher.publish(merged(learner.model))
            publisher.flush(30)
            policies.append(bf16(merged(learner.model)))
            learner.model.unmerge_adapter()
            learner.train()
    for version, policy in enumerate(policies):
        dw.materialize(bucket, tmp_path / "model", version)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
        assert dw.equal(dict(model.named_parameters()), policy)
    assert sorted(path.name for path in (tmp_path / "model").glob("*.safetensors")) == ["model.safetensors"]


def moe_with_an_adapter_on(parameter: str):
    """Experts whose up and down projections have one shape, so that PEFT's one key fits either."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts))
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=[], target_parameters=[parameter]))


def test_a_restart_with_an_adapter_of_another_meaning_is_refused_though_its_tensors_have_the_same_names(tmp_path):
    url = (tmp_path / "bucket").as_uri()
    down, up = (moe_with_an_adapter_on(f"mlp.experts.{name}_proj") for name in ("down", "gate_up"))
    assert dict(lora.adapter_tensors(down)).keys() == dict(lora.adapter_tensors(up)).keys()
    with dw.Publisher(dw.open_bucket(url, create=True), assets=lora.save_config(down, tmp_path / "down")) as publisher:
        publisher.publish(lora.adapter_tensors(down))
    with pytest.raises(WrongBase, match=r"target_parameters is \['mlp.experts.down_proj'\] there"):
        dw.Publisher(dw.open_bucket(url), assets=lora.save_config(up, tmp_path / "up"))
    with dw.Publisher(dw.open_bucket(url), assets=tmp_path / "down") as publisher:
        assert publisher.publish(lora.adapter_tensors(down)).changed == 0
