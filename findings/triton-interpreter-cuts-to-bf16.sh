#!/usr/bin/env bash
# Triton's interpreter (TRITON_INTERPRET=1) casts fp32 to bf16 by cutting the low bits off, and gets subnormals wrong. A
# GPU, and torch, round to nearest even.
#
# So a kernel with `x.to(tl.bfloat16)` that is tested in the interpreter differs from what it does on a GPU for half of
# all values. A cast that is right in both is done with integers: add 0x7FFF and the last bit that is kept, then shift.
#
# Versions: triton 3.9.0, torch 2.13.0 (CPU), numpy 2.4.  Seen 2026-11-30:
#   of 4096 normal values: 4096 as cut, 2049 as rounded
#   a subnormal: 1.01e-39 from 1e-40, rounded 9.18e-41
#   by integers: 4096 as rounded
# Fails (1) when these lines change; 2 when the packages cannot be installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet "$@"; }
{ pip torch==2.13.0 && pip triton==3.9.0 "numpy>=2.4,<2.5"; } || exit 2
cat > "$folder/seen.py" <<'PY'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def cast(source, target, count: tl.constexpr):
    at = tl.arange(0, count)
    tl.store(target + at, tl.load(source + at).to(tl.bfloat16))


@triton.jit
def cast_by_integers(source, target, count: tl.constexpr):
    at = tl.arange(0, count)
    bits = tl.load(source + at).to(tl.uint32, bitcast=True)
    rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
    tl.store(target + at, rounded.to(tl.uint16).to(tl.int16, bitcast=True))


values = torch.randn(4096, generator=torch.Generator().manual_seed(0))
rounded = values.bfloat16()
cut = (values.view(torch.int32) >> 16).short().view(torch.bfloat16)
made, whole = torch.zeros_like(rounded), torch.zeros(4096, dtype=torch.int16)
cast[(1,)](values, made, 4096)
cast_by_integers[(1,)](values, whole, 4096)
small, tiny = torch.full((16,), 1e-40), torch.zeros(16, dtype=torch.bfloat16)
cast[(1,)](small, tiny, 16)
seen = [
    f"of 4096 normal values: {int((made == cut).sum())} as cut, {int((made == rounded).sum())} as rounded",
    f"a subnormal: {float(tiny[0]):.2e} from 1e-40, rounded {float(small.bfloat16()[0]):.2e}",
    f"by integers: {int((whole.view(torch.bfloat16) == rounded).sum())} as rounded",
]
print("\n".join(seen))
sys.exit(
    seen
    != [
        "of 4096 normal values: 4096 as cut, 2049 as rounded",
        "a subnormal: 1.01e-39 from 1e-40, rounded 9.18e-41",
        "by integers: 4096 as rounded",
    ]
)
PY
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/seen.py"
