#!/usr/bin/env bash
# PEFT: one adapter key means an expert's up projection or its down projection, depending on the config alone.
#
# With LoraConfig(target_parameters=[…]) the keys carry no parameter name. `…mlp.experts.lora_A.weight` belongs to
# gate_up_proj if only that is targeted, to down_proj if only that is; with both, the outermost wrapper (down_proj) has
# that key and gate_up_proj has `…experts.base_layer.lora_A.weight`, in whatever order the config lists them. Where the
# shapes agree nothing fails: an adapter file without its own adapter_config.json cannot be read safely.
#
# Versions: peft 0.21.2, transformers 5.19.0, torch 2.13.0 (CPU).  Seen 2026-11-29:
#   gate_up_proj alone            -> mlp.experts.lora_A, mlp.experts.lora_B
#   down_proj alone               -> mlp.experts.lora_A, mlp.experts.lora_B
#   both, in either order         -> mlp.experts.base_layer.lora_{A,B} [64 rows: up], mlp.experts.lora_{A,B} [32 rows: down]
# Fails (1) when the keys of the first two differ, or the order matters; 2 when the packages cannot be installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet "$@"; }
{ pip torch==2.13.0 && pip peft==0.21.2 transformers==5.19.0; } || exit 2
"$folder/venv/bin/python" - <<'PY'
import sys

import peft
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}


def keys(*parameters):
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts))
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=[f"mlp.experts.{name}" for name in parameters])
    state = peft.get_peft_model_state_dict(peft.get_peft_model(model, config), save_embedding_layers=False)
    found = {name.split("layers.0.")[1].removesuffix(".weight"): tuple(tensor.shape) for name, tensor in state.items()}
    print(", ".join(parameters), "->", found)
    return found


up, down = keys("gate_up_proj"), keys("down_proj")
both, reversed_ = keys("gate_up_proj", "down_proj"), keys("down_proj", "gate_up_proj")
sys.exit(not (up.keys() == down.keys() < both.keys() and both == reversed_ and both["mlp.experts.lora_B"][0] == 32))
PY
