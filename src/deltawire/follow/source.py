"""The bucket's side of following: which version should be served, of which run."""

from collections.abc import Callable
from pathlib import Path

from deltawire.buckets import Bucket, open_bucket
from deltawire.errors import NotFound, OtherRun
from deltawire.follow.options import FollowOptions
from deltawire.read.host_cache import host_cache
from deltawire.read.seen import Seen
from deltawire.read.subscriber import Subscriber
from deltawire.runlog import log
from deltawire.runlog.records import Position
from deltawire.runlog.signing import trust


class Source:
    """One bucket, read as `options` say. `state` is the file that remembers the newest signed version; `on_doubt` hears
    why nothing is known from before. With `any_run` whichever run the bucket's HEAD names is followed, else only one
    that continues the run before."""

    def __init__(
        self,
        url: str,
        options: FollowOptions,
        *,
        state: Path | None,
        on_doubt: Callable[[str], None] = lambda text: None,
        any_run: bool = False,
    ) -> None:
        self.bucket: Bucket = open_bucket(url)
        self.trust = trust(options.trusted)
        self.base = None if options.base is None else Path(options.base).absolute()
        self._any_run = any_run
        self._seen = Seen(
            state if self.trust else None, run=options.run, forget=options.forget_state, on_doubt=on_doubt
        )
        self.subscriber = self._subscribe()

    def target(self, pin: int | None) -> Position:
        """The version to serve: the pinned one, else the newest; of the run that continues ours when HEAD names it.

        Raises BucketError, FormatError, ChainError; OtherRun for a run that is not followed, RolledBack for one that
        leads back.
        """
        try:
            newest = self.subscriber.latest()
        except OtherRun:
            if not self._is_followed(log.read_head(self.bucket).run):
                raise
            self.subscriber.close()
            self.subscriber = self._subscribe()
            newest = self.subscriber.latest()
        self._seen.admit(self.subscriber, newest, pinned=pin is not None)
        if pin is None:
            return newest
        chain = self.subscriber.chain
        try:
            return chain.commit(pin).record.position
        except NotFound:
            raise chain.gap_at(pin, chain.versions()) from None

    def refresh(self) -> None:
        """Forget what was read of the bucket: a record may have been damaged on its way."""
        self.subscriber.refresh()

    def close(self) -> None:
        """Let go of downloads."""
        self.subscriber.close()

    def _is_followed(self, run: str) -> bool:
        return self._any_run or log.continues(self.bucket, run, self.subscriber.run.run, trust=self.trust)

    def _subscribe(self) -> Subscriber:
        return Subscriber(self.bucket, base=self.base, trusted=self.trust, cache=host_cache())
