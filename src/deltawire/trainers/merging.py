"""A PEFT model whose adapter is merged into 16-bit weights for every sync drifts, and all of the drift is published.

PEFT merges with `weight += delta` and unmerges with `weight -= delta`, both rounded: in bf16 the frozen base does not
come back. On a small Qwen3 1.4 % of its base weights differed after one round, 18 % after 10 and 75 % after 200
(`findings/peft-bf16-merge-drift.sh`). The adapter alone loses nothing, nor do fp32 base weights.
"""

import warnings
from typing import Any

ROUNDED = ("torch.bfloat16", "torch.float16")


def warn_of_merging(model: Any) -> bool:
    """Warn where an adapter of a PEFT model is merged into frozen 16-bit weights to be published; whether it did."""
    model = getattr(model, "module", model)  # as DDP wraps it
    if not hasattr(model, "peft_config"):
        return False
    frozen = [p for name, p in model.named_parameters() if ".base_layer." in name and str(p.dtype) in ROUNDED]
    if not frozen:
        return False
    warnings.warn(
        f"this PEFT model's adapter is merged into {len(frozen)} weights of 16 bits at every sync and taken out again. "
        "Rounding changes the frozen base for good, and every change is published. Publish the adapter alone "
        "(deltawire.trainers.lora.adapter_tensors, `deltawire follow --adapter`), or load the base in fp32",
        stacklevel=3,
    )
    return True
