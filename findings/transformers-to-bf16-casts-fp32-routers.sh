#!/usr/bin/env bash
# transformers: a router that a model keeps in fp32 is BF16 or F32, and has other values, by how the model became bf16.
#
# ERNIE 4.5 MoE lists its routers in `_keep_in_fp32_modules_strict`: from_pretrained(dtype=torch.bfloat16) loads them in
# fp32. `model.to(torch.bfloat16)` casts them too, without a word, and save_pretrained writes BF16. Whoever loads that
# checkpoint, with dtype="auto" too, has F32 again (of rounded values), and saving it writes F32. So a trainer, its
# checkpoint and whoever loads it disagree about the dtype of the same tensor, and about its values.
#
# Versions: transformers 5.19.0, torch 2.13.0 (CPU).  Seen 2026-11-29:
#   made in fp32, .to(bf16)        in memory BF16
#   saved                          in the file BF16
#   loaded with dtype="auto"       in memory F32
#   saved again                    in the file F32
#   loaded with dtype=bf16         in memory F32
#   router of .to(bf16) == router of from_pretrained(dtype=bf16): False
# Fails (1) when any of that is different; 2 when the packages cannot be installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet "$@"; }
{ pip torch==2.13.0 && pip transformers==5.19.0; } || exit 2
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

import torch
from safetensors import safe_open
from transformers import Ernie4_5_MoeConfig
from transformers import Ernie4_5_MoeForCausalLM as Model
from transformers.utils import logging

folder, gate = sys.argv[1], "model.layers.1.mlp.gate.weight"
short = {torch.float32: "F32", torch.bfloat16: "BF16"}
seen = []


def memory(what, model):
    seen.append(short[model.get_parameter(gate).dtype])
    print(f"{what:30} in memory {seen[-1]}")
    return model


def saved(what, model, name):
    model.save_pretrained(f"{folder}/{name}")
    with safe_open(f"{folder}/{name}/model.safetensors", "pt") as file:
        seen.append(file.get_slice(gate).get_dtype())
    print(f"{what:30} in the file {seen[-1]}")


torch.manual_seed(0)
logging.disable_progress_bar()
config = Ernie4_5_MoeConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, moe_num_experts=4, moe_k=2, moe_intermediate_size=8, moe_layer_start_index=1,
    moe_layer_end_index=1,
)
model = Model(config)
torch.nn.init.normal_(model.get_parameter(gate))
model.save_pretrained(f"{folder}/fp32")
model = memory("made in fp32, .to(bf16)", model.to(torch.bfloat16))
saved("saved", model, "one")
again = memory('loaded with dtype="auto"', Model.from_pretrained(f"{folder}/one", dtype="auto"))
saved("saved again", again, "two")
mixed = memory("loaded with dtype=bf16", Model.from_pretrained(f"{folder}/fp32", dtype=torch.bfloat16))
equal = torch.equal(model.get_parameter(gate).float(), mixed.get_parameter(gate).float())
print(f"router of .to(bf16) == router of from_pretrained(dtype=bf16): {equal}")
sys.exit(0 if seen == ["BF16", "BF16", "F32", "F32", "F32"] and not equal else 1)
PY
