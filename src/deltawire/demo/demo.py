"""The demo: five processes that share nothing but a bucket and HTTP, from the first start to the final audit."""

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import msgspec
from rich.console import Console

from deltawire.demo import audit
from deltawire.demo.commands import BUCKET, FULL, QUICK, Commands, find_checkout
from deltawire.demo.monitor import Monitor, Patience
from deltawire.demo.processes import Child, Children, free_port
from deltawire.demo.progress import Progress
from deltawire.demo.screen import final_table, open_screen
from deltawire.demo.summary import DemoSummary, summarize
from deltawire.errors import AlreadyExists


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """`out`: where logs and summary.json go, runs/demo-<time> if None. `quick`: a few steps of each act. `plain`: lines
    even on a terminal."""

    out: Path | None = None
    quick: bool = False
    plain: bool = False
    patience: Patience = field(default_factory=Patience)


def run_demo(options: DemoOptions, *, commands: Commands | None = None, console: Console | None = None) -> DemoSummary:
    """Train a tiny model by RL while vLLM serves it, its weights travelling through a bucket server; show it, audit it,
    and write summary.json. No process is left when this returns or raises, nor when this process is killed.

    Raises NoExamples outside a checkout, AlreadyExists for a folder in use, ProcessFailed naming the process that
    failed with the end of its log.
    """
    console = console or Console()
    if commands is None:
        folder = options.out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
        commands = Commands(find_checkout(), folder.absolute(), QUICK if options.quick else FULL)
    if commands.folder.exists() and any(commands.folder.iterdir()):
        raise AlreadyExists(f"{commands.folder} is not empty; name another folder with --out")
    with Children(commands.folder / "logs") as children, open_screen(console, plain=options.plain) as screen:
        monitor = Monitor(children, screen, Progress(commands.acts), options.patience)
        monitor.tell(f"logs and figures go to {commands.folder}")
        try:
            summary = play(monitor, commands)
        except BaseException:
            monitor.tell("ending all processes")
            raise
        (commands.folder / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2))
        monitor.end_all()
    console.print(final_table(summary))
    serve = f"deltawire serve --root {commands.buckets}"
    look = f"to look into its bucket: {serve}, export the HF_ENDPOINT and HF_TOKEN it prints, deltawire log {BUCKET}"
    console.print(look, markup=False, highlight=False, soft_wrap=True)
    return summary


def play(monitor: Monitor, commands: Commands) -> DemoSummary:
    """Start everything, train to the end, wait until vLLM serves the last version, and compare all weights."""
    server, environment = monitor.start(commands.server()), monitor.start(commands.environment())
    monitor.finished(monitor.start(commands.model()))
    engine = f"http://127.0.0.1:{free_port()}"
    hub = monitor.url(server)
    vllm = monitor.start(commands.vllm(engine, hub))
    games = monitor.url(environment)
    monitor.ready(vllm, lambda: audit.is_healthy(engine) or None)
    follower = monitor.start(commands.follower(engine, hub))
    trainer = monitor.start(commands.trainer(engine, games, hub), records=commands.metrics)
    last = _train(monitor, trainer, follower)
    monitor.tell(
        f"vLLM serves version {last}, the trainer's last; materializing it, for a fresh server to compare with"
    )
    monitor.finished(monitor.start(commands.materialize(hub)))
    fresh = f"http://127.0.0.1:{free_port()}"
    monitor.ready(monitor.start(commands.fresh_vllm(fresh, hub)), lambda: audit.is_healthy(fresh) or None)
    found = audit.audit(last, commands.digests, engine, commands.materialized, fresh)
    figures = audit.traffic(hub)
    return summarize(monitor.progress.steps, monitor.progress.served, found, figures, seconds=monitor.seconds)


def _train(monitor: Monitor, trainer: Child, follower: Child) -> int:
    """The trainer's last version, once it is published and vLLM serves it."""
    monitor.ready(trainer, lambda: monitor.progress.published)
    monitor.ready(follower, lambda: monitor.progress.served_version)
    last = monitor.news(trainer, lambda: monitor.progress.finished)
    monitor.news(follower, lambda: True if monitor.progress.served_version == last else None)
    monitor.finished(trainer)
    return last
