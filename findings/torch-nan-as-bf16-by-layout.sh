#!/usr/bin/env bash
# torch on CPU: a NaN cast from fp32 to bf16 is 0xffff in a contiguous tensor and 0x7fc0 in a strided one, by the same call.
#
# Code with vector instructions makes 0xffff, and the scalar code for strided tensors, or for a CPU without AVX2, 0x7fc0.
# (CUDA makes 0x7fff.) So two processes that cast one tensor may hold different bits, which a bitwise comparison or a
# checksum of weights reports as a change. fp16 is 0x7e00 either way.
#
# Versions: torch 2.13.0 (CPU wheel), x86-64 with AVX2.  Seen 2026-11-30:
#   AVX2: contiguous 0xffff, strided 0x7fc0, fp16 0x7e00 and 0x7e00
#   DEFAULT: contiguous 0x7fc0, strided 0x7fc0, fp16 0x7e00 and 0x7e00
# Fails (1) when these lines change; 2 when the package cannot be installed or this CPU has no AVX2.
set -euo pipefail
grep -q avx2 /proc/cpuinfo || exit 2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet "$@"; }
{ pip torch==2.13.0 && pip numpy; } || exit 2
cat > "$folder/seen.py" <<'PY'
import torch

nans = torch.full((256,), float("nan"))


def bits(tensor):
    (found,) = {value & 0xFFFF for value in tensor.contiguous().view(torch.int16).tolist()}
    return f"{found:#x}"


print(
    f"{torch.backends.cpu.get_cpu_capability()}: contiguous {bits(nans.bfloat16())}, strided {bits(nans[::2].bfloat16())}, "
    f"fp16 {bits(nans.half())} and {bits(nans[::2].half())}"
)
PY
seen=$(for code in avx2 default; do ATEN_CPU_CAPABILITY=$code "$folder/venv/bin/python" "$folder/seen.py"; done)
echo "$seen"
[ "$seen" = "AVX2: contiguous 0xffff, strided 0x7fc0, fp16 0x7e00 and 0x7e00
DEFAULT: contiguous 0x7fc0, strided 0x7fc0, fp16 0x7e00 and 0x7e00" ]
