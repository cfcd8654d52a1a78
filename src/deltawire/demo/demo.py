"""The demo: five processes that share nothing but a bucket and HTTP, from the first start to the final audit."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec
from rich.console import Console

from deltawire.demo import audit
from deltawire.demo.commands import Commands, find_checkout
from deltawire.demo.games import WORDLE, Game, Patience
from deltawire.demo.monitor import Monitor
from deltawire.demo.processes import Child, Children, free_port
from deltawire.demo.progress import Progress
from deltawire.demo.screen import open_screen
from deltawire.demo.summary import DemoSummary, summarize
from deltawire.demo.tables import answer_line, final_tables
from deltawire.errors import AlreadyExists


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """`out`: where logs and summary.json go, runs/demo-<time> if None. `plain`: lines even on a terminal. `patience`:
    the game's if None."""

    out: Path | None = None
    game: Game = WORDLE
    plain: bool = False
    patience: Patience | None = None


def run_demo(options: DemoOptions, *, commands: Commands | None = None, console: Console | None = None) -> DemoSummary:
    """Train a model by RL while vLLM serves it, its weights travelling through a bucket server; show it, audit it,
    and write summary.json. No process is left when this returns or raises, nor when this process is killed.

    Raises NoExamples outside a checkout, AlreadyExists for a folder in use, ProcessFailed naming the process that
    failed with the end of its log.
    """
    console = console or Console()
    if commands is None:
        folder = options.out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
        commands = Commands(find_checkout(), folder.absolute(), options.game)
    if commands.folder.exists() and any(commands.folder.iterdir()):
        raise AlreadyExists(f"{commands.folder} is not empty; name another folder with --out")
    with Children(commands.folder / "logs") as children, open_screen(console, plain=options.plain) as screen:
        monitor = Monitor(children, screen, Progress(commands.game), options.patience or commands.game.patience)
        monitor.tell(f"logs and figures go to {commands.folder}")
        try:
            summary = play(monitor, commands)
        except BaseException:
            monitor.tell("ending all processes")
            raise
        (commands.folder / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2))
        monitor.end_all()
    for table in final_tables(summary, commands.game):
        console.print(table)
    serve = f"deltawire serve --root {commands.buckets}"
    log = f"deltawire log {commands.game.bucket}"
    look = f"to look into its bucket: {serve}, export the HF_ENDPOINT and HF_TOKEN it prints, {log}"
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
    examine(monitor, commands, "before", engine)
    follower = monitor.start(commands.follower(engine, hub))
    trainer = monitor.start(commands.trainer(engine, games, hub), records=commands.metrics)
    monitor.ready(trainer, lambda: monitor.progress.published)
    monitor.tell(f"a page shows the run and its server: {monitor.url(monitor.start(commands.page(hub)))}")
    last = _train(monitor, trainer, follower)
    monitor.tell(f"vLLM serves version {last}, the trainer's last")
    examine(monitor, commands, "after", engine)
    monitor.tell("materializing it, for a fresh server to compare with")
    monitor.finished(monitor.start(commands.materialize(hub)))
    fresh = f"http://127.0.0.1:{free_port()}"
    monitor.ready(monitor.start(commands.fresh_vllm(fresh, hub)), lambda: audit.is_healthy(fresh) or None)
    found = audit.audit(last, commands.digests, engine, commands.materialized, fresh)
    figures = audit.traffic(hub)
    said = monitor.progress
    return summarize(said.steps, said.served, found, figures, seconds=monitor.seconds, exams=said.exams)


def examine(monitor: Monitor, commands: Commands, when: str, engine: str) -> None:
    """Have vLLM answer the game's exam, if it has one, and show how that went."""
    if not commands.game.exam:
        return
    exams, before = monitor.progress.exams, len(monitor.progress.exams)
    monitor.ready(monitor.start(commands.exam(when, engine)), lambda: len(exams) > before or None)
    for answered in exams[-1].answers:
        monitor.tell(answer_line(answered))
    right, asked = exams[-1].right, len(exams[-1].answers)
    monitor.tell(f"{when} training {right} of {asked} answers to held-out questions are right")


def _train(monitor: Monitor, trainer: Child, follower: Child) -> int:
    """The trainer's last version, once it is published and vLLM serves it."""
    monitor.ready(follower, lambda: monitor.progress.served_version)
    last = monitor.news(trainer, lambda: monitor.progress.finished)
    monitor.news(follower, lambda: True if monitor.progress.served_version == last else None)
    monitor.finished(trainer)
    return last
