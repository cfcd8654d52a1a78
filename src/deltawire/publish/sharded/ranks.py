"""The ranks of a sharded training job: what they hold, what they add up, and what their uploaders tell each other.

Collectives run on a gloo group of our own, in the thread that publishes. Uploaders, which must never take part in a
collective, leave each other notes in a store of our own that rank 0 serves.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Generic, TypeVar, cast

import numpy as np
import numpy.typing as npt

from deltawire.errors import DeltaWireError, RankFailed, ShapeMismatch
from deltawire.prepare.names import ShardedView
from deltawire.publish.sharded.shards import Shard

Sums = npt.NDArray[np.uint64]
"""numbers that add up modulo 2^64"""
Answer = TypeVar("Answer")
LOOK = 0.02
"""seconds between two looks for a note: a fraction of what any upload takes"""


@dataclass(frozen=True, slots=True)
class _Address:
    """Where rank 0 serves the notes."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class _Said(Generic[Answer]):
    """What rank 0 tells all ranks: an answer, or the error that it met instead."""

    answer: Answer | None = None
    error: DeltaWireError | None = None


def is_first(process_group: Any) -> bool:
    """Whether this process is rank 0 of a group; of none, it is alone."""
    if process_group is None:
        return True
    import torch.distributed as dist

    return bool(dist.get_rank(process_group) == 0)


class Ranks:
    """The ranks of a process group, seen from one of them. Every rank makes one, and calls the same verbs in order."""

    def __init__(self, process_group: Any) -> None:
        import torch.distributed as dist

        self._members: list[int] = dist.get_process_group_ranks(process_group)
        # Of the members alone: a job may have ranks that do not train, and they need not know.
        self._group = dist.new_group(self._members, backend="gloo", use_local_synchronization=True)
        self._layouts: dict[Any, Shard] = {}
        self.rank, self.size = dist.get_rank(self._group), len(self._members)
        store: Any = None
        if self.rank == 0:
            store = dist.TCPStore(_own_address(), 0, is_master=True, wait_for_workers=False)
        address = self.from_first(lambda: _Address(store.host, store.port))
        self.notes = Notes(store or dist.TCPStore(address.host, address.port, is_master=False, wait_for_workers=False))

    def from_first(self, make: Callable[[], Answer]) -> Answer:
        """What `make` gives on rank 0, on every rank. What it raises there is raised on every rank; RankFailed when
        a rank is gone."""
        import torch.distributed as dist

        said: list[_Said[Answer] | None] = [_try(make) if self.rank == 0 else None]
        try:
            dist.broadcast_object_list(said, src=self._members[0], group=self._group)
        except RuntimeError as error:
            raise RankFailed(f"a rank of this job is gone; restart the job ({error})") from error
        first = said[0]
        assert first is not None
        if first.error is not None:
            raise first.error
        return cast(Answer, first.answer)

    def add_up(self, numbers: Sums, problem: BaseException | None = None) -> Sums:
        """The sum over all ranks, modulo 2^64, on every rank; of equal length on each.

        Where one has a `problem`, all raise: those that have one raise it, the others RankFailed. So no rank is left
        waiting. Raises RankFailed, too, when a rank is gone.
        """
        import torch
        import torch.distributed as dist

        flags = np.zeros(self.size, np.uint64)
        flags[self.rank] = problem is not None
        sums: Sums = np.concatenate([flags, numbers])
        try:
            dist.all_reduce(torch.from_numpy(sums.view(np.int64)), group=self._group)
        except RuntimeError as error:
            raise problem or RankFailed(f"a rank of this job is gone; restart the job ({error})") from error
        if problem is not None:
            raise problem
        if failed := np.flatnonzero(sums[: self.size]).tolist():
            raise RankFailed(
                f"rank {', '.join(map(str, failed))} of this job could not do its part, and says why; nothing was "
                "published and nothing is lost: what was captured goes with the next good publish"
            )
        return sums[self.size :]

    def hold(self, name: str, tensor: Any) -> Shard:
        """What this rank holds of a tensor: plain, a DTensor, or a view of one. No rank is asked, nothing is gathered.

        Raises ShapeMismatch for a DTensor whose values are not settled (Partial), or whose layout is not a box. All
        ranks raise it, too, for a view without dimensions: not every rank has its one element.
        """
        import torch
        from torch.distributed.tensor import DTensor

        if isinstance(tensor, ShardedView):
            shard = self.hold(name, tensor.tensor)
            if not tensor.view.dims and shard.copies < self.size:  # no box of such a tensor is empty
                raise ShapeMismatch(
                    f"{name} has no dimensions and is an element of a tensor that is sharded over ranks. Keep that "
                    "tensor whole on all of them: `fully_shard(…, ignored_params=…)`"
                )
            return shard.through(tensor.view)
        if not isinstance(tensor, DTensor):
            return Shard.all_of(tensor, owned=self.rank == 0, copies=self.size)
        with torch.no_grad():  # detach() would do, but takes a DTensor twice as long, and experts come by the thousand
            local = tensor.to_local()
        layout = (tuple(tensor.shape), tensor.device_mesh, tensor.placements)
        if layout not in self._layouts:  # torch lists a dimension's rows to answer: once is enough
            self._layouts[layout] = self._lay_out(name, *layout)
        shard = self._layouts[layout]
        if shard.shape != tuple(local.shape):
            shapes = f"{list(shard.shape)} on this rank, and it has {list(local.shape)}"
            raise ShapeMismatch(f"{name}: {tensor.placements} puts {shapes}")
        return replace(shard, tensor=local)

    def _lay_out(self, name: str, whole: tuple[int, ...], mesh: Any, placements: Any) -> Shard:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        if any(placement.is_partial() for placement in placements):
            raise ShapeMismatch(f"{name} is a partial sum ({placements}): redistribute it before it is published")
        shape, offset = compute_local_shape_and_global_offset(whole, mesh, placements)
        copied = [dim for dim, placement in enumerate(placements) if placement.is_replicate()]
        # The same placements may stand on sister meshes (a layer left whole by TP, sharded by FSDP): of those, the one
        # with our first rank in it counts.
        first = self._members[0] in mesh.mesh.flatten().tolist()
        copies = prod(mesh.size(dim) for dim in copied) * (self.size // mesh.size())
        owned = first and all(mesh.get_coordinate()[dim] == 0 for dim in copied)
        return Shard(whole, tuple(offset), tuple(shape), None, owned, copies, sharded=True)

    def close(self, timeout: float) -> None:
        """Say goodbye. Rank 0, which serves the notes, stays until all have said it, at most `timeout` seconds."""
        with suppress(RankFailed):
            self.notes.post(f"closed/{self.rank}", b"")
            waiting_for = [f"closed/{rank}" for rank in range(1, self.size)] if self.rank == 0 else []
            deadline = time.monotonic() + timeout
            while time.monotonic() < deadline and any(self.notes.read(key) is None for key in waiting_for):
                time.sleep(LOOK)


def _try(make: Callable[[], Answer]) -> _Said[Answer]:
    try:
        return _Said(make())
    except Exception as error:
        return _Said(error=error if isinstance(error, DeltaWireError) else DeltaWireError(f"rank 0: {error!r}"))


class Notes:
    """Small notes that ranks leave each other, by key. Any of a job's uploaders may write and read; none ever waits."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def post(self, key: str, note: bytes) -> None:
        """Leave a note, or change it. Raises RankFailed when rank 0, which serves them, is gone."""
        with _served():
            self._store.set(key, note)

    def read(self, key: str) -> bytes | None:
        """A note; None before it is left. Raises RankFailed when rank 0 is gone."""
        with _served():
            return bytes(self._store.get(key)) if self._store.check([key]) else None


@contextmanager
def _served() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankFailed(f"rank 0 of this job is gone; restart the job ({error})") from error


def _own_address() -> str:
    """Where the other ranks reach this host: as torch's own rendezvous does, else by the host's name, as gloo does."""
    import torch.distributed as dist

    if dist.get_rank() == 0 and "MASTER_ADDR" in os.environ:
        return os.environ["MASTER_ADDR"]
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"
