"""Which torch optimizer is inside the one a trainer was given."""

from typing import Any

import torch


def unwrap(optimizer: Any) -> Any:
    """The torch optimizer inside accelerate's, which does not pass hooks on; any other as it is."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer
