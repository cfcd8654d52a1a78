#!/usr/bin/env bash
# FSDP2: after any forward, named_parameters() of the root gives whole, plain, low-precision copies that
# optimizer.step() does not change.
#
# The root is not resharded after a forward, so until a backward, a state_dict() or a reshard() its own parameters are
# the copies gathered for that forward, in the policy's param_dtype. A loop that does backward, evaluate, step, and then
# reads named_parameters() reads the weights of before the step. Right after `model.reshard()` it reads DTensors, whose
# values are new. On a mesh of one rank, or one that only replicates, shapes tell nothing.
#
# Versions: torch 2.13.0 (CPU, gloo, one rank).  Seen 2026-11-29:
#   after evaluate and step:  Parameter torch.bfloat16, moved by the step: False
#   after reshard():          DTensor torch.float32, moved by the step: True
# Fails (1) when the first line says otherwise; 2 when the packages cannot be installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet "$@"; }
{ pip torch==2.13.0 && pip numpy; } || exit 2
"$folder/venv/bin/python" - <<'PY'
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.manual_seed(0)
model = torch.nn.Linear(8, 8, bias=False)
fully_shard(
    model,
    mesh=dist.init_device_mesh("cpu", (1,)),
    mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16),
)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
before = model.weight.full_tensor().clone()


def look(when):
    ((_, shown),) = model.named_parameters()
    values = shown.full_tensor() if hasattr(shown, "full_tensor") else shown
    moved = not torch.equal(values.bfloat16(), before.bfloat16())
    print(f"{when:25} {type(shown).__name__} {shown.dtype}, moved by the step: {moved}")
    return type(shown) is torch.nn.Parameter and not moved


model(torch.ones(2, 8)).sum().backward()
with torch.no_grad():
    model(torch.ones(2, 8))
optimizer.step()
stale = look("after evaluate and step:")
model.reshard()
new = not look("after reshard():")
dist.destroy_process_group()
sys.exit(0 if stale and new else 1)
PY
