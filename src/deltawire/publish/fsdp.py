"""Which tensors FSDP2 lends a model: whole copies, gathered for a forward.

They show what the weights were before the last optimizer step. A version holds the shards.

After any forward the outermost module keeps its copies until a backward, a `state_dict()` or a `reshard()`. So does any
module between its own `unshard()` and `reshard()`. They are plain tensors, or DTensors of fewer dimensions where tensor
parallelism shards too. So nothing about such a tensor itself says what it is. Nothing here imports torch.
"""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from deltawire.errors import ShapeMismatch
from deltawire.weights.tensors import is_torch

LENT = ("_unsharded_param", "_sharded_post_forward_param")
"""what an FSDPParam of torch 2.8 to 2.13 calls its copies; `sharded_param` is the weight itself"""


def modules_of(model: Any) -> list[Any]:
    """The modules of a torch model that `fully_shard` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def reshard(model: Any) -> None:
    """Have a model of FSDP2 show its shards again; no effect on another. No rank is asked.

    A backward that is still to come gathers again what it needs.
    """
    for module in modules_of(model):
        module.reshard()


def owned(pairs: Iterable[Any]) -> Iterator[Any]:
    """The pairs (name, tensor) as they come. Raises ShapeMismatch for a tensor that is a copy which FSDP2 lends."""
    lent = _lent()
    for pair in pairs:
        if lent and isinstance(pair, tuple | list) and len(pair) == 2 and _is_lent(pair[1], lent):
            raise ShapeMismatch(
                f"{pair[0]} is a copy that FSDP2 gathered for a forward, maybe of older weights, and not the weight. "
                "Call `reshard()` of every FSDPModule in model.modules(), then publish the parameters. "
                "checkpoint_tensors(model) of deltawire.trainers.state calls it"
            )
        yield pair


def _lent() -> frozenset[int]:
    """The memory of every copy that FSDP2 lends a model of this process, by the addresses of their storage objects."""
    found: set[int] = set()
    for parameter in _parameters():
        copies = [copy for name in LENT if (copy := getattr(parameter, name, None)) is not None]
        found |= {_storage(copy) for copy in copies} - {_storage(parameter.sharded_param)}
    return frozenset(found)


def _is_lent(tensor: Any, lent: frozenset[int]) -> bool:
    return is_torch(tensor) and str(tensor.layout) == "torch.strided" and _storage(tensor) in lent


def _parameters() -> Iterator[Any]:
    """The FSDPParams of this process.

    torch keeps the state of each module that a composable API was called on in one table. Before torch 2.13 a module
    had one group of parameters.
    """
    table = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", {})
    for state in [reference() for reference in list(table.values())]:
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            yield from getattr(group, "fsdp_params", ())


def _storage(tensor: Any) -> int:
    """The address of the object that holds a tensor's memory, of a DTensor that of its own part."""
    address: int = getattr(tensor, "_local_tensor", tensor).untyped_storage()._cdata
    return address
