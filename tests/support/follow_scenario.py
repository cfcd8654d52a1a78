"""A real vLLM server follows a trainer while requests stream; what is measured is printed as soon as it is known.

    `updates_under_load` publishes fp32 masters, has a follower process drive the server, and audits it.
    `equals_a_fresh_server` compares the server with another, started on the version that it serves.

How the server was started, and where the masters lie, is for the caller to say: a CUDA host and a CPU run the same.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_models import load_weights
from servers import Server
from timeline import Span, during, longest, of_update
from token_load import TokenLoad, told
from waiting import until

import deltawire as dw
from deltawire.buckets.base import Bucket
from deltawire.demo.processes import Child, Children, Command
from deltawire.vllm.client import EngineClient

ATTACH = 300.0
"""seconds until a server serves its first version"""
UPDATE = 90.0
"""seconds from publish to served, after which the run has failed"""
LOOK = 0.005
"""seconds between looks at what the follower printed"""
NOISE = 2.3e-5
"""of a tensor's root mean square, that a step moves an element by: about 1 % of the bits change in bf16"""
PROMPT = [5, 17, 250, 42, 7, 9, 199, 77]
SLACK_MS, KEPT = 5.0, 0.97
"""claims: an update's pause beside vLLM's own, and the throughput that is left"""
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Load:
    """How much is asked of a server: streams, updates, the seconds from one to the next (0: at once), and the seconds
    of a window without any."""

    streams: int
    updates: int = 6
    cadence: float = 1.0
    window: float = 4.0


@dataclass(frozen=True, slots=True)
class Served:
    """What a server holds and answers after its updates."""

    bucket: Bucket
    base: Path
    checksums: dict[str, str]
    answer: list[tuple[str, float]]


class Trainer:
    """fp32 masters of a checkpoint on a device; a step moves each element by noise."""

    def __init__(self, weights: dict[str, torch.Tensor], device: str) -> None:
        self.masters = {name: tensor.to(device, torch.float32) for name, tensor in weights.items()}
        self.device = device
        self._by = {name: NOISE * float(tensor.square().mean().sqrt()) for name, tensor in self.masters.items()}
        self._random = torch.Generator(device).manual_seed(1)

    def step(self) -> None:
        for name, tensor in self.masters.items():
            noise = torch.randn(tensor.shape, generator=self._random, device=self.device)
            tensor.add_(noise, alpha=self._by[name])
        if self.device != "cpu":
            torch.cuda.synchronize()

    def digests(self, prepare: tuple[Any, ...]) -> dict[str, str]:
        """Of what a server must hold, as an audit tells them."""
        pairs = self.masters.items()
        for change in prepare:
            pairs = change(pairs)
        held = {name: tensor.bfloat16() if name in self.masters and tensor is self.masters[name] else tensor
                for name, tensor in pairs}  # fmt: skip
        return {name: f"{value:016x}" for name, value in dw.digest(held).items()}


def updates_under_load(
    server: Server,
    base: Path,
    folder: Path,
    load: Load,
    say: Say,
    *,
    device: str,
    masters: dict[str, torch.Tensor] | None = None,
    prepare: tuple[Any, ...] = (),
) -> Served:
    """Publish `load.updates` versions while the server streams answers; every claim about bits is asserted."""
    trainer = Trainer(masters or load_weights(base), device)
    say(f"{sum(tensor.numel() for tensor in trainer.masters.values()):,} fp32 masters on {device}")
    bucket = dw.open_bucket((folder / "bucket").as_uri(), create=True)
    with (
        dw.Publisher(bucket, base=base, prepare=prepare) as publisher,
        EngineClient(server.url) as engine,
        Children(folder) as children,
    ):
        started = time.perf_counter()
        first = publisher.publish(trainer.masters)
        publisher.flush(ATTACH)
        say(f"opened on the base and published version {first.version} in {time.perf_counter() - started:.1f} s")
        follower = Watched(children.start(_follow(bucket, server, base)), say)
        with follower.shown_if_it_fails(server):
            say(f"attached after {follower.until_served(engine, first, ATTACH):.1f} s")
            before = server.greedy(PROMPT, 24)
            streams = TokenLoad(children, server.url, load.streams)
            _measure(trainer, publisher, engine, follower, streams, load, say)
            streams.stop()
            until(lambda: server.requests_running() == 0)  # a batch of another size rounds otherwise
            audit = engine.audit()
            assert audit.mismatched == []
            assert audit.digests == trainer.digests(prepare), "the server holds other bits than the trainer's"
            say(f"audit: {audit.tensors} tensors are bit for bit what the trainer holds")
            after = server.greedy(PROMPT, 24)
            assert after != before, "the updates changed nothing that is generated"
        return Served(bucket, base, server.checksums(), after)


def equals_a_fresh_server(served: Served, fresh: Server, say: Say) -> None:
    """Compare with a server that was started on the same version, materialised."""
    theirs = fresh.checksums()
    equal = [name for name, value in theirs.items() if served.checksums.get(name) == value]
    answer = fresh.greedy(PROMPT, 24)
    say(f"{len(equal)} of {len(theirs)} live checksums equal a fresh server's; greedy tokens "
        f"{'equal' if _tokens(answer) == _tokens(served.answer) else 'DIFFER'}, logprobs "
        f"{'equal' if answer == served.answer else 'DIFFER'}")  # fmt: skip
    assert served.checksums == theirs
    assert served.answer == answer


class Watched:
    """A follower process, what it printed of each update, and when that was seen."""

    def __init__(self, child: Child, say: Say) -> None:
        self.child, self._say = child, say
        self.updates: dict[int, dict[str, Any]] = {}
        self.spans: list[Span] = []

    def look(self) -> None:
        """Take in what it printed since the last look."""
        for record in self.child.output.records():
            if record.get("event") == "update":
                self.updates[record["version"]] = record
                self.spans += of_update(record, time.perf_counter())
            elif record.get("event") == "problem":
                self._say(f"follower: {record}")

    def until_served(self, engine: EngineClient, report: dw.PublishReport, seconds: float) -> float:
        """Wait until the server says that it serves a version; the seconds that took."""
        started, wanted = time.perf_counter(), f"{report.run}:{report.version}"
        while engine.weight_version() != wanted:
            self._go_on_waiting(started, seconds, f"version {report.version}")
        return time.perf_counter() - started

    def until_reported(self, version: int) -> dict[str, Any]:
        """Wait until it prints that a version is served; what it printed."""
        started = time.perf_counter()
        while version not in self.updates:
            self._go_on_waiting(started, UPDATE, f"a report of version {version}")
        return self.updates[version]

    @contextmanager
    def shown_if_it_fails(self, server: Server) -> Iterator[None]:
        """Print what both processes logged last, if the block fails."""
        try:
            yield
        except BaseException:
            self.look()
            for name, log in (("follower", self.child.log), ("server", server.log)):
                self._say(f"the {name}'s log ends:\n{log.read_text(errors='replace')[-3000:]}")
            raise

    def _go_on_waiting(self, started: float, seconds: float, what: str) -> None:
        self.look()
        assert self.child.code is None, "the follower ended"
        assert time.perf_counter() - started < seconds, f"{what} did not come in {seconds:g} s"
        time.sleep(LOOK)


def _follow(bucket: Bucket, server: Server, base: Path) -> Command:
    to = ("--bucket", bucket.url, "--engine", server.url, "--base", str(base))
    return Command("follower", (sys.executable, "-m", "deltawire.cli", "follow", *to, "--json", "--poll", "0.1"))


def _measure(
    trainer: Trainer,
    publisher: dw.Publisher,
    engine: EngineClient,
    follower: Watched,
    streams: TokenLoad,
    load: Load,
    say: Say,
) -> None:
    """The same load in three windows: alone, with vLLM's own pause that does nothing, and with updates."""
    streams.wait()
    time.sleep(load.window / 2)
    start = time.perf_counter()
    time.sleep(load.window)
    alone = _window("without updates", streams, start, [], say)
    start, pauses = time.perf_counter(), []
    for number in range(load.updates):
        pauses.append(_pause_and_resume(engine))
        _sleep_until(start + (number + 1) * load.cadence)
    idle = statistics.median(pause.seconds for pause in pauses) * 1e3
    beside = _window(f"with {load.updates} of vLLM's own pauses of {idle:.1f} ms", streams, start, pauses, say)
    start, reports = time.perf_counter(), []
    for number in range(load.updates):
        reports.append(_update(trainer, publisher, follower, number, say))
        _sleep_until(start + (number + 1) * load.cadence)
    kept = _window(f"with {load.updates} updates", streams, start, follower.spans, say)
    _judge(reports, idle, alone, beside, kept, say)


def _update(trainer: Trainer, publisher: dw.Publisher, follower: Watched, step: int, say: Say) -> dict[str, Any]:
    """One version, from the trainer's step to the report of the server that serves it."""
    trainer.step()
    started = time.perf_counter()
    report = publisher.publish(trainer.masters, step=step)
    published = time.perf_counter()
    told_of = follower.until_reported(report.version)
    served = time.perf_counter()
    follower.spans.append(Span("publish", started, published))
    say(
        f"version {report.version}: {report.density:.2%} changed, {told_of['wire_bytes'] / 1e6:.2f} MB; "
        f"publish {1e3 * (published - started):.1f} ms with its baseline on the {report.baseline}, "
        f"fetch {1e3 * told_of['fetch_s']:.1f}, stage {1e3 * told_of['stage_s']:.1f}, "
        f"write {told_of['write_ms']:.2f}, pause {told_of['pause_ms']:.1f}; "
        f"served {1e3 * (served - published):.0f} ms after publish"
    )
    return told_of


def _pause_and_resume(engine: EngineClient) -> Span:
    started = time.perf_counter()
    engine.pause("keep", clear_cache=True)
    engine.resume()
    return Span("pause", started, time.perf_counter())


def _window(what: str, streams: TokenLoad, start: float, spans: list[Span], say: Say) -> float:
    """Say what came since `start`, and during what the longest wait for a token fell; tokens a second."""
    end = time.perf_counter()
    gaps, rate = streams.gaps(start, end), streams.rate(start, end)
    say(f"{what}, {end - start:.1f} s: {rate:.0f} tokens/s, {told(gaps)}")
    if spans and (gap := longest(gaps)) is not None:
        say(f"the longest gap, {1e3 * gap.seconds:.0f} ms, {gap.start - start:.2f} s into it: {during(gap, spans)}")
    return rate


def _judge(reports: list[dict[str, Any]], idle: float, alone: float, beside: float, kept: float, say: Say) -> None:
    """Say which claims of speed hold here. They depend on the machine, so none of them fails a test."""
    pause = statistics.median(report["pause_ms"] for report in reports)
    held = kept / beside if beside else 0.0
    verdict = {True: "holds", False: "MISSED"}
    say(f"{verdict[pause <= idle + SLACK_MS]}: the pause is within {SLACK_MS:g} ms of vLLM's own "
        f"({pause:.1f} ms, {idle:.1f} ms)")  # fmt: skip
    say(f"{verdict[held >= KEPT]}: throughput is {KEPT:.0%} of that with vLLM's own pauses "
        f"({held:.1%}; {kept / alone if alone else 0:.1%} of that without any)")  # fmt: skip


def _sleep_until(when: float) -> None:
    time.sleep(max(0.0, when - time.perf_counter()))


def _tokens(answer: list[tuple[str, float]]) -> list[str]:
    return [token for token, _ in answer]
