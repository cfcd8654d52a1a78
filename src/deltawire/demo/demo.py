"""The demo: five processes that share nothing but a bucket and HTTP, from the first start to the final audit."""

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import msgspec
from rich.console import Console

from deltawire.demo import audit
from deltawire.demo.cast import BUCKET, FULL, QUICK, Cast, find_checkout
from deltawire.demo.processes import Child, Children, free_port
from deltawire.demo.screen import final_table, open_screen
from deltawire.demo.stage import Patience, Stage
from deltawire.demo.story import Story
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


def run_demo(options: DemoOptions, *, cast: Cast | None = None, console: Console | None = None) -> DemoSummary:
    """Train a tiny model by RL while vLLM serves it, its weights travelling through a bucket server; show it, audit it,
    and write summary.json. No process is left when this returns or raises, nor when this process is killed.

    Raises NoExamples outside a checkout, AlreadyExists for a folder in use, ProcessFailed naming the process that
    failed with the end of its log.
    """
    console = console or Console()
    if cast is None:
        folder = options.out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
        cast = Cast(find_checkout(), folder.absolute(), QUICK if options.quick else FULL)
    if cast.folder.exists() and any(cast.folder.iterdir()):
        raise AlreadyExists(f"{cast.folder} is not empty; name another folder with --out")
    with Children(cast.folder / "logs") as children, open_screen(console, plain=options.plain) as screen:
        stage = Stage(children, screen, Story(cast.acts), options.patience)
        stage.tell(f"logs and figures go to {cast.folder}")
        try:
            summary = play(stage, cast)
        except BaseException:
            stage.tell("ending all processes")
            raise
        (cast.folder / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2))
        stage.end_all()
    console.print(final_table(summary))
    serve = f"deltawire serve --root {cast.buckets}"
    look = f"to look into its bucket: {serve}, export the HF_ENDPOINT and HF_TOKEN it prints, deltawire log {BUCKET}"
    console.print(look, markup=False, highlight=False, soft_wrap=True)
    return summary


def play(stage: Stage, cast: Cast) -> DemoSummary:
    """Start everything, train to the end, wait until vLLM serves the last version, and compare all weights."""
    server, environment = stage.start(cast.server()), stage.start(cast.environment())
    stage.finished(stage.start(cast.model()))
    engine = f"http://127.0.0.1:{free_port()}"
    hub = stage.url(server)
    vllm = stage.start(cast.vllm(engine, hub))
    games = stage.url(environment)
    stage.ready(vllm, lambda: audit.is_healthy(engine) or None)
    follower = stage.start(cast.follower(engine, hub))
    trainer = stage.start(cast.trainer(engine, games, hub), records=cast.metrics)
    last = _train(stage, trainer, follower)
    stage.tell(f"vLLM serves version {last}, the trainer's last; materializing it, for a fresh server to compare with")
    stage.finished(stage.start(cast.materialize(hub)))
    fresh = f"http://127.0.0.1:{free_port()}"
    stage.ready(stage.start(cast.fresh_vllm(fresh, hub)), lambda: audit.is_healthy(fresh) or None)
    found = audit.audit(last, cast.digests, engine, cast.materialized, fresh)
    figures = audit.traffic(hub)
    return summarize(stage.story.steps, stage.story.served, found, figures, seconds=stage.seconds)


def _train(stage: Stage, trainer: Child, follower: Child) -> int:
    """The trainer's last version, once it is published and vLLM serves it."""
    stage.ready(trainer, lambda: stage.story.published)
    stage.ready(follower, lambda: stage.story.served_version)
    last = stage.news(trainer, lambda: stage.story.finished)
    stage.news(follower, lambda: True if stage.story.served_version == last else None)
    stage.finished(trainer)
    return last
