"""A copy of a run on this host, taken to any version by the cheapest change; made again where none leads there."""

import shutil
from pathlib import Path

from deltawire.errors import BadDigest, Forked, Gap, WrongBase
from deltawire.format.checkpoint import files
from deltawire.read.changes import Change
from deltawire.read.mirror import Mirror, held
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.records import Position


class LocalCopy:
    """A mirror in `folder`: made by the first move, found again by the next process, made again for another run
    or when its files are not what was written to them.

    It may be given any subscriber: whose bucket moved to a run that goes on from the last one, say.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mirror: Mirror | None = None

    def close(self) -> None:
        """Let another process have the folder."""
        if self._mirror is not None:
            self._mirror.close()
            self._mirror = None

    @property
    def position(self) -> Position | None:
        """Where the mirror stands; None before the first move of this process."""
        return None if self._mirror is None else self._mirror.position

    def is_sound(self) -> bool:
        """Whether the mirror's files still hold what was written to them; every byte is read."""
        return self._mirror is None or self._mirror.weights.digests(self._mirror.table) == self._mirror.digests

    def discard(self) -> None:
        """Remove the mirror, so that the next move makes it again."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def at(self, subscriber: Subscriber, version: int) -> tuple[Mirror, Change]:
        """The mirror at a version, and what took it there. Raises what Subscriber.change and Mirror raise; the mirror
        then stands where it stood."""
        here = held(self._folder)
        if self._mirror is None and here is not None and here.run == subscriber.run.run:
            self._open(subscriber)
        try:
            change = self._way_to(subscriber, version)
        except WrongBase:
            if self.is_sound():
                raise
            self.discard()
            change = self._way_to(subscriber, version)
        if self._mirror is None or change.anchor is not None:
            assert change.anchor is not None
            assert change.anchor_position is not None
            self.close()
            if held(self._folder) is not None:  # of another run, or of a version the chain no longer has
                shutil.rmtree(self._folder)
            self._mirror = Mirror.create(
                self._folder, files(change.anchor.folder), change.anchor_position, subscriber.run.table
            )
            subscriber.close()  # the downloaded anchor is as large as the model
        if change.position != self._mirror.position:
            try:
                self._mirror.apply(change.delta, change.position)
            except BadDigest:
                if not self.is_sound():
                    self.discard()
                elif not subscriber.pass_over(change):
                    self.close()
                    raise
                return self.at(subscriber, version)
            subscriber.keep(change)
        return self._mirror, change

    def _open(self, subscriber: Subscriber) -> None:
        """Go on with the folder of an earlier process; one that rotted since is made again."""
        try:
            self._mirror = Mirror(self._folder, subscriber.run.table)
        except BadDigest:
            self.discard()

    def _way_to(self, subscriber: Subscriber, version: int) -> Change:
        """The change that takes the mirror to a version, or makes it again."""
        if self._mirror is None or self._mirror.position.run != subscriber.run.run:
            return subscriber.change(None, version)
        try:
            return subscriber.change(self._mirror.position, version, weights=self._mirror.weights, anchors=False)
        except (Gap, Forked):
            return subscriber.change(None, version)
