"""What waits for the uploader: which versions fold into one, which is frozen, and which may be sent next.

Pure values: no I/O, no threads, no clock. Each verb gives the next queue. With what no version covers yet, always

    committed + frozen + waiting + uncovered == baseline
"""

from dataclasses import dataclass, replace

from deltawire.publish.pending import Captured, fold


@dataclass(frozen=True, slots=True)
class Backlog:
    """How much is captured and not committed. Nothing folds any more into `closed_bytes` of its `nbytes`. Among them is
    what was encoded or ranked of a change, for a fold drops that."""

    versions: int
    nbytes: int
    closed_bytes: int


@dataclass(frozen=True, slots=True)
class Queue:
    """The versions that wait, the oldest first, and the `frozen` one that is being sent.

    Nothing folds into version `cut`, or into an earlier one: all ranks of a job must fold at the same places.
    """

    waiting: tuple[Captured, ...] = ()
    frozen: Captured | None = None
    cut: int = -1

    @property
    def is_empty(self) -> bool:
        """Whether everything captured is committed."""
        return not self.waiting and self.frozen is None

    @property
    def held(self) -> tuple[Captured, ...]:
        """Everything captured and not committed, the oldest first."""
        return self.waiting if self.frozen is None else (self.frozen, *self.waiting)

    @property
    def backlog(self) -> Backlog:
        """How much waits or is being sent."""
        total = sum(captured.nbytes for captured in self.held)
        return Backlog(
            versions=sum(captured.versions for captured in self.held),
            nbytes=total,
            closed_bytes=total - sum(captured.delta.nbytes for captured in self.waiting[-1:]),
        )

    def cut_at(self, version: int) -> "Queue":
        """Nothing folds into this version any more, or into an earlier one."""
        return replace(self, cut=max(self.cut, version))

    def add(self, captured: Captured) -> "Queue":
        """Fold a version into the newest that waits, or let it wait for itself.

        A run's first version is not a delta, so nothing folds into it.
        """
        last = self.waiting[-1] if self.waiting else None
        if last is not None and last.parent is not None and last.version > self.cut:
            captured = fold(last, captured)
            return replace(self, waiting=(*self.waiting[:-1], captured))
        if self.frozen is not None and captured.parent is not None:
            captured = captured.waiting()
        return replace(self, waiting=(*self.waiting, captured))

    def can_freeze(self, end: int | None) -> bool:
        """Whether the oldest version may be sent: any, or where an `end` is given, the one that ends there."""
        return bool(self.waiting) and end in (None, self.waiting[0].version)

    def freeze(self) -> "Queue":
        """Take the oldest version to be sent; nothing folds into it from now on."""
        oldest, *rest = self.waiting
        return Queue(tuple(rest), oldest, max(self.cut, oldest.version))

    def commit(self) -> "Queue":
        """Let go of the frozen version, which is durable now."""
        return replace(self, frozen=None)
