"""The verb that says what a run will cost before it begins."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from deltawire.cli.options import AsJson
from deltawire.cli.printing import Sheet, duration, emit, show
from deltawire.errors import NotFound
from deltawire.format.checkpoint import Checkpoint
from deltawire.sizing.forecast import Forecast, forecast
from deltawire.sizing.scenario import Scenario, parse_count
from deltawire.sizing.simulation import FleetReport, simulate

HubPlan = Literal["free", "pro", "team", "enterprise"]
Dtype = Literal["bf16", "fp16", "fp8", "fp32"]
WIDTHS: dict[str, float] = {"bf16": 2, "fp16": 2, "fp8": 1, "fp32": 4}


Model = Annotated[str, typer.Argument(metavar="MODEL", help="0.6B, 7B, 1T, a checkpoint folder, or a config.json.")]
Density = Annotated[float, typer.Option(help="Share of weights that change in a version, as `publish` reports.")]
ServedDtype = Annotated[Dtype, typer.Option(help="What the server holds.")]
Every = Annotated[float, typer.Option(metavar="SECONDS", help="Seconds between versions.")]
Up = Annotated[float, typer.Option(metavar="GBIT", help="The trainer's link to the bucket, in Gbit/s.")]
Down = Annotated[float, typer.Option(metavar="GBIT", help="Each replica's link from the bucket, in Gbit/s.")]
Region = Annotated[float, typer.Option(metavar="GBIT", help="What all replicas of a region share; 0: no limit.")]
Replicas = Annotated[int, typer.Option(min=1, help="vLLM servers.")]
Regions = Annotated[int, typer.Option(min=1, help="Regions or clouds they stand in.")]
Workers = Annotated[int, typer.Option(min=1, help="GPUs of one replica.")]
Ranks = Annotated[int, typer.Option(min=1, help="Processes of a sharded trainer.")]
Poll = Annotated[float, typer.Option(help="Seconds between a follower's looks.")]
PlanOfHub = Annotated[HubPlan, typer.Option(help="Plan of the Hub, for its limits.")]
Tokens = Annotated[int, typer.Option(min=1, help="Hub tokens that the fleet has.")]
BytesAChange = Annotated[
    float | None, typer.Option(help="Bytes of a changed weight; default: measured, by density. TRL's post: 6.")
]
Fabric = Annotated[float, typer.Option(metavar="GBYTE", help="NCCL inside one cluster, in GB/s.")]
Play = Annotated[bool, typer.Option("--simulate", help="Play a day of the fleet through, too.")]
Failures = Annotated[float, typer.Option(min=0, help="With --simulate: times a day that a replica is replaced.")]


def plan(
    model: Model, density: Density = 0.01, dtype: ServedDtype = "bf16", every: Every = 60.0, up: Up = 1.0,
    down: Down = 1.0, region: Region = 0.0, replicas: Replicas = 1, regions: Regions = 1, workers: Workers = 1,
    ranks: Ranks = 1, poll: Poll = 5.0, hub_plan: PlanOfHub = "free", tokens: Tokens = 1,
    bytes_a_change: BytesAChange = None, fabric: Fabric = 100.0, play: Play = False, failures: Failures = 0.0,
    json: AsJson = False,
) -> None:  # fmt: skip
    """Say what a run will cost, before it begins.

    That is bytes, time to served, catching up, requests and anchors, beside what else would do. It computes from
    measured constants (docs/SIZING.md names each with its source), and asks nobody.
    """
    scenario = Scenario(
        weights=_weights(model),
        width=WIDTHS[dtype],
        density=density,
        bytes_a_change=bytes_a_change,
        up=up * 1e9,
        down=down * 1e9,
        region=region * 1e9,
        cadence=every,
        replicas=replicas,
        regions=regions,
        workers=workers,
        ranks=ranks,
        poll=poll,
        plan=hub_plan,
        tokens=tokens,
        fabric=fabric * 1e9,
    )
    found = forecast(scenario)
    fleet = simulate(scenario, failures_a_day=failures) if play else None
    if json:
        emit(_record(found, fleet), "", json)
        return
    show(_table(found))
    if fleet is not None:
        print(_played(fleet))
    for sentence in found.advice:
        print(sentence)


def _weights(model: str) -> float:
    """How many weights an argument means."""
    path = Path(model)
    if path.is_dir():
        try:
            checkpoint = Checkpoint(path)
            return float(sum(checkpoint[name].data.size for name in checkpoint))
        except NotFound:
            path = path / "config.json"
    if path.suffix != ".json":
        return parse_count(model)
    from deltawire.trainers.counting import count_weights

    return float(count_weights(path))


def _record(found: Forecast, fleet: FleetReport | None) -> dict[str, object]:
    """What `--json` prints of a forecast, and of a day that was played through."""
    computed = {"advice": found.advice, "ratio": found.ratio, "served": found.times.served}
    played = {} if fleet is None else {"fleet": msgspec.to_builtins(fleet)}
    record: dict[str, object] = msgspec.to_builtins(found)
    return record | computed | played


def _table(found: Forecast) -> Sheet:
    times, asked, scenario = found.times, found.requests, found.scenario
    table = Sheet("what", "comes to", title=f"{scenario.weights:,.0f} weights, {scenario.density:.2%} changed")
    rows = {
        "a version": f"{_size(found.delta_bytes)}, {found.ratio:.0f} times smaller than a checkpoint of "
        f"{_size(found.checkpoint_bytes)}",
        "a day": f"{_size(found.up_a_day)} up, {_size(found.down_a_day)} down to all replicas",
        "to served": f"{_seconds(times.served)}: publish {_seconds(times.publish)}, upload {_seconds(times.upload)}, "
        f"notice {_seconds(times.notice)}, fetch {_seconds(times.fetch)}, stage {_seconds(times.stage)}",
        "pause": _seconds(times.pause),
        "behind an hour": f"{_seconds(found.catch_up_hour)} to catch up",
        "from nothing": f"{_seconds(found.join)} to join",
        "Hub requests": f"{asked.busiest:,.0f} of {asked.limit:,} in 5 minutes; one token carries "
        f"{asked.replicas_at_most:,} replicas at this pace",
        "an anchor": f"every {found.anchor_every:,} versions",
    }
    for other in found.others:
        cannot = "cannot be used across regions"
        rows[other.name] = (
            cannot
            if other.served is None
            else f"{_seconds(other.served)} to served, pause {_seconds(other.pause or 0)}"
        )
    for what, text in rows.items():
        table.add_row(what, text)
    return table


def _played(fleet: FleetReport) -> str:
    return (
        f"a day of {fleet.replicas:,} replicas: {fleet.commits:,} commits, {fleet.updates:,} updates, {fleet.joins:,} "
        f"joins, {_size(fleet.bytes_out)} down; served {_seconds(fleet.staleness_p50)} after capture at the median, "
        f"{_seconds(fleet.staleness_p99)} at p99; at most {fleet.busiest:,.0f} Hub requests of {fleet.limit:,}"
    )


def _size(count: float) -> str:
    """Bytes in decimal units, as links and bills count them."""
    for factor, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _seconds(value: float) -> str:
    if value < 1:
        return f"{1000 * value:.0f} ms"
    return f"{value:.1f} s" if value < 60 else duration(value)
