"""What one worker does when its server is asked: who may ask, what runs in the background, and how it answers.

A worker that holds the whole model compares with commits by itself. Of several, each holds parts, and only all
together can be compared. A follower adds up what they report, says where they are, and checks what they write.

Nothing that a server asks of it raises. With several workers an exception in one leaves every later answer off by one
behind HTTP 200. So failures are kept here, and the status names the newest.

Weights change on the server's own thread alone. What waits for a store or reads all of memory (attaching, staging,
auditing) is a job in the background. It only reads the weights, and no update is written meanwhile.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from deltawire.errors import EngineError, EngineUnavailable, EngineUnsupported
from deltawire.live.background import Background
from deltawire.live.lease import Holder, Lease
from deltawire.live.messages import (
    Attach,
    Audited,
    Drifted,
    Outcome,
    Problem,
    Refusal,
    Staged,
    Update,
    WorkerStatus,
)
from deltawire.live.model import NOBODY_COMPARED, LiveModel, Moment, Serving
from deltawire.live.rpc import request_as
from deltawire.live.transforms import AfterLoading
from deltawire.runlog.records import Position

PLAIN_WAIT = 2.0
"""seconds that the plain POST of a version which is not staged holds the server; later it is to be posted again"""


class Jobs:
    """Which question that takes long was begun last, and the newest that was answered, each by its ticket."""

    def __init__(self) -> None:
        self.asked = ""
        self._answered: tuple[str, Outcome] = ("", Outcome(False))

    def finished(self, ticket: str, found: Audited | Drifted | Refusal) -> None:
        """Keep what a job found."""
        self._answered = ticket, Outcome(True, found)  # in one assignment: another thread reads it

    def outcome(self, ticket: str) -> Outcome:
        """Whether a job is done, and what it found. Raises EngineUnavailable for one that another replaced."""
        answered, outcome = self._answered
        if answered == ticket:
            return outcome
        if self.asked != ticket:
            raise EngineUnavailable("something else was asked of this worker meanwhile: ask again")
        return Outcome(False)


class LiveWorker:
    """The weights of `model`, followed through one bucket at a time. `Serving` says what the options mean; `on_thread`
    prepares a thread that uses the device.

    `attach` and `commit` return when it is done. A server calls `begin_attach` and `update` instead, which leave to the
    background what may take long.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        loading: AfterLoading | None,
        workers: int = 1,
        copies: int = 1,
        compiled: bool = False,
        on_thread: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.lease = Lease()
        self.background = Background(on_thread)
        serving = Serving(loading=loading, workers=workers, copies=copies, compiled=compiled)
        self.jobs = Jobs()
        self.live = LiveModel(model, serving, self.background, self._announce)
        self._alone = workers == 1
        self._problem: Problem | None = None
        self._refusal: Problem | None = None
        """the newest error of a caller that does not hold the lease"""

    def before(self, moment: Moment) -> None:
        """Called when a moment is about to begin, on the thread that does it; what it raises, that moment raises.
        Does nothing: tests put a fault here."""

    def _announce(self, moment: Moment) -> None:
        self.before(moment)  # whichever that is by then

    def attach(self, url: str, trusted: Iterable[str] = (), base: Path | str | None = None) -> None:
        """Attach to the run that a bucket's HEAD names: probe placement, digest live weights, find the version they
        are. With `trusted` public keys every record must be signed by one, from here on. `base` is a folder of this
        host with the run's base checkpoint."""
        asked = Attach(url, tuple(trusted), self.live.settings, None if base is None else str(base))
        with self.recording("attach"), self.background.alone():
            self.live.attach(asked)

    def begin_attach(self, request: object) -> None:
        """Begin to attach to what an `Attach` asks for, in the background; the status tells the outcome."""
        with self.recording("attach", clear=False):
            asked = request_as(request, Attach)
            if not self._may_change(asked.lease, "attach"):
                return
            doing = self.background.doing
            if doing and doing.bucket not in (None, asked.bucket):  # it may hang, and it is not wanted any more
                self.background.abandon()
                self.close()
            self.begin_recorded("attach", f"opening {asked.bucket}", lambda: self.live.attach(asked), asked.bucket)

    def commit(self, request: object) -> None:
        """Write the plan staged for {"bucket", "version"}; without one stage it first."""
        self.live.confirm()
        with self.recording("update"), self.background.alone():
            target = request_as(request, Update)
            if not self.live.is_ready(target):
                self._require_alone(target)
                self.live.make_ready(target.bucket, target.version)
            self.live.write_ready(target)

    def update(self, request: object) -> None:
        """`commit` for a server. What is not staged (a plain POST, no follower) is staged in the background. The server
        waits at most `PLAIN_WAIT` seconds for that, and for what was being done before."""
        with self.recording("update", clear=False):
            target = request_as(request, Update)
            if not self._may_change(target.lease, "update"):
                return
            self.live.confirm()
            if not self._made_ready(target):
                return
            with self.background.alone():
                self.live.write_ready(target)
            self._problem = None

    def confirm(self) -> None:
        """Keep the last update: what it replaced is forgotten. Leaves the newest outcome to be read."""
        with self.recording("finish", clear=False):
            self.before("confirm")
            self.live.confirm()

    def close(self) -> None:
        """Forget the bucket and its downloads; the weights stay as they are."""
        self.live.close()

    @property
    def position(self) -> Position | None:
        """The version these weights are, None while that is no committed one or in doubt."""
        return self.live.position

    def status(self, token: str | None = None) -> WorkerStatus:
        """Where this worker is, what the background does, what is staged, and the newest outcome. A `token` renews the
        lease of the follower that holds it."""
        self.background.lend()
        view, live = self.lease.view(token), self.live
        doing = self.background.doing  # before the outcome, which is set before it ends
        attached, staged = live.attached, live.staged
        return WorkerStatus(
            attached=attached.subscriber.bucket.url if attached else None,
            run=attached.subscriber.run.run if attached else None,
            position=live.position,
            joined=bool(attached and attached.joined),
            staging=doing is not None,
            doing=doing and doing.what,
            doing_s=doing.seconds if doing else 0.0,
            reading=doing and doing.bucket,
            staged=Staged(staged.plan.after.version) if staged else None,
            applied=live.applied,
            quarantined=live.quarantined,
            error=self._problem if view.mine else self._refusal or self._problem,
            fetching=attached.subscriber.fetching if attached else None,
            lease=view,
            trusted=tuple(sorted(live.trust.keys)),
            base=live.base,
            codecs=attached.codecs if attached else (),
            cuts=dict(attached.cuts) if attached and attached.cuts is not None else None,
        )

    def take_lease(self, turn: int | None, token: str, holder: Holder) -> bool:
        """Give the lease to a follower, unless something happened to it since `turn` (None: whatever happened)."""
        if taken := self.lease.take(turn, token, holder):
            self._refusal = None
        return taken

    def require_lease(self, token: str | None) -> None:
        """Raise AnotherFollower or EngineUnavailable unless a call that changes something may come now."""
        self.lease.require(token, alone=self._alone)

    def begin(self, doing: str, job: Callable[[], None], bucket: str | None = None) -> None:
        """Start a job in the background. Raises EngineUnavailable while another runs."""
        if not self.background.begin(doing, job, bucket=bucket):
            with self.background.alone():  # says what it is busy with
                raise EngineUnavailable("the worker was busy: ask again")

    def begin_recorded(self, what: str, doing: str, job: Callable[[], None], bucket: str) -> None:
        """Start a job whose outcome the status tells, and which reads a bucket for a follower."""

        def recorded() -> None:
            with self.recording(what):
                job()

        self.begin(doing, recorded, bucket)

    @contextmanager
    def recording(self, doing: str, *, clear: bool = True) -> Iterator[None]:
        """Keep what a block raises as the newest problem; a block that succeeds clears it, if asked to."""
        try:
            yield
        except Exception as error:
            if not self.background.is_abandoned():
                self._problem = Problem(type(error).__name__, str(error), doing)
        else:
            if clear and not self.background.is_abandoned():
                self._problem = None

    def _made_ready(self, target: Update) -> bool:
        """Whether an update can be written now. Raises EngineUnavailable when it is still being staged."""
        if self.live.is_ready(target):
            return True
        self._require_alone(target)
        self.background.wait(PLAIN_WAIT)  # for what an earlier POST began: to attach, say
        if self.live.is_ready(target):
            return True
        doing = f"staging version {target.version} of {target.bucket}"
        stage = functools.partial(self.live.make_ready, target.bucket, target.version)
        self.begin_recorded("stage", doing, stage, target.bucket)
        if not self.background.wait(PLAIN_WAIT):
            raise EngineUnavailable(
                f"version {target.version} is being staged: post it again when the status says it is staged"
            )
        return self._problem is None

    def _may_change(self, token: str | None, doing: str) -> bool:
        """Whether the lease allows a call that can answer nothing. A refusal is kept apart from outcomes: the holder
        need not hear of it."""
        try:
            self.require_lease(token)
        except EngineError as error:
            self._refusal = Problem(type(error).__name__, str(error), doing)
            return False
        return True

    def _require_alone(self, target: Update) -> None:
        if not self._alone:
            raise EngineUnsupported(f"version {target.version} is not staged, and {NOBODY_COMPARED}")
