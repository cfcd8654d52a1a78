#!/usr/bin/env bash
# PEFT: merging an adapter and taking it out again changes a frozen bf16 base for good.
#
# merge_adapter() does `weight += delta` and unmerge_adapter() does `weight -= delta`, each rounded to bf16. RL trainers
# merge for every weight sync (TRL's AsyncGRPOTrainer does), so the base drifts with every sync, and whoever publishes
# merged weights publishes the drift. In fp32 it is about 1e-8 of the weights' scale, in bf16 it is whole bf16 steps.
#
# Versions: peft 0.21.2, transformers 5.19.0, torch 2.13.0 (CPU).  Seen 2026-11-29:
#   bf16: share of frozen base weights that differ after 1, 10, 50, 200 rounds: 0.014 0.179 0.528 0.752
# Fails (1) when fewer than 10 % differ after 200 rounds; 2 when the packages cannot be installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet "$@"; }
{ pip torch==2.13.0 && pip peft==0.21.2 transformers==5.19.0; } || exit 2
"$folder/venv/bin/python" - <<'PY'
import sys

import peft
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

torch.manual_seed(0)
torch.set_num_threads(1)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).to(torch.bfloat16)
model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
tokens = torch.arange(16)[None]


def base():
    return torch.cat([p.detach().flatten().clone() for name, p in model.named_parameters() if ".base_layer." in name])


before, seen = base(), []
for sync in range(1, 201):
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.merge_adapter()
    model.unmerge_adapter()
    if sync in (1, 10, 50, 200):
        seen.append(float((base() != before).float().mean()))
print("share of frozen base weights that differ after 1, 10, 50, 200 rounds:", *(f"{share:.3f}" for share in seen))
sys.exit(seen[-1] < 0.1)
PY
