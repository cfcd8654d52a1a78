"""Making a captured version durable: alone, or as rank 0 (which commits) and the others (which hand in) of a job.

No collective here, for uploads run behind the training: ranks leave each other notes.

    range/N        rank 0   the version that the N-th commit of this job ends at: nobody folds into it any more
    begun/N        rank 0   the run's record is durable, and its first payloads may be written
    part/N/RANK    others   what this rank made durable for it: payload records, names of changed tensors
    done/N         rank 0   the commit is durable: its position, hash and bytes
    trouble/RANK   anyone   what went wrong with the last try; told anew with every try
    pulse/RANK     others   a number that moves as long as the process lives
    closed/RANK    anyone   this rank hands in nothing more
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count

import msgspec

from deltawire.buckets.base import Bucket
from deltawire.errors import DeltaWireError, NotFound, RankFailed, made_again
from deltawire.publish import pending
from deltawire.publish.pending import Captured, Part
from deltawire.publish.sharded.ranks import LOOK, Notes, Ranks
from deltawire.runlog import writing
from deltawire.runlog.keys import payload_key
from deltawire.runlog.records import Payload, Position, signed
from deltawire.runlog.signing import SigningKey
from deltawire.runlog.writing import Attempt

Stop = Callable[[], bool]
BEAT = 5.0
"""seconds between two signs of life of a rank"""
GONE = 120.0
"""seconds without one after which a rank counts as gone: more than anything keeps Python's threads from running"""


class Landed(msgspec.Struct, frozen=True):
    """A commit that is durable: where it stands, the hash of its record, and the bytes of its payloads."""

    position: Position
    hash: str
    wire_bytes: int


class _Handed(msgspec.Struct, frozen=True):
    records: tuple[Payload, ...]
    names: tuple[str, ...]


class _Trouble(msgspec.Struct, frozen=True):
    number: int
    tries: int
    origin: int
    kind: str
    message: str


class Alone:
    """One process: it writes payloads and commits itself."""

    def __init__(self, bucket: Bucket, *, writer: str, key: SigningKey | None) -> None:
        self._bucket, self._writer, self._key = bucket, writer, key

    def next_range(self, stop: Stop) -> int | None:
        """The version that the next commit ends at; None: whatever waits."""
        return None

    def send(self, captured: Captured, part: Part, parent_hash: str | None, stop: Stop) -> Landed | None:
        """Make a version durable. After an error call again with the same arguments; None when told to stop.

        Raises BucketError, ChainError."""
        attempt = pending.freeze(captured, [part], parent_hash=parent_hash, writer=self._writer, key=self._key)
        writing.append(self._bucket, attempt)
        return _landed(attempt)

    def tell(self, error: DeltaWireError) -> None:
        """There is nobody to tell."""

    def close(self, timeout: float) -> None:
        """There is nobody to wait for."""


class First:
    """Rank 0: it says which versions the next commit covers, and commits once every rank's payloads are durable."""

    def __init__(self, bucket: Bucket, ranks: Ranks, *, writer: str, key: SigningKey | None) -> None:
        self._bucket, self._ranks, self._writer, self._key = bucket, ranks, writer, key
        self._line = _Line(ranks.notes, ranks.rank, [*range(1, ranks.size)])
        self._met: set[int] = set()

    def next_range(self, stop: Stop) -> int | None:
        """Rank 0 decides: whatever waits."""
        return None

    def send(self, captured: Captured, part: Part, parent_hash: str | None, stop: Stop) -> Landed | None:
        """As one process alone, but the others' payloads come first. Raises what stops any rank, too; RankFailed for
        one that is gone."""
        number = self._line.number
        self._ranks.notes.post(f"range/{number}", str(captured.version).encode())
        if captured.parent is None:
            writing.put_run(self._bucket, signed(captured.run, self._key))
            self._ranks.notes.post(f"begun/{number}", b"")
        writing.put_payloads(self._bucket, captured.run.run, part.payloads)
        handed = []
        for rank in range(1, self._ranks.size):
            note = self._line.wait(f"part/{number}/{rank}", stop, of=rank)
            if note is None:
                return None
            found = msgspec.json.decode(note, type=_Handed)
            self._require_here(rank, captured.run.run, found.records)
            handed.append(Part({}, found.records, found.names))
        own = Part({}, part.records, part.names)
        attempt = pending.freeze(captured, [own, *handed], parent_hash=parent_hash, writer=self._writer, key=self._key)
        writing.append(self._bucket, attempt)
        landed = _landed(attempt)
        self._ranks.notes.post(f"done/{number}", msgspec.json.encode(landed))
        self._line.number += 1
        return landed

    def _require_here(self, rank: int, run: str, records: tuple[Payload, ...]) -> None:
        """Look, once for each rank, whether it writes to the bucket we commit to: a folder of the same path may be
        another one on its host."""
        if rank in self._met or not records:
            return
        try:
            self._bucket.stat(payload_key(run, records[0].key))
        except NotFound:
            raise NotFound(
                f"{self._bucket.url}: what rank {rank} wrote is not there: all ranks must open one bucket, which each "
                "of their hosts reaches (memory:// and a folder on one host's own disk are no such)"
            ) from None
        self._met.add(rank)

    def tell(self, error: DeltaWireError) -> None:
        """Let the others know what stops the commit."""
        self._line.tell(error)

    def close(self, timeout: float) -> None:
        """Stay until the others have heard of the last commit."""
        self._ranks.close(timeout)


class Other:
    """Any other rank: it makes its payloads durable, hands them in, and waits for the commit."""

    def __init__(self, bucket: Bucket, ranks: Ranks) -> None:
        self._bucket, self._ranks = bucket, ranks
        self._line = _Line(ranks.notes, ranks.rank, [0])
        self._closed = threading.Event()
        threading.Thread(target=self._live, name="deltawire-pulse", daemon=True).start()

    def next_range(self, stop: Stop) -> int | None:
        """The version that rank 0 lets the next commit end at; None when told to stop. Raises RankFailed."""
        while not stop():
            if (note := self._ranks.notes.read(f"range/{self._line.number}")) is not None:
                return int(note)
            time.sleep(LOOK)
        return None

    def send(self, captured: Captured, part: Part, parent_hash: str | None, stop: Stop) -> Landed | None:
        """Make this rank's payloads durable, and wait for the commit. Raises what stops rank 0, too."""
        number = self._line.number
        if captured.parent is None and self._line.wait(f"begun/{number}", stop) is None:
            return None
        writing.put_payloads(self._bucket, captured.run.run, part.payloads)
        handed = msgspec.json.encode(_Handed(part.records, part.names))
        self._ranks.notes.post(f"part/{number}/{self._ranks.rank}", handed)
        note = self._line.wait(f"done/{number}", stop)
        if note is None:
            return None
        self._line.number += 1
        return msgspec.json.decode(note, type=Landed)

    def tell(self, error: DeltaWireError) -> None:
        """Let rank 0 know what stops this rank."""
        self._line.tell(error)

    def close(self, timeout: float) -> None:
        """Let rank 0 know that this rank needs it no more."""
        self._closed.set()
        self._ranks.close(timeout)

    def _live(self) -> None:
        with suppress(RankFailed):
            for number in count():
                self._ranks.notes.post(f"pulse/{self._ranks.rank}", str(number).encode())
                if self._closed.wait(BEAT):
                    return


def sender_of(bucket: Bucket, ranks: Ranks | None, key: SigningKey | None) -> Alone | First | Other:
    """What makes versions durable in this process: it alone does, or its rank's part. Commits name it by host and pid;
    `key` signs them."""
    writer = f"{socket.gethostname()} pid {os.getpid()}"
    if ranks is None:
        return Alone(bucket, writer=writer, key=key)
    return First(bucket, ranks, writer=writer, key=key) if ranks.rank == 0 else Other(bucket, ranks)


class _Line:
    """How far this rank is in the job's commits, and the troubles it tells and hears."""

    def __init__(self, notes: Notes, rank: int, listens_to: list[int]) -> None:
        self._notes, self._rank, self._listens_to = notes, rank, listens_to
        self.number, self._tries = 0, 0
        self._heard: dict[int, bytes] = {}
        self._from: tuple[DeltaWireError, int] | None = None
        self._pulses: dict[int, tuple[bytes | None, float]] = {}

    def wait(self, key: str, stop: Stop, *, of: int | None = None) -> bytes | None:
        """A note, once it is there; None when told to stop. Raises the trouble of another rank, each once; RankFailed
        when `of`, the rank whose note it is, is gone."""
        while not stop():
            lost = None if of is None else self._lost(of)  # before the note is looked for, which may be its last
            if (note := self._notes.read(key)) is not None:
                return note
            for rank in self._listens_to:
                self._listen(rank)
            if lost is not None:
                raise RankFailed(f"rank {of} {lost} before its changes were durable; restart the job")
            time.sleep(LOOK)
        return None

    def tell(self, error: DeltaWireError) -> None:
        """Tell a trouble. Rank 0 passes on what it heard, for all listen to it; what it is the only one to tell us,
        nobody needs to hear from us."""
        origin = self._from[1] if self._from is not None and self._from[0] is error else self._rank
        if self._rank in (origin, 0):
            self._tries += 1
            trouble = _Trouble(self.number, self._tries, origin, type(error).__name__, str(error))
            with suppress(RankFailed):
                self._notes.post(f"trouble/{self._rank}", msgspec.json.encode(trouble))

    def _lost(self, rank: int) -> str | None:
        """Why nothing more is to be expected of a rank, if so."""
        if self._notes.read(f"closed/{rank}") is not None:
            return "was closed"
        pulse, now = self._notes.read(f"pulse/{rank}"), time.monotonic()
        if rank not in self._pulses or self._pulses[rank][0] != pulse:
            self._pulses[rank] = pulse, now
        return f"gave no sign of life for {GONE:.0f} s" if now - self._pulses[rank][1] > GONE else None

    def _listen(self, rank: int) -> None:
        note = self._notes.read(f"trouble/{rank}")
        if note is None or note == self._heard.get(rank):
            return
        self._heard[rank] = note
        trouble = msgspec.json.decode(note, type=_Trouble)
        if trouble.number == self.number and trouble.origin != self._rank:  # neither over, nor our own coming back
            self._from = _as_error(trouble), trouble.origin
            raise self._from[0]


def _as_error(trouble: _Trouble) -> DeltaWireError:
    message = trouble.message if trouble.origin == 0 else f"rank {trouble.origin}: {trouble.message}"
    return made_again(trouble.kind, message) or DeltaWireError(message)


def _landed(attempt: Attempt) -> Landed:
    return Landed(attempt.commit.position, attempt.hash, attempt.commit.wire_bytes)
