"""Memory of the host that crosses to a device and back at full speed."""

from contextlib import suppress

import torch


def landing(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """So many elements, of any value, for what crosses to or from a device: pinned, unless the host has no more to
    pin."""
    if device.type == "cuda":
        with suppress(RuntimeError):  # of no kind of its own
            return torch.empty(elements, dtype=dtype, device="cpu", pin_memory=True)
    return torch.empty(elements, dtype=dtype, device="cpu")
