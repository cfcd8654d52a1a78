"""The newest signed version that a reader has seen: a bucket cannot lead it back, nor to another run of the same key.

Records name no address, because one bucket has several. The random id of a run is what it is known by.
"""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from deltawire.buckets.atomic import file_system_errors, replacing
from deltawire.errors import DAMAGE, BucketError, FormatError, OtherRun, RolledBack
from deltawire.read.subscriber import Subscriber
from deltawire.runlog import log
from deltawire.runlog.log import Filed
from deltawire.runlog.records import Commit, Position

LOOK_BACK = 64
"""commits that are walked from the newest back to the one seen before"""


class Sighting(msgspec.Struct, frozen=True):
    """A signed commit, as it was seen."""

    run: str
    version: int
    hash: str
    format: int = 1

    def __str__(self) -> str:
        return f"{self.run}:{self.version}"


def place_of(state: Path | str | None, engine: str) -> Path:
    """The file that remembers what was seen for one engine: `state`, or a file in it where it is a folder. The default
    is in this user's state folder, by the XDG base directories."""
    name = re.sub(r"[^A-Za-z0-9._@-]+", "-", engine).strip("-.")[:200] + ".json"
    if state is None:
        home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        return home / "deltawire" / name
    return Path(state) / name if str(state).endswith("/") or Path(state).is_dir() else Path(state)


def given(state: Path | str | None) -> Path | None:
    """The file that a caller names, if any: for readers that remember nothing unasked."""
    return None if state is None else Path(state)


class Seen:
    """What one reader has seen. `place` is a file that outlives the process; without it, this process alone remembers.
    `forget` starts over. `run` is the only run, beside those that continue it, that is followed at all.

    `on_doubt` hears, once, why nothing is known from before or kept for later. Raises FormatError for a damaged file.
    """

    def __init__(
        self,
        place: Path | None = None,
        *,
        run: str | None = None,
        forget: bool = False,
        on_doubt: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._place, self._run, self._on_doubt = place, run, on_doubt
        if place is not None and forget:
            with file_system_errors(str(place)):
                place.unlink(missing_ok=True)
        self._last = None if place is None or forget else self._read(place)

    _last: Sighting | None

    def admit(self, subscriber: Subscriber, newest: Position, *, pinned: bool = False) -> None:
        """Take note of the newest version of a bucket whose records are signed. Unsigned ones are not remembered:
        anybody may have written them.

        Raises RolledBack where it is older than what was seen, on another branch, or of a run that does not continue
        that one. With `pinned` an older version of the same run is what was asked for. Raises OtherRun for a run that
        is not the one to follow.
        """
        self._require_run(subscriber)
        if not subscriber.trust:
            return
        filed = subscriber.chain.commit(newest.version)
        here = Sighting(newest.run, newest.version, filed.hash)
        if self._last is not None and here != self._last:
            problem = self._problem(subscriber, filed, here, self._last)
            if problem is not None and not (pinned and here.run == self._last.run):
                raise RolledBack(f"{subscriber.bucket.url}: {problem}")
            if problem is not None:
                return
        if here != self._last:
            self._last = here
            self._write(here)

    def _require_run(self, subscriber: Subscriber) -> None:
        run = subscriber.run.run
        if self._run in (None, run):
            return
        if not log.continues(subscriber.bucket, run, str(self._run), trust=subscriber.trust):
            raise OtherRun(f"{subscriber.bucket.url} holds run {run}, not {self._run} nor one that continues it")

    def _problem(self, subscriber: Subscriber, filed: Filed[Commit], here: Sighting, last: Sighting) -> str | None:
        """Why this is no way forward from what was seen; None where it is."""
        remedy = "--forget-state follows it from now on"
        if here.run != last.run:
            if log.continues(subscriber.bucket, here.run, last.run, trust=subscriber.trust):
                return None
            return f"{last} was seen, and the bucket now holds run {here.run}, which does not continue it; {remedy}"
        if here.version < last.version:
            return (
                f"{last} was seen, and the newest signed version there is {here.version}: newer ones were removed, or "
                f"the bucket was put back; --pin VERSION goes back on purpose, {remedy}"
            )
        if self._is_other_branch(subscriber, filed, last):
            return f"{last} was seen, and {here.version} does not continue it: that version was rewritten; {remedy}"
        return None

    def _is_other_branch(self, subscriber: Subscriber, filed: Filed[Commit], last: Sighting) -> bool:
        if filed.record.version == last.version:
            return filed.hash != last.hash
        with suppress(*DAMAGE):  # what lies between was pruned, or cannot be read: it is newer, and signed
            for commit in subscriber.chain.back(filed, most=LOOK_BACK):
                if commit.record.parent == last.version:
                    return commit.record.parent_hash not in (None, last.hash)
        return False

    def _read(self, place: Path) -> Sighting | None:
        try:
            data = place.read_bytes()
        except FileNotFoundError:
            self._on_doubt(f"nothing was remembered in {place}: whichever run the trusted keys signed is followed")
            return None
        except OSError as error:
            self._doubt(place, error.strerror or str(error))
            return None
        with suppress(msgspec.DecodeError, UnicodeDecodeError):
            found = msgspec.json.decode(data, type=Sighting)
            if found.format == 1:
                return found
        raise FormatError(
            f"{place} is damaged, so what was served before is not known: look at the bucket, then --forget-state"
        )

    def _write(self, here: Sighting) -> None:
        if self._place is None:
            return
        try:
            with file_system_errors(str(self._place)):
                self._place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                with replacing(self._place) as aside, aside.open("xb") as file:
                    file.write(msgspec.json.encode(here))
                    file.flush()
                    os.fsync(file.fileno())
        except BucketError as error:
            self._doubt(self._place, str(error))

    def _doubt(self, place: Path, why: str) -> None:
        """From here on this process alone remembers."""
        self._place = None
        self._on_doubt(f"{place} cannot be used ({why}): after a restart, an older version may be followed")
