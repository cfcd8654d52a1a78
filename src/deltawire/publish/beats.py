"""What a trainer says of itself in the bucket beside its commits: what waits, and why. At most every 30 seconds."""

import threading
import time
from collections.abc import Callable

import msgspec

from deltawire.buckets.base import Bucket
from deltawire.errors import AccessRefused, BucketError
from deltawire.runlog.heartbeats import TrainerBeat
from deltawire.runlog.keys import trainer_key
from deltawire.runlog.pace import FLOOR, Pace

AT_END = 1.0
"""seconds that closing waits for a store which may not answer"""


class TrainerBeats:
    """Writes what `look` gives whenever it says something new, and else now and then; nothing while it gives None. The
    first is written after half a minute: a short run writes none. `meanwhile` is called every time before."""

    def __init__(
        self,
        bucket: Bucket,
        look: Callable[[], TrainerBeat | None],
        meanwhile: Callable[[], None] = lambda: None,
        *,
        every: float = FLOOR,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._bucket, self._look, self._every, self._clock = bucket, look, every, clock
        self._meanwhile, self._may_write = meanwhile, True
        self._pace = Pace(bucket.poll_seconds)
        self._last: TrainerBeat | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="deltawire-trainer-beat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Say that the run ended, if anything was said before."""
        self._ending.set()
        self._thread.join(AT_END)

    def _run(self) -> None:
        while not self._ending.wait(max(self._every, self._pace.floor)):
            self._meanwhile()
            self._say(self._look())
        if self._last is not None and (last := self._look() or self._last):
            self._write(msgspec.structs.replace(last, ended=True))

    def _say(self, beat: TrainerBeat | None) -> None:
        if beat is not None and self._may_write and self._pace.is_due(news=beat != self._last):
            self._write(beat)

    def _write(self, beat: TrainerBeat) -> None:
        said = msgspec.structs.replace(beat, at=self._clock(), every=self._pace.every)
        try:
            self._bucket.put(trainer_key(beat.run), msgspec.json.encode(said))
        except AccessRefused:  # it may write commits alone
            self._may_write = False
        except BucketError as error:
            self._pace.refused(error)
        else:
            self._last = beat
            self._pace.wrote(self._bucket)
