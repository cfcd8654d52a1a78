"""What the uploaders of a sharded job tell each other, as notes by key. No collective: uploads run behind the training.

range/N        rank 0   the version that the N-th commit of this job ends at: no rank folds into it any more
begun/N        rank 0   the run's record is durable, and its first payloads may be written
part/N/RANK    others   what this rank made durable for it: payload records, names of changed tensors
done/N         rank 0   the commit is durable: its position, hash and bytes
trouble/RANK   any      what went wrong with the last try; written again at every try
pulse/RANK     others   a number that moves as long as the process lives
closed/RANK    any      this rank hands in nothing more
"""

import time
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from deltawire.errors import DeltaWireError, RankFailed, error_from_kind
from deltawire.publish.sender import Stop
from deltawire.publish.sharded.ranks import LOOK, Notes
from deltawire.runlog.records import Payload

GONE = 120.0
"""seconds without a sign of life after which a rank counts as gone: longer than anything blocks Python's threads"""


class HandedIn(msgspec.Struct, frozen=True):
    """What a rank made durable for one commit: records of its payloads, and the names of the tensors they change."""

    records: tuple[Payload, ...]
    names: tuple[str, ...]


class _Trouble(msgspec.Struct, frozen=True):
    """An error of rank `origin`, at its `tries`-th failure, before commit `number` of this job."""

    number: int
    tries: int
    origin: int
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class _Pulse:
    """The last sign of life of a rank, and the clock when it was seen first."""

    note: bytes | None
    since: float


@dataclass(frozen=True, slots=True)
class _Heard:
    """An error that another rank reported, and the rank it began on."""

    error: DeltaWireError
    origin: int


class NoteChannel:
    """How far this rank is in the job's commits, and the troubles it reports and hears of."""

    def __init__(self, notes: Notes, rank: int, listens_to: list[int]) -> None:
        self._notes, self._rank, self._listens_to = notes, rank, listens_to
        self.number, self._tries = 0, 0
        self._last_notes: dict[int, bytes] = {}
        self._heard: _Heard | None = None
        self._pulses: dict[int, _Pulse] = {}

    def wait(self, key: str, stop: Stop, *, of: int | None = None) -> bytes | None:
        """A note, once it is there; None when stopped.

        Raises the trouble of another rank, each once, and RankFailed when rank `of`, which writes the note, is gone.
        """
        while not stop():
            lost = None if of is None else self._lost(of)  # before the look for the note, which may be its last
            if (note := self._notes.read(key)) is not None:
                return note
            for rank in self._listens_to:
                self._listen(rank)
            if lost is not None:
                raise RankFailed(f"rank {of} {lost} before its changes were durable; restart the job")
            time.sleep(LOOK)
        return None

    def report_trouble(self, error: DeltaWireError) -> None:
        """Tell the other ranks of a trouble of this rank. Rank 0 also passes on what it heard, for all listen to it."""
        heard = self._heard
        origin = heard.origin if heard is not None and heard.error is error else self._rank
        if self._rank in (origin, 0):
            self._tries += 1
            trouble = _Trouble(self.number, self._tries, origin, type(error).__name__, str(error))
            with suppress(RankFailed):
                self._notes.post(f"trouble/{self._rank}", msgspec.json.encode(trouble))

    def _lost(self, rank: int) -> str | None:
        """Why nothing more is to be expected of a rank, if so."""
        if self._notes.read(f"closed/{rank}") is not None:
            return "was closed"
        note, now = self._notes.read(f"pulse/{rank}"), time.monotonic()
        if rank not in self._pulses or self._pulses[rank].note != note:
            self._pulses[rank] = _Pulse(note, now)
        return f"gave no sign of life for {GONE:.0f} s" if now - self._pulses[rank].since > GONE else None

    def _listen(self, rank: int) -> None:
        """Raise a trouble that a rank reported since we last looked, unless it is over or began here."""
        note = self._notes.read(f"trouble/{rank}")
        if note is None or note == self._last_notes.get(rank):
            return
        self._last_notes[rank] = note
        trouble = msgspec.json.decode(note, type=_Trouble)
        if trouble.number == self.number and trouble.origin != self._rank:
            self._heard = _Heard(_as_error(trouble), trouble.origin)
            raise self._heard.error


def _as_error(trouble: _Trouble) -> DeltaWireError:
    message = trouble.message if trouble.origin == 0 else f"rank {trouble.origin}: {trouble.message}"
    return error_from_kind(trouble.kind, message) or DeltaWireError(message)
