"""A tensor-parallel worker of a host that holds a part of each tensor: BUCKET RANK WORKERS.

It joins at version 0 and follows to the last one. For each version it prints a line of JSON: how much more anonymous
memory it had at most than before it joined, the bytes that it holds of the model, and the digest of its part of each
tensor.
"""

import json
import sys
from collections.abc import Iterable

import torch
from anonymous import Memory, anonymous
from torch import nn

import deltawire as dw
from deltawire.format.codecs import subset
from deltawire.live import staging, writes
from deltawire.live.live_weights import LiveWeights
from deltawire.live.transforms import AfterLoading
from deltawire.read.host_cache import host_cache
from deltawire.runlog.records import Run


class Worker(nn.Module):
    """Rows of every other tensor of a run, and columns of those between."""

    def __init__(self, run: Run, rank: int, size: int) -> None:
        super().__init__()
        self._rank, self._size = rank, size
        self._parts = nn.ParameterList()
        for number, entry in enumerate(run.table):
            empty = torch.empty(entry.shape, dtype=torch.bfloat16, device="meta")
            part = torch.zeros(self._part(number, empty).shape, dtype=torch.bfloat16)
            self._parts.append(nn.Parameter(part, requires_grad=False))
        self._numbers = {entry.name: number for number, entry in enumerate(run.table)}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self._parts[self._numbers[name]].data.copy_(self._part(self._numbers[name], tensor))

    def _part(self, number: int, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(self._size, number % 2)[self._rank]


def follow(url: str, rank: int, size: int) -> None:
    subset.warm_up()
    with dw.Subscriber(dw.open_bucket(url), cache=host_cache()) as subscriber:
        live = LiveWeights(Worker(subscriber.run, rank, size), subscriber.run.table, loading=AfterLoading())
        held = sum(place.box.size * 2 for name in live.table for place in live.places(name))
        digests, since, before = live.digests(), None, anonymous()
        for version in range(subscriber.latest().version + 1):
            with Memory(0.001) as memory:
                plan = staging.stage(live, digests, subscriber, since, version)
            writes.apply(plan.writes)
            digests, since = plan.digests, plan.after
            del plan
            parts = {name: f"{sum(own) % (1 << 64):016x}" for name, own in live.digests().items()}
            print(
                json.dumps({"version": version, "taken": memory.most - before, "held": held, "digests": parts}),
                flush=True,
            )


if __name__ == "__main__":
    follow(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
