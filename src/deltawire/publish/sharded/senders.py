"""Making a version of a sharded job durable: every rank hands in its payloads, and rank 0 commits."""

import threading
import time
from contextlib import suppress
from itertools import count

import msgspec

from deltawire.buckets.base import Bucket
from deltawire.errors import DeltaWireError, NotFound, RankFailed
from deltawire.publish import pending
from deltawire.publish.pending import Captured, Shipment
from deltawire.publish.sender import Committed, Stop, Tip, commit
from deltawire.publish.sharded.channel import HandedIn, NoteChannel
from deltawire.publish.sharded.ranks import LOOK, Ranks
from deltawire.runlog import writing
from deltawire.runlog.keys import payload_key
from deltawire.runlog.records import Payload, signed
from deltawire.runlog.signing import SigningKey

BEAT = 5.0
"""seconds between two signs of life of a rank"""


class LeadSender:
    """Rank 0: it says which versions the next commit covers, and commits once every rank's payloads are durable."""

    def __init__(self, bucket: Bucket, ranks: Ranks, *, writer: str, key: SigningKey | None) -> None:
        self._bucket, self._ranks, self._writer, self._key = bucket, ranks, writer, key
        self._channel = NoteChannel(ranks.notes, ranks.rank, [*range(1, ranks.size)])
        self._met: set[int] = set()

    def next_range(self, stop: Stop) -> int | None:
        """Rank 0 decides, so any version may be the next."""
        return None

    def send(self, captured: Captured, shipment: Shipment, tip: Tip | None, stop: Stop) -> Committed | None:
        """Write the payloads, wait for those of the others, then commit.

        Raises what stops any rank, too; RankFailed for one that is gone.
        """
        number = self._channel.number
        self._ranks.notes.post(f"range/{number}", str(captured.version).encode())
        if captured.parent is None:
            writing.put_run(self._bucket, signed(captured.run, self._key))
            self._ranks.notes.post(f"begun/{number}", b"")
        writing.put_payloads(self._bucket, captured.run.run, shipment.payloads)
        handed_in = self._gather(number, captured.run.run, stop)
        if handed_in is None:
            return None
        parts = [HandedIn(shipment.records, shipment.names), *handed_in]
        shipments = [Shipment({}, part.records, part.names) for part in parts]
        parent_hash = tip.hash if tip is not None else None
        attempt = pending.freeze(captured, shipments, parent_hash=parent_hash, writer=self._writer, key=self._key)
        committed = commit(self._bucket, attempt, tip)
        self._ranks.notes.post(f"done/{number}", msgspec.json.encode(committed))
        self._channel.number += 1
        return committed

    def _gather(self, number: int, run: str, stop: Stop) -> list[HandedIn] | None:
        """What the other ranks made durable for a commit, in their order; None when stopped."""
        handed_in = []
        for rank in range(1, self._ranks.size):
            note = self._channel.wait(f"part/{number}/{rank}", stop, of=rank)
            if note is None:
                return None
            found = msgspec.json.decode(note, type=HandedIn)
            self._require_here(rank, run, found.records)
            handed_in.append(found)
        return handed_in

    def _require_here(self, rank: int, run: str, records: tuple[Payload, ...]) -> None:
        """Check, once for each rank, that it writes to the bucket we commit to.

        A folder of the same path may be another one on its host.
        """
        if rank in self._met or not records:
            return
        try:
            self._bucket.stat(payload_key(run, records[0].key))
        except NotFound:
            raise NotFound(
                f"{self._bucket.url}: what rank {rank} wrote is not there. All ranks must open one bucket that each of "
                "their hosts reaches; memory:// and a folder on one host's own disk cannot be reached"
            ) from None
        self._met.add(rank)

    def report_trouble(self, error: DeltaWireError) -> None:
        """Let the others know what stops the commit."""
        self._channel.report_trouble(error)

    def close(self, timeout: float) -> None:
        """Stay until the others have heard of the last commit."""
        self._ranks.close(timeout)


class RankSender:
    """Any other rank: it makes its payloads durable, hands them in, and waits for the commit."""

    def __init__(self, bucket: Bucket, ranks: Ranks) -> None:
        self._bucket, self._ranks = bucket, ranks
        self._channel = NoteChannel(ranks.notes, ranks.rank, [0])
        self._closed = threading.Event()
        self._pulse = threading.Thread(target=self._show_life, name="deltawire-pulse", daemon=True)
        self._pulse.start()

    def next_range(self, stop: Stop) -> int | None:
        """The version that rank 0 lets the next commit end at; None when stopped. Raises RankFailed."""
        while not stop():
            if (note := self._ranks.notes.read(f"range/{self._channel.number}")) is not None:
                return int(note)
            time.sleep(LOOK)
        return None

    def send(self, captured: Captured, shipment: Shipment, tip: Tip | None, stop: Stop) -> Committed | None:
        """Make this rank's payloads durable, and wait for the commit. Raises what stops rank 0, too."""
        number = self._channel.number
        if captured.parent is None and self._channel.wait(f"begun/{number}", stop) is None:
            return None
        writing.put_payloads(self._bucket, captured.run.run, shipment.payloads)
        handed_in = msgspec.json.encode(HandedIn(shipment.records, shipment.names))
        self._ranks.notes.post(f"part/{number}/{self._ranks.rank}", handed_in)
        note = self._channel.wait(f"done/{number}", stop)
        if note is None:
            return None
        self._channel.number += 1
        return msgspec.json.decode(note, type=Committed)

    def report_trouble(self, error: DeltaWireError) -> None:
        """Let rank 0 know what stops this rank."""
        self._channel.report_trouble(error)

    def close(self, timeout: float) -> None:
        """Let rank 0 know that this rank needs it no more.

        The thread that shows life ends first: one inside torch's store as the interpreter ends would abort the process.
        """
        self._closed.set()
        self._ranks.close(timeout)
        self._pulse.join(timeout)

    def _show_life(self) -> None:
        with suppress(RankFailed):
            for number in count():
                self._ranks.notes.post(f"pulse/{self._ranks.rank}", str(number).encode())
                if self._closed.wait(BEAT):
                    return
