"""What of a torch model a checkpoint holds."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from deltawire.errors import DtypeMismatch
from deltawire.names import bare
from deltawire.tensors import as_bits


def checkpoint_tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of what `save_pretrained` writes of a model: every parameter, a tied one once, and its buffers.

    The bias by which routers of GLM-4-MoE or DeepSeek-V3 balance their experts is a buffer, which no optimizer steps
    and servers hold in fp32. So buffers come as Bits, which a Publisher ships in their own dtype unless its base holds
    another; one without bits here, a DTensor say, as it is. Left out are buffers that are not persistent, and what the
    model's `_keys_to_ignore_on_save` names; where a server does not load one, `Publisher(prepare=[…])` leaves it out.
    """
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    for name, parameter in model.named_parameters():
        if bare(name) not in ignored:
            yield name, parameter
    for prefix, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            name = f"{prefix}.{leaf}" if prefix else leaf
            if buffer is not None and leaf not in module._non_persistent_buffers_set and bare(name) not in ignored:
                yield name, _as_bits_if_any(buffer)


def _as_bits_if_any(buffer: torch.Tensor) -> Any:
    try:
        return as_bits(buffer)
    except (DtypeMismatch, RuntimeError):  # complex, sparse, on no device, a DTensor: for a Publisher to judge
        return buffer
