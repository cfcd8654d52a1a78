"""How much of Adam's update bf16 weights lose to rounding, measured on the trainer's own state.

A bf16 number has 8 significant bits, so an update below 1/512 of a weight, or 1/256 just above a power of two, rounds
away. With fp32 masters such updates add up until they show; with bf16 weights alone each is lost for good, and deltas
look small because little is learned.
"""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from deltawire.trainers.optimizers import unwrap

SAMPLE = 4096
"""elements looked at of each weight, spread evenly over it"""
ADAM = {"step", "exp_avg", "exp_avg_sq"}
"""what Adam keeps of a weight"""
TOO_MUCH = 0.5
"""the share of an update above which a training is warned"""


def lost_share(optimizer: Any) -> float | None:
    """The share of an update like the last one that rounding would leave undone, 0 to 1: 1 - kept / intended.

    Intended is the sum over elements of |u|, where u = lr * m / (sqrt(v) + eps) is Adam's update in fp32. It comes from
    the optimizer's state, its moments corrected for their start, at the present learning rate and without weight decay.
    Kept is the sum of how far the rounded weights move along it. Looks at a sample of each 16-bit weight, on its
    device; nothing is written. `optimizer` may be accelerate's. None while nothing can be measured: no 16-bit weight
    has Adam's moments, every update is 0, or one is NaN or infinite.
    """
    kept = intended = 0.0
    for weight, update in _updates(unwrap(optimizer)):
        moved = weight.float() - (weight.float() - update).to(weight.dtype).float()
        kept += float((moved * update.sign()).sum())
        intended += float(update.abs().sum())
    return max(0.0, 1 - kept / intended) if 0 < intended < math.inf else None


class RoundingWatch:
    """Measures `lost_share` after steps 1, 2, 4, 8, … of a training, and warns once when more than half is lost."""

    def __init__(self) -> None:
        self._steps, self._warned = 0, False

    def after_step(self, optimizer: Any) -> dict[str, float]:
        """Call after each optimizer step: {"rounding_lost": share} after a step that was measured, else {}.

        While the learning rate is below half of its schedule's full one, as in a warm-up, nothing is measured.
        """
        self._steps += 1
        if self._steps & (self._steps - 1):
            return {}
        groups = unwrap(optimizer).param_groups
        if any(group["lr"] < group.get("initial_lr", 0) / 2 for group in groups):
            return {}
        share = lost_share(optimizer)
        if share is None:
            return {}
        if share > TOO_MUCH and not self._warned:
            self._warned = True
            rates = ", ".join(f"{rate:.1e}" for rate in sorted({float(group["lr"]) for group in groups}))
            warnings.warn(
                f"rounding undoes {share:.0%} of an update: at a learning rate of {rates} most of it is too small for "
                "weights of 16 bits; train with fp32 weights (deltawire ships them as bf16)",
                stacklevel=3,
            )
        return {"rounding_lost": share}


def _updates(optimizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A sample of each 16-bit weight that has Adam's moments, and the update it should get, in fp32."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if parameter.dtype not in {torch.bfloat16, torch.float16} or not state.keys() >= ADAM:
                continue
            step, (first, second) = float(state["step"]), group["betas"]
            mean = _sample(state["exp_avg"]).float() / (1 - first**step)
            square = _sample(state["exp_avg_sq"]).float() / (1 - second**step)
            yield _sample(parameter), float(group["lr"]) * mean / (square.sqrt() + group["eps"])


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)]
