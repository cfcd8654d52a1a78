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


def give_back_unused() -> None:
    """Have torch give back the pinned memory that nobody uses. It waits for the device."""
    if hasattr(torch.accelerator, "empty_host_cache"):  # since torch 2.12
        torch.accelerator.empty_host_cache()
    elif hasattr(torch._C, "_host_emptyCache"):  # that of CUDA, which vLLM calls too
        torch._C._host_emptyCache()
