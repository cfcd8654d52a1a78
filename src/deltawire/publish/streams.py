"""A stream of our own on each device. On the CPU, which has none, all is done at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


@cache
def _stream_on(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Queue on the stream of our own: for memory of our own."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(_stream_on(device)):
        yield


@contextmanager
def beside_trainer(device: torch.device) -> Iterator[None]:
    """The same, after all that the trainer has queued; what it queues next waits for us."""
    if device.type != "cuda":
        yield
        return
    trainers, stream = torch.cuda.current_stream(device), _stream_on(device)
    stream.wait_stream(trainers)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        trainers.wait_stream(stream)
