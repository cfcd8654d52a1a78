"""What one version costs on the wire: an adapter's delta, the adapter itself, and the deltas of whole-model runs.

    python benchmarks/adapter_bytes.py

A Qwen3 of 6.0 million weights (hidden 256, 4 layers) with an adapter of rank 8 on every linear layer, trained by AdamW
on random tokens; the last of six steps is counted, when AdamW's moments have filled. Prints one row per run.
"""

import secrets
import tempfile
from collections.abc import Iterator

import peft
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import deltawire as dw
from deltawire.trainers import lora

STEPS, VOCABULARY = 6, 8192


def base() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=True)).to(torch.bfloat16).float()


def merged(model: peft.PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The merged weights under the base model's own names."""
    for name, tensor in model.named_parameters():
        if ".lora_" not in name:
            yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), tensor


def train(kind: str, rate: float, folder: str) -> dw.PublishReport:
    """The report of a run's last version; `folder` is for the adapter's config."""
    model = base()
    if kind != "whole model":
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate)
    assets = lora.save_config(model, folder) if kind == "adapter" else None
    with dw.Publisher(dw.open_bucket(f"memory://{secrets.token_hex(8)}"), assets=assets) as publisher:
        for _ in range(STEPS + 1):
            if kind == "merged":
                model.merge_adapter()
            tensors = {"adapter": lora.adapter_tensors, "merged": merged}.get(kind, torch.nn.Module.named_parameters)
            report = publisher.publish(tensors(model))
            if kind == "merged":
                model.unmerge_adapter()
            tokens = torch.randint(0, VOCABULARY, (4, 64))
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return report


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'run':12} {'rate':>7} {'elements':>10} {'changed':>8} {'delta':>12} {'dense':>12}")
    for kind, rate in [("adapter", 1e-4), ("adapter", 1e-5), ("adapter", 1e-6), ("merged", 1e-4), ("merged", 1e-5),
                       ("whole model", 1e-5), ("whole model", 1e-6)]:  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            report = train(kind, rate, folder)
        row = f"{report.total:>10,} {report.density:>8.1%} {report.wire_bytes:>10,} B {report.model_bytes:>10,} B"
        print(f"{kind:12} {rate:>7.0e} {row}", flush=True)


if __name__ == "__main__":
    main()
