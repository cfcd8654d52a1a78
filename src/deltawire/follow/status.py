"""What the workers of one server say, taken together: where the server is, and what an audit of it found."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import msgspec

from deltawire.errors import BadAnswer
from deltawire.live.coverage import Coverage, WholeDigests
from deltawire.live.lease import View
from deltawire.live.messages import (
    Applied,
    Audited,
    Digested,
    HeldParts,
    Problem,
    Staged,
    WorkerStatus,
    require_digests,
)
from deltawire.runlog import cuts
from deltawire.runlog.records import Position
from deltawire.weights.blocks import Cut

T = TypeVar("T")


class ServerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the workers of a server say of themselves, as one: the fields of a WorkerStatus. A fact that they disagree
    on is None; `torn` when they serve different versions. `lease` is worker 0's; `codecs` are what all of them read,
    and `cuts` suit all of them."""

    attached: str | None
    run: str | None
    position: Position | None
    joined: bool
    staging: bool
    staged: Staged | None
    applied: Applied | None
    quarantined: bool
    session_open: bool
    error: Problem | None
    workers: int = 1
    torn: bool = False
    fetching: tuple[int, int] | None = None
    lease: View = View()
    trusted: tuple[str, ...] = ()
    base: str | None = None
    doing: str | None = None
    reading: str | None = None
    doing_s: float = 0.0
    codecs: tuple[str, ...] = ()
    cuts: dict[str, Cut] | None = None


def as_one(workers: Sequence[WorkerStatus]) -> ServerStatus:
    """The statuses of all workers of a server as the server's."""
    first = workers[0]
    applied = [worker.applied for worker in workers if worker.applied]
    busy = max(workers, key=lambda worker: worker.doing_s)
    positions = [worker.position for worker in workers]
    return ServerStatus(
        attached=_agreed(worker.attached for worker in workers),
        run=_agreed(worker.run for worker in workers),
        position=_agreed(positions),
        joined=all(worker.joined for worker in workers),
        staging=any(worker.staging for worker in workers),
        staged=_agreed(worker.staged for worker in workers),
        applied=_slowest(applied) if applied else None,
        quarantined=any(worker.quarantined for worker in workers),
        session_open=any(worker.session_open for worker in workers),
        error=_problem(workers),
        workers=len(workers),
        torn=any(position != positions[0] for position in positions),
        fetching=min((worker.fetching for worker in workers if worker.fetching), default=None),
        lease=first.lease,
        trusted=first.trusted,
        base=first.base,
        doing=busy.doing,
        reading=busy.reading,
        doing_s=busy.doing_s,
        codecs=tuple(codec for codec in first.codecs if all(codec in worker.codecs for worker in workers)),
        cuts=_cuts(workers),
    )


def _cuts(workers: Sequence[WorkerStatus]) -> dict[str, Cut] | None:
    """What suits all workers; None where one of them reads no codec by tiles, or a heartbeat cannot say it."""
    said = [worker.cuts for worker in workers if worker.cuts is not None]
    suits_all = cuts.if_short(cuts.merged(said)) if len(said) == len(workers) else None
    return None if suits_all is None else dict(suits_all)


def _problem(workers: Sequence[WorkerStatus]) -> Problem | None:
    """The first worker's error, with its rank where there are several."""
    failed = next((worker for worker in workers if worker.error), workers[0])
    if failed.error is None or len(workers) == 1:
        return failed.error
    return msgspec.structs.replace(failed.error, message=f"worker {failed.rank}: {failed.error.message}")


def _slowest(applied: Sequence[Applied]) -> Applied:
    """An update that all workers wrote: as long as the slowest took."""
    return msgspec.structs.replace(
        applied[0],
        fetch_s=max(worker.fetch_s for worker in applied),
        stage_s=max(worker.stage_s for worker in applied),
        write_ms=max(worker.write_ms for worker in applied),
    )


class AuditReport(msgspec.Struct, frozen=True):
    """Digests recomputed from a server's live memory, and the names that differ from the version it says it serves. A
    server of no version is compared with the newest. `frozen` names the tensors that the run never changes and the
    server never loads: there is no memory of theirs to digest."""

    position: Position | None
    digests: dict[str, str]
    mismatched: list[str]
    workers: int = 1
    frozen: list[str] = []

    @property
    def tensors(self) -> int:
        """Tensors digested."""
        return len(self.digests)


def audited(found: Sequence[Audited]) -> AuditReport:
    """What the workers of a server found, taken together: every copy compared, one counted, all covered. Raises
    BadAnswer."""
    coverage = coverage_of(found, found)
    digests, differing = coverage.digests([worker.values for worker in found])
    promised = {name: int(value, 16) for name, value in found[0].promised.items()}
    wrong = {name for worker in found for name in worker.drifted} | set(differing)
    wrong |= {name for name, value in promised.items() if digests.get(name) != value}
    return AuditReport(
        _agreed(worker.position for worker in found),
        {name: f"{value:016x}" for name, value in digests.items() if name not in coverage.left_out},
        [name for name in promised if name in wrong],
        len(found),
        coverage.left_out,
    )


def coverage_of(held: Sequence[HeldParts], digested: Sequence[Digested]) -> Coverage:
    """What several workers hold together, each digest of it at hand. Raises BadAnswer when they do not speak of the
    same tensors and parts."""
    if len(held) != len(digested) or any(worker.sizes != held[0].sizes for worker in held):
        raise BadAnswer("the workers of a server do not agree which tensors there are: restart it")
    try:
        for worker, digests in zip(held, digested, strict=True):
            require_digests(worker.parts, digests.digests)
    except ValueError as error:
        raise BadAnswer(f"a worker did not digest what it holds ({error}): restart the server") from None
    frozen: Mapping[str, int] = {name: int(value, 16) for name, value in held[0].frozen.items()}
    return Coverage(held[0].sizes, [worker.parts for worker in held], frozen=frozen)


def summed(held: Sequence[HeldParts], digested: Sequence[Digested]) -> WholeDigests:
    """Every tensor's digest, of what several workers hold together, and the names whose copies differ. Raises
    BadAnswer."""
    return coverage_of(held, digested).digests([worker.values for worker in digested])


def _agreed(values: Iterable[T | None]) -> T | None:
    first, *others = values
    return first if all(other == first for other in others) else None
