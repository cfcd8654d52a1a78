"""What of a torch model a checkpoint holds."""

import copy
import re
import sys
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from deltawire.prepare.names import bare, is_adapters, without_wrappers
from deltawire.publish.fsdp import reshard
from deltawire.weights.tensors import FLOATS, NAMES, Mark, as_bits, is_dense, is_sharded, marked

CAST = tuple(getattr(torch, NAMES[name]) for name in FLOATS)
"""dtypes that a Publisher casts to its own"""
NARROW = {torch.bfloat16, torch.float16}
_DECLARED: WeakKeyDictionary[nn.Module, dict[str, Mark]] = WeakKeyDictionary()
"""what `_declared_fp32` found of a model, whose class does not change while it is trained"""


def checkpoint_tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of what `save_pretrained` writes of a model: every parameter, a tied one once, and its buffers.

    Names come without what torch.compile, DDP and activation checkpointing put into them. A model of FSDP2 is resharded
    first: after a forward it shows whole copies of what some weights were before the last optimizer step.

    The bias by which routers of GLM-4-MoE or DeepSeek-V3 balance their experts is a buffer, which no optimizer steps
    and servers hold in fp32. So buffers come as Bits, which a Publisher ships in their own dtype unless its base holds
    another. One that is not a dense float here, as a DTensor, comes as it is. Buffers that are not persistent are left
    out, and so is what the model's `_keys_to_ignore_on_save` names. Where a server does not load one,
    `Publisher(prepare=[…])` leaves it out.

    A parameter that the model keeps in fp32 comes under a mark, by which a Publisher ships it as F32. An fp32 parameter
    beside 16-bit ones is kept so. A transformers model that is all fp32 keeps those which its class lists as fp32 when
    the rest is bf16, as routers of ERNIE 4.5. One that its class makes in fp32 without listing it, as HunYuan's
    routers, comes under another mark. Servers differ in those, so it is rounded like the rest, with a warning. Either
    way `Publisher(dtype={"NAME": …})` says what servers hold.
    """
    reshard(model)
    model = _unwrapped(model)
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    marks = fp32_marks(model)
    for name, parameter in model.named_parameters():
        if bare(name) not in ignored:
            yield without_wrappers(name), marked(parameter, marks.get(name))
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


def fp32_marks(model: nn.Module) -> dict[str, Mark]:
    """What is said, by name, of the fp32 parameters that are so on purpose, not because all of a trainer's are."""
    wide = [name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32]
    if not wide or any(parameter.dtype in NARROW for parameter in model.parameters()):
        return dict.fromkeys(wide, "kept")
    if model not in _DECLARED:
        _DECLARED[model] = _declared_fp32(model)
    declared = {name: _DECLARED[model].get(bare(name)) for name in wide if not is_adapters(name)}
    return {name: mark for name, mark in declared.items() if mark is not None}


def _declared_fp32(model: nn.Module) -> dict[str, Mark]:
    """What a transformers model's class says of its parameters in fp32 beside bf16.

    Those on its list of such modules, which `from_pretrained` reads, are "kept"; others that it makes so are "made".
    """
    transformers = sys.modules.get("transformers")
    parts = (part for part in model.modules() if transformers and isinstance(part, transformers.PreTrainedModel))
    inner: Any = next(parts, None)
    if inner is None:
        return {}
    patterns = [part.replace("*", ".*") for part in inner._keep_in_fp32_modules_strict or ()]
    listed = {name for name, _ in inner.named_parameters() if any(re.search(part, name) for part in patterns)}
    names = {bare(name): name for name in listed | _made_in_fp32(inner) if not is_adapters(name)}
    return {name: "kept" if given in listed else "made" for name, given in names.items()}


def _made_in_fp32(model: Any) -> set[str]:
    """Names of the parameters that a transformers model of this class and config makes in fp32, made in bf16."""
    try:
        with torch.device("meta"):
            twin = type(model)._from_config(copy.deepcopy(model.config), dtype=torch.bfloat16)
    except Exception:  # a class of somebody's own that cannot be made without data says nothing
        return set()
    return {name for name, parameter in twin.named_parameters() if parameter.dtype == torch.float32}


def _in_its_dtype(buffer: torch.Tensor) -> Any:
    castable = buffer.dtype in CAST and is_dense(buffer) and not is_sharded(buffer)
    return as_bits(buffer) if castable else buffer
