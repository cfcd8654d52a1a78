"""Any torch training loop publishes after each optimizer step: a hook on the optimizer, accelerate's included.

    publisher = Publisher(bucket, assets=folder)
    publish_after_step(publisher, model, optimizer)
    ...
    publisher.close()  # waits until every version is in the bucket

A loop with several optimizers calls `publisher.publish(checkpoint_tensors(model), step=step)` itself, of
`trainers.state`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from deltawire.errors import DtypeMismatch, MissingTensor
from deltawire.publish.fsdp import modules_of
from deltawire.publish.publisher import Publisher
from deltawire.trainers.optimizers import unwrap
from deltawire.trainers.rounding import RoundingWatch
from deltawire.trainers.state import checkpoint_tensors

SHARDED = ("full_tensor", "_fsdp_flattened", "ds_id")
"""attributes of a parameter that is sharded over processes: DTensor's, FSDP1's, DeepSpeed's"""


def publish_after_step(publisher: Publisher, model: nn.Module, optimizer: Any, *, step: int = 0) -> Any:
    """Publish the model's weights now, as of `step`, and after every `optimizer.step()`; call `.remove()` to stop.

    `model` may be wrapped by DDP or `torch.compile`. `optimizer.step` may be compiled, but not with `fullgraph=True`:
    what the hook does stays out of the graph. `optimizer` may be accelerate's: the one inside is hooked, which steps
    only once the gradients of a batch are all there. In a job of several processes the first one publishes, and the
    others do nothing. Warns once where rounding undoes most of an update (`trainers.rounding`).

    Raises MissingTensor when other optimizers step some of the weights; then publish yourself, after the last of them.
    Raises DtypeMismatch for a model whose weights are sharded. `optimizer.step()` then raises what `Publisher.publish`
    raises.
    """
    inner = unwrap(optimizer)
    _require_sole(model, inner)
    require_whole(model)
    done, watch = step, RoundingWatch()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def publish(*_: object) -> None:
        nonlocal done
        done += 1
        if is_first_process():
            publisher.publish(dict(checkpoint_tensors(model)), step=done, metrics=watch.after_step(inner))

    if is_first_process():
        publisher.publish(dict(checkpoint_tensors(model)), step=step)
    return inner.register_step_post_hook(publish)


def is_first_process() -> bool:
    """Whether this process publishes: the first of its job, or the only one."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())


def require_whole(model: nn.Module) -> None:
    """Raise DtypeMismatch unless this process holds every weight whole. Ask on every process: where one alone stopped,
    the others would wait for it."""
    fsdp2 = bool(modules_of(model))  # whose parameters are plain tensors after a forward
    for name, parameter in model.named_parameters():
        if fsdp2 or any(hasattr(parameter, mark) for mark in SHARDED):
            raise DtypeMismatch(
                f"{name} is sharded over processes, and one of them alone cannot publish it. For FSDP2 and tensor "
                "parallel open Publisher(process_group=…) on every rank and call its publish there. For FSDP1 and "
                "ZeRO-3 gather the weights first"
            )


def _require_sole(model: nn.Module, optimizer: Any) -> None:
    groups = getattr(optimizer, "param_groups", ())
    stepped = {id(parameter) for group in groups for parameter in group["params"]}
    missing = [name for name, parameter in _trainable(model) if id(parameter) not in stepped]
    if missing or not isinstance(optimizer, torch.optim.Optimizer):
        raise MissingTensor(
            f"{type(optimizer).__name__} does not step {len(missing)} of the trainable weights, among them "
            f"{missing[:1]}: with several optimizers a version after each would be a mixture; call publisher.publish("
            "checkpoint_tensors(model), step=step) after the last of them, and freeze what none of them steps"
        )


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
