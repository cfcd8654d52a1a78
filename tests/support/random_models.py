"""Checkpoints of random weights in the shapes of real models, made from a config: nothing is downloaded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from servers import save_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from deltawire.prepare.fp8 import Fp8
from deltawire.weights.tensors import as_bits, as_torch

QWEN3 = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "num_attention_heads": 16}
SMALL = {
    "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
}  # fmt: skip
"""FlashAttention 3 is built for heads of 65 to 128 in bf16 alone in some wheels"""
SHAPES: dict[str, dict[str, Any]] = {
    "0.6b": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
             "tie_word_embeddings": True},
    "8b": {**QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
           "num_attention_heads": 32, "tie_word_embeddings": False},
    "tiny": {**SMALL, "tie_word_embeddings": True},
    "moe": {**SMALL, "hidden_size": 256, "intermediate_size": 512, "tie_word_embeddings": False, "num_experts": 8,
            "num_experts_per_tok": 2, "moe_intermediate_size": 128},
}  # fmt: skip
"""Qwen3's, by name; "moe" is a small mixture of experts"""
WORDS = 4096
"""tokens that the tokenizer knows; requests name others by their numbers"""


def empty_model(shape: str) -> torch.nn.Module:
    """A model of a shape in bf16 on the meta device: names, shapes and ties, and no memory."""
    sizes = SHAPES[shape]
    config, kind = (Qwen3MoeConfig, Qwen3MoeForCausalLM) if "num_experts" in sizes else (Qwen3Config, Qwen3ForCausalLM)
    with torch.device("meta"):
        model = kind(config(**sizes, max_position_embeddings=WORDS, bos_token_id=None, eos_token_id=None))
    return model.to(torch.bfloat16)


@torch.no_grad()
def fill(model: torch.nn.Module, device: str, seed: int = 0) -> torch.nn.Module:
    """The model on a device with seeded numbers, scaled as a trained one's, so that other weights say other things."""
    model = model.to_empty(device=device)
    model.tie_weights()
    random = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=random, device=device)
        parameter.copy_(1 + 0.1 * drawn if parameter.dim() < 2 else parameter.shape[-1] ** -0.5 * drawn)
    return model


def save_random(folder: Path, shape: str, device: str = "cpu") -> None:
    """A checkpoint in bf16 with a tokenizer. No token ends a sequence, so a request runs to its last token."""
    fill(empty_model(shape), device).to("cpu").save_pretrained(folder)
    save_tokenizer(folder, min(WORDS, SHAPES[shape]["vocab_size"]))
    for name in ("config.json", "generation_config.json"):
        if (path := folder / name).exists():
            said = {key: value for key, value in json.loads(path.read_text()).items() if value is not None}
            path.write_text(json.dumps(said, indent=2))


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's files, on the host; of a tied head that a file repeats, the embedding alone."""
    held = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    if json.loads((folder / "config.json").read_text()).get("tie_word_embeddings"):
        held.pop("lm_head.weight", None)
    return held


def quantise(folder: Path, fp8: Fp8, plain: Mapping[str, torch.Tensor]) -> None:
    """Make a checkpoint of one file one in fp8, of these weights in the checkpoint's names."""
    made = {name: tensor for name, tensor in fp8(plain.items()) if tensor is not plain.get(name)}
    weights = load_file(folder / "model.safetensors")
    weights |= {name: as_torch(as_bits(tensor)) for name, tensor in made.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = fp8.quantization_config(plain.items())
    (folder / "config.json").write_text(json.dumps(config))
