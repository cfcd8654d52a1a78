"""Follow a bucket and drive a vLLM server through each new version: stage while it generates, pause, commit, resume.

The engine, not this process's memory, says where the server stands; so a follower may die and start again at any time.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

from deltawire.buckets import environment
from deltawire.errors import (
    BadSignature,
    BucketError,
    ChainError,
    EngineError,
    EngineUnsupported,
    FormatError,
    Quarantined,
    Unavailable,
    WrongBase,
    named_error,
    some,
)
from deltawire.follow.engine import AuditReport, Engine, PauseMode, WorkerStatus, nap
from deltawire.follow.holding import Hold
from deltawire.follow.loop import Following, replica_name
from deltawire.follow.news import Fetching, News, Note
from deltawire.format.checkpoint import is_adapter
from deltawire.read.seen import given, place_of
from deltawire.runlog.records import Position

SLOW = 10.0
"""seconds after which what keeps a worker busy is told"""
UNVERIFIED = "unverified"
"""what a server reports whose weights were found to be no version"""


class UpdateReport(msgspec.Struct, frozen=True):
    """One update that the server serves now.

    `from_version` is None when it started from an anchor. `pause_ms` is measured here, from opening the session to the
    answer to the resume; `write_ms` by the worker, around the writes alone. `verified` means that every changed
    tensor's new digest was equal to the commit's before anything was written. `publish_to_served_s` compares this
    host's clock with the publisher's.
    """

    run: str
    version: int
    from_version: int | None
    changed: int
    wire_bytes: int
    fetch_s: float
    stage_s: float
    pause_ms: float
    write_ms: float
    verified: bool
    publish_to_served_s: float


class Follower(Following[Engine, UpdateReport]):
    """Keeps one vLLM server at the newest version of one bucket. It alone drives the server's updates, by a lease that
    it renews: a second follower raises AnotherFollower, unless the first was not heard of for 15 seconds, is gone, or
    `take_over` is set; from then on the first does. A pause or a session that it finds was left by a follower that was
    killed, and is ended.

    `pin` holds the server at a version, older or newer, instead of the newest: how a bad policy is withdrawn.
    `base` is a folder on the server's host with the run's base checkpoint, for runs that start from one by reference.
    `trusted` are public keys, or files of them: then only records they signed are followed. The server
    goes on trusting those alone when another follower comes that has none; `on_news` is told so then.

    `state` is a file, or a
    folder of such, that remembers the newest signed version across restarts: going back then takes `pin`, and another
    run raises RolledBack unless it continues the one seen. By default it is in this user's state folder for a server,
    and nowhere for an `LLM` in this process. `forget_state` begins it anew. `run` names the only run that is followed,
    beside those that continue it.

    `replica` names the entry under `replicas/` that tells others, and retention, what it serves and needs.

    `pause` says what becomes of requests in flight during an update: "keep" (default) holds them where they are, "wait"
    lets them finish first, "abort" ends them. Every `audit_every` updates all of live memory is digested anew (0:
    never) while the server generates, as it is in the pause after every anchor. Weights that turn out to be no version
    are made anew from the bucket.

    The workers read the bucket too, with their own environment. With `pass_endpoint` they are told where its store is
    (HF_ENDPOINT, AWS_ENDPOINT_URL, the region …) as this process's environment says; never a token or key.

    `poll` is seconds between looks at the bucket, by default what suits the store. `clear_cache` chooses what happens
    to KV computed with older weights: True (default) drops the prefix cache and recomputes running requests, so that no
    token is sampled from mixed versions; False keeps both and pauses shorter.
    """

    def __init__(
        self,
        bucket_url: str,
        engine: Engine,
        *,
        poll: float | None = None,
        pin: int | None = None,
        base: Path | str | None = None,
        trusted: Iterable[str | Path] = (),
        state: Path | str | None = None,
        run: str | None = None,
        forget_state: bool = False,
        pause: PauseMode = "keep",
        clear_cache: bool = True,
        audit_every: int = 100,
        pass_endpoint: bool = False,
        take_over: bool = False,
        replica: str | None = None,
        on_update: Callable[[UpdateReport], None] = lambda report: None,
        on_problem: Callable[[Exception], None] = lambda error: None,
        on_news: Callable[[News], None] = lambda news: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(
            bucket_url,
            engine,
            poll=poll,
            pin=pin,
            base=base,
            trusted=trusted,
            state=place_of(state, replica or replica_name(engine.url)) if engine.outlives_follower else given(state),
            run=run,
            forget_state=forget_state,
            replica=replica,
            on_update=on_update,
            on_problem=on_problem,
            on_news=on_news,
            clock=clock,
        )
        self._told_trust = False
        self._engine.stopping = self._stopping
        self._settings = environment.endpoints(bucket_url) if pass_endpoint else {}
        self._hold = Hold(self._engine, self._replica, self.bucket.url, take_over=take_over, stopping=self._stopping)
        self._pause: PauseMode = pause
        self._clear_cache = clear_cache
        self._audit_every, self._unaudited = audit_every, 0

    def run(self) -> None:
        """See `Following.run`. The lease is renewed meanwhile, whatever this thread waits for."""
        with self._hold.renewed():
            super().run()

    def close(self) -> None:
        """Stop `run`, wait for the update in progress, and let go of the server; it keeps what it serves."""
        self._stopping.set()
        with self._stepping:
            self._hold.release()
            super().close()

    def audit(self) -> AuditReport:
        """Recompute every digest from live memory; see AuditReport. Weights that differ quarantine the server, and the
        next step makes them anew."""
        with self._stepping:
            return self._engine.audit()

    def _advance(self, target: Position) -> UpdateReport | None:
        report = self._update(target)
        self._unaudited += report is not None
        if self._audit_every and self._unaudited >= self._audit_every and not self._audit():
            report = self._update(target) or report
        return report

    def _ask_server(self) -> Position | None:
        return self._engine.status().position

    def _update(self, target: Position) -> UpdateReport | None:
        standing = self.standing
        if (found := self._take_hold()) is None:
            return None
        self._require_whole_model()
        standing.staged = None
        if (status := self._ready(found, target.run)) is None:
            return None
        standing.server_says(status.position)
        if status.position == target:
            self._label(target)
            standing.is_current(target)
            return None
        if not self._stage(target):
            return None
        standing.staged = target.version
        report = self._commit(target)
        standing.is_current(target)
        return report

    def _audit(self) -> bool:
        """Whether live memory is what it should be; if not, the workers have quarantined themselves."""
        found, self._unaudited = self._engine.audit(), 0
        self.standing.audit = f"version {found.position.version if found.position else None}: " + (
            f"{len(found.mismatched)} tensors differ: {some(found.mismatched)}" if found.mismatched else "equal"
        )
        if found.mismatched:
            self._on_problem(WrongBase(f"{self._engine.url}, {self.standing.audit}; they are made anew"))
        return not found.mismatched

    def _greet(self) -> None:
        if self._hold.held:
            return
        try:
            self._take_hold()
        except EngineUnsupported:
            with suppress(BucketError, FormatError, ChainError):  # another option may be what is wrong
                self._require_whole_model()
            raise

    def _require_whole_model(self) -> None:
        run = self._subscriber.run
        if is_adapter(run.table):
            raise EngineUnsupported(f"{self.bucket.url}: run {run.run} is of an adapter: follow it with --adapter NAME")

    def _take_hold(self) -> WorkerStatus | None:
        """The workers' status once this follower drives the server, and the server generates; None when we were closed
        meanwhile."""
        if (status := self._hold.status()) is None:
            return None
        if status.torn:  # a follower was killed between some workers' writes and the others'
            self._engine.revert()
            status = self._engine.status()
        if status.quarantined:
            self._disown()
        if status.session_open:
            self._engine.finish(None)
        if self._engine.is_paused():
            self._engine.resume()
        return status

    def _ready(self, status: WorkerStatus, run: str) -> WorkerStatus | None:
        """The workers' status, attached to our bucket's run; None when we were closed meanwhile."""
        if (status.attached, status.run) != (self.bucket.url, run) or self._is_news_to(status):
            self._labelled = None
            if status.reading in (None, self._url) and self._idle() is None:  # another bucket's reading is abandoned
                return None
            self._engine.begin_init(self._url, self._trust.keys, self._settings, self._base)
            if (attached := self._idle()) is None:
                return None
            self._require(attached)
            status = attached
        if status.trusted and not self._trust.keys and not self._told_trust:
            self._told_trust = True
            self._on_news(Note(f"{self._engine.url} {_KEPT}"))
        if not status.joined:
            self._engine.join(self._subscriber)
            status = self._engine.status()
        return status

    def _is_news_to(self, status: WorkerStatus) -> bool:
        """Whether workers that stand on our bucket were not told our keys, or our base, by who had them stand there."""
        keys, base = self._trust.keys, self._base
        return bool(keys and keys != set(status.trusted)) or (base is not None and str(base) != status.base)

    def _stage(self, target: Position) -> bool:
        """Have the worker prepare the update while the server generates; False when we were closed meanwhile."""
        self._keep_what_is_needed()
        while not self._engine.stage(self._url, target.version):  # busy with what somebody else asked for
            if self._idle() is None:
                return False
        if (status := self._idle(target)) is None:
            return False
        self._require(status)
        if status.workers > 1:
            self._engine.vouch(self._subscriber, target)
        return True

    def _idle(self, target: Position | None = None) -> WorkerStatus | None:
        """The workers' status once they are done with what they were asked for, however long a slow store makes that;
        None when we were closed meanwhile. The server generates all the while."""
        told, fetched = False, None
        while not self._stopping.is_set():
            status = self._hold.confirmed()
            if status.session_open:  # by one that lost the lease to us, and came back late
                self._engine.finish(None)
                self._engine.resume()
            self.standing.server_says(status.position)
            if status.fetching is not None and status.fetching != fetched and target is not None:
                fetched = status.fetching
                self._on_news(Fetching(target.run, target.version, *fetched))
            if not status.staging:
                return status
            if status.doing_s > SLOW and not told:
                self._tell_slow(status)
                told = True
            self._stopping.wait(nap(status.doing_s))
        return None

    def _tell_slow(self, status: WorkerStatus) -> None:
        why = self._engine.why_unreached(self._url)
        slow = Unavailable(f"vLLM's worker: {status.doing} since {status.doing_s:.0f} s, and goes on{why}")
        self.standing.fails(slow)
        self._on_problem(slow)

    def _commit(self, target: Position) -> UpdateReport:
        """Swap the weights inside a pause that only scatters."""
        paused = time.perf_counter()
        status = self._swap(target)
        pause_ms = 1e3 * (time.perf_counter() - paused)
        self._require(status)
        if status.position != target:
            self._subscriber.refresh()  # our copy of the commit may have been damaged on its way
            target = self._subscriber.chain.commit(target.version).record.position
        applied = status.applied
        if status.position != target or applied is None:
            raise Quarantined(f"{self._engine.url} took {target} without an error and does not serve it: restart it")
        report = UpdateReport(
            run=target.run,
            version=target.version,
            from_version=applied["from_version"],
            changed=applied["changed"],
            wire_bytes=applied["wire_bytes"],
            fetch_s=applied["fetch_s"],
            stage_s=applied["stage_s"],
            pause_ms=pause_ms,
            write_ms=applied["write_ms"],
            verified=True,
            publish_to_served_s=self._clock() - applied["created"],
        )
        self._on_update(report)
        return report

    def _swap(self, target: Position) -> WorkerStatus:
        """Pause, commit, name the version, resume. The session is closed and generation resumed whatever happens."""
        self._hold.confirmed()
        try:
            self._engine.start()
            self._engine.pause(self._pause, clear_cache=self._clear_cache)
            self._engine.update(self._url, target)
            status = self._hold.confirmed()
            if status.torn:
                self._engine.revert()
            self._engine.finish(str(target) if status.position == target else None)
        except BaseException:
            self._let_go()
            raise
        self._engine.resume()
        self._labelled = status.position
        return status

    def _let_go(self) -> None:
        """End the session and the pause of an update that failed, as far as the server lets us; the next step looks
        again. Not those of a follower that has taken the lease."""
        with suppress(EngineError):
            status = self._engine.status()
            if status.session_open and not status.lease.mine:
                return
            if status.session_open:
                self._engine.finish(None)
        with suppress(EngineError):
            self._engine.resume()

    def _require(self, status: WorkerStatus) -> None:
        """Raise what a worker recorded. What the bucket refused it may be open to us: it reads by itself."""
        if status.error is None:
            return
        error = named_error(status.error)
        if isinstance(error, BucketError):
            said = f"said by the server at {self._engine.url}, which reads the bucket itself, by its own environment"
            raise type(error)(f"{error} ({said}{self._engine.why_unreached(self._url)})")
        if status.error["kind"] in ("ImportError", "ModuleNotFoundError"):
            raise EngineUnsupported(f"the server at {self._engine.url}: {status.error['message']}")
        if isinstance(error, BadSignature) and not self._trust.keys:
            raise BadSignature(f"{error}; this server {_KEPT}")
        raise error

    def _disown(self) -> None:
        """Have a server whose weights are in doubt stop naming a version, until an anchor has made them sure again."""
        self._labelled = None
        if self._engine.weight_version() != UNVERIFIED:
            self._engine.label(UNVERIFIED)

    def _label(self, position: Position) -> None:
        """A server that stands on a version without saying so (fresh from that very checkpoint, or left by a follower
        that was killed) is told its name."""
        if self._engine.weight_version() != str(position):
            self._engine.label(str(position))
        self._labelled = position


_KEPT = (
    "accepts only what the public keys signed that an earlier follower gave it with --trust, though this one gives "
    "none: give others with --trust, or restart vLLM"
)
