"""What of a torch model a checkpoint holds."""

from collections.abc import Iterator

import torch
from torch import nn


def checkpoint_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every parameter, a tied one once, and of the buffers in the model's state: the bias by which
    the routers of GLM-4-MoE or DeepSeek-V3 balance their experts is one, and no optimizer steps it."""
    yield from model.named_parameters()
    state = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in state)
