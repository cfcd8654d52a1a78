"""What a scenario comes to: bytes a version and a day, seconds to served, requests, anchors, and what else would do."""

import math
from dataclasses import dataclass

from deltawire.sizing import constants as measured
from deltawire.sizing.scenario import Scenario

DAY = 86_400.0


@dataclass(frozen=True, slots=True)
class Requests:
    """Hub API requests in five minutes: the trainer's, one replica's, all for the busiest token, and its limit.

    `replicas_at_most` is how many replicas one token carries at this pace, `poll_that_fits` the seconds between looks
    at which this fleet fits, or None where no pause would do.
    """

    trainer: float
    replica: float
    busiest: float
    limit: int
    replicas_at_most: int
    poll_that_fits: float | None

    @property
    def fits(self) -> bool:
        """Whether the busiest token stays below its limit."""
        return self.busiest <= self.limit


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one version on its way.

    `wait` is for the upload before it. `served` is from the trainer's call to the new weights answering, at the mean of
    when a follower looks. `pause` is the part in which the server makes no token.
    """

    publish: float
    wait: float
    upload: float
    notice: float
    fetch: float
    stage: float
    pause: float

    @property
    def served(self) -> float:
        """All of it."""
        return self.publish + self.wait + self.upload + self.notice + self.fetch + self.stage


@dataclass(frozen=True, slots=True)
class Other:
    """Another way to ship weights: seconds to served, and seconds without tokens; None where it cannot be used."""

    name: str
    served: float | None
    pause: float | None


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a scenario comes to. Bytes, and seconds.

    `folded` is how many versions go into one commit because the trainer's link is slower than its pace; 1 when it keeps
    up. `anchor_every` is when catching up costs a checkpoint. `join` is a newcomer's time from nothing to current,
    `catch_up_hour` that of a replica that was away for an hour.
    """

    scenario: Scenario
    delta_bytes: float
    checkpoint_bytes: float
    up_a_day: float
    down_a_day: float
    folded: float
    times: Times
    requests: Requests
    anchor_every: int
    join: float
    catch_up_hour: float
    others: tuple[Other, ...]

    @property
    def ratio(self) -> float:
        """How many times smaller a version is than a checkpoint."""
        return self.checkpoint_bytes / self.delta_bytes

    @property
    def advice(self) -> tuple[str, ...]:
        """What to do, in sentences; the first says which way wins."""
        return tuple(_advice(self))


def forecast(scenario: Scenario) -> Forecast:
    """The forecast of a scenario. Pure arithmetic over `sizing.constants`."""
    folded = _folded(scenario)
    versions = DAY / (scenario.cadence * folded)
    delta = scenario.delta_bytes(folded)
    every = anchor_every(scenario)
    return Forecast(
        scenario=scenario,
        delta_bytes=scenario.delta_bytes(),
        checkpoint_bytes=scenario.checkpoint_bytes,
        up_a_day=versions * delta,
        down_a_day=versions * delta * scenario.replicas,
        folded=folded,
        times=times(scenario, folded),
        requests=requests(scenario, folded),
        anchor_every=every,
        join=_behind(scenario, scenario.checkpoint_bytes + scenario.delta_bytes(every / 2)),
        catch_up_hour=_behind(scenario, scenario.delta_bytes(max(3600 / scenario.cadence, 1.0))),
        others=(_whole_checkpoints(scenario), _fabric(scenario)),
    )


def times(scenario: Scenario, folded: float = 1.0) -> Times:
    """The seconds of one version, of which each stands for so many."""
    size = scenario.delta_bytes(folded)
    changed = scenario.changed(folded)
    write = measured.PAUSE_SECONDS_A_CHANGE * changed / scenario.workers
    compare = scenario.checkpoint_bytes / measured.PUBLISH_BYTES_PER_SECOND
    return Times(
        publish=(compare + measured.PUBLISH_SECONDS_A_CHANGE * scenario.changed()) / scenario.ranks,
        wait=scenario.cadence * folded / 2 if folded > 1 else 0.0,
        upload=upload_seconds(scenario, size),
        notice=scenario.poll / 2,
        fetch=fetch_seconds(scenario, size),
        stage=measured.STAGE_SECONDS + measured.STAGE_SECONDS_A_CHANGE * changed / scenario.workers,
        pause=measured.PAUSE_SECONDS + write,
    )


def upload_seconds(scenario: Scenario, size: float) -> float:
    """Seconds until a version of this many bytes is committed."""
    return measured.PUBLISH_ROUND_TRIPS * scenario.round_trip + size / (scenario.up / 8)


def fetch_seconds(scenario: Scenario, size: float) -> float:
    """Seconds until this many bytes are at a replica, while all of its region fetch them."""
    return measured.READ_ROUND_TRIPS * scenario.round_trip + size / scenario.download_bytes_per_second


def requests(scenario: Scenario, folded: float = 1.0) -> Requests:
    """Hub API requests in five minutes, if the bucket is on the Hub."""
    window = measured.HUB_WINDOW
    commits = window / (scenario.cadence * folded)
    steady = measured.HEARTBEAT_REQUESTS * window / measured.HEARTBEAT_SECONDS
    steady += commits * measured.READERS * measured.READER_REQUESTS
    looks = measured.LOOK_REQUESTS * window / scenario.poll
    trainer = commits * measured.TRAINER_REQUESTS
    per_token = math.ceil(scenario.replicas / scenario.tokens)
    limit = measured.HUB_LIMITS[scenario.plan]
    left = limit - trainer
    room = left / per_token - steady
    fits = measured.LOOK_REQUESTS * window / room if room > 0 else None
    at_most = max(int(left / (steady + looks)), 0)
    return Requests(trainer, steady + looks, trainer + per_token * (steady + looks), limit, at_most, fits)


def anchor_every(scenario: Scenario) -> int:
    """Versions after which catching up from an anchor by single deltas costs another checkpoint: when the compactor's
    default writes one."""
    return max(math.ceil(scenario.checkpoint_bytes / scenario.delta_bytes()), 1)


def _folded(scenario: Scenario) -> float:
    """Versions in one commit: 1 while an upload is done before the next version is captured, else as many as are
    captured while their fold is sent."""
    folded = 1.0
    for _ in range(64):
        needed = max(upload_seconds(scenario, scenario.delta_bytes(folded)) / scenario.cadence, 1.0)
        if needed <= folded * 1.001:
            return folded
        folded = needed
    return folded


def _behind(scenario: Scenario, size: float) -> float:
    return (
        fetch_seconds(scenario, size)
        + measured.STAGE_SECONDS
        + measured.STAGE_SECONDS_A_CHANGE * (min(size / scenario.width, scenario.weights) / scenario.workers)
    )


def _whole_checkpoints(scenario: Scenario) -> Other:
    """Everything through the same bucket, and a reload."""
    size = scenario.checkpoint_bytes
    reload = size / measured.RELOAD_BYTES_PER_SECOND / scenario.workers
    served = upload_seconds(scenario, size) + scenario.poll / 2 + fetch_seconds(scenario, size) + reload
    return Other("whole checkpoints", served, reload)


def _fabric(scenario: Scenario) -> Other:
    """A broadcast of everything inside one cluster: the servers make no token meanwhile."""
    seconds = scenario.checkpoint_bytes / scenario.fabric if scenario.regions == 1 else None
    return Other("NCCL", seconds, seconds)


def _advice(found: Forecast) -> list[str]:
    scenario, whole, fabric = found.scenario, *found.others
    said = [_winner(found, whole, fabric)]
    if found.folded > 1:
        said.append(
            f"The trainer's link is slower than its pace: {found.folded:.1f} versions go into one commit, "
            "and nothing is lost."
        )
    if not found.requests.fits:
        fit = found.requests.poll_that_fits
        way = (
            "Give the fleet more tokens"
            if fit is None
            else f"Look every {math.ceil(fit)} s (--poll), or use more tokens"
        )
        said.append(
            f"On the Hub, {found.requests.busiest:,.0f} API requests in 5 minutes are above the limit of "
            f"{found.requests.limit:,}. {way}, another plan, `deltawire relay`, or s3://."
        )
    said.append(
        f"An anchor every {found.anchor_every:,} versions ({_duration(found.anchor_every * scenario.cadence)}) is what "
        "`deltawire compact` writes by itself."
    )
    return said


def _winner(found: Forecast, whole: Other, fabric: Other) -> str:
    deltas = found.times
    if fabric.served is not None and fabric.served < deltas.served:
        sooner = f"Inside one cluster NCCL is sooner: {_duration(fabric.served)} against {_duration(deltas.served)}"
        if fabric.pause is not None and deltas.pause < fabric.pause:
            return f"{sooner}; deltas pause the servers for less: {_duration(deltas.pause)}."
        return f"{sooner}, and pauses for {_duration(fabric.served)}; use it where both sides share a fabric."
    if whole.served is not None and whole.served < deltas.served:
        return "Whole checkpoints are sooner here: nearly everything changes, or the model is small."
    return (
        f"Deltas through a bucket: {_duration(deltas.served)} to served, where whole checkpoints take "
        f"{_duration(whole.served or 0.0)}."
    )


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
