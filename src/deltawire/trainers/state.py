"""What of a torch model a checkpoint holds."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from deltawire.fsdp import reshard
from deltawire.names import bare, without_wrappers
from deltawire.tensors import FLOATS, NAMES, as_bits, is_dense, is_sharded

CAST = tuple(getattr(torch, NAMES[name]) for name in FLOATS)
"""dtypes that a Publisher casts to its own"""


def checkpoint_tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of what `save_pretrained` writes of a model: every parameter, a tied one once, and its buffers.

    Names come without what torch.compile, DDP and activation checkpointing put into them. A model of FSDP2 is resharded
    first: after a forward it shows whole copies of what some weights were before the last optimizer step.

    The bias by which routers of GLM-4-MoE or DeepSeek-V3 balance their experts is a buffer, which no optimizer steps
    and servers hold in fp32. So buffers come as Bits, which a Publisher ships in their own dtype unless its base holds
    another; one that is no dense float here, a DTensor say, comes as it is. Left out are buffers that are not
    persistent, and what the model's `_keys_to_ignore_on_save` names; where a server does not load one,
    `Publisher(prepare=[…])` leaves it out.
    """
    reshard(model)
    model = _unwrapped(model)
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    for name, parameter in model.named_parameters():
        if bare(name) not in ignored:
            yield without_wrappers(name), parameter
    for prefix, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            name = f"{prefix}.{leaf}" if prefix else leaf
            if buffer is not None and leaf not in module._non_persistent_buffers_set and bare(name) not in ignored:
                yield without_wrappers(name), _in_its_dtype(buffer)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DDP or torch.compile, which hold it under one of these names and nothing beside it."""
    while [name for name, _ in model.named_children()] in (["module"], ["_orig_mod"]):
        if model._parameters or model._buffers:
            break
        (model,) = model.children()
    return model


def _in_its_dtype(buffer: torch.Tensor) -> Any:
    castable = buffer.dtype in CAST and is_dense(buffer) and not is_sharded(buffer)
    return as_bits(buffer) if castable else buffer
