"""A stream of our own on each device. On the CPU, which has none, all is done at once.

Neither a trainer's inference mode nor its gradients reach what is done there: a tensor that was made in inference mode
could not be written outside of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch


def landing(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory of the host for what crosses from a device: pinned, unless the host has no more to pin."""
    if device.type == "cuda":
        with suppress(RuntimeError):  # of no kind of its own
            return torch.empty(elements, dtype=dtype, device="cpu", pin_memory=True)
    return torch.empty(elements, dtype=dtype, device="cpu")


@cache
def _stream_on(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Queue on the stream of our own: for memory of our own."""
    with torch.inference_mode(False), torch.no_grad():
        if device.type != "cuda":
            yield
            return
        with torch.cuda.stream(_stream_on(device)):
            yield


@contextmanager
def beside_trainer(device: torch.device) -> Iterator[None]:
    """The same, after all that the trainer has queued; what it queues next waits for us."""
    if device.type == "cuda":
        _stream_on(device).wait_stream(torch.cuda.current_stream(device))
    try:
        with own_stream(device):
            yield
    finally:
        if device.type == "cuda":
            torch.cuda.current_stream(device).wait_stream(_stream_on(device))
