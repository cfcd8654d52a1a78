"""How a running demo looks: one live screen on a terminal, plain lines anywhere else."""

from collections.abc import Sequence
from itertools import pairwise
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deltawire.demo.progress import Light, Progress
from deltawire.demo.summary import Step

PLAIN_STEPS = 5
"""a plain line each so many steps at the latest"""
PLAIN_SECONDS = 10.0
"""and one after so many seconds of silence, if there is a step to tell of or something is waited for"""
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 32
LIGHTS: dict[Light, str] = {
    "waiting": "dim",
    "starting": "yellow",
    "ready": "green",
    "ended": "blue",
    "failed": "red",
}


class Screen(Protocol):
    """What the demo tells. `seconds` are since it began."""

    def draw(self, progress: Progress, waiting: str, seconds: float) -> None:
        """Show how things stand; `waiting` says for what, "" for nothing in particular."""

    def tell(self, text: str, seconds: float) -> None:
        """Something happened, once."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_screen(console: Console, *, plain: bool) -> "Screen":
    """The live screen if the console is a terminal and `plain` is not asked for, else plain lines."""
    return LiveScreen(console) if console.is_terminal and not plain else PlainScreen(console)


class PlainScreen:
    """A line for each event and for every few steps."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._steps = 0
        self._said_at = 0.0

    def draw(self, progress: Progress, waiting: str, seconds: float) -> None:
        done = len(progress.steps)
        new, quiet = done - self._steps, seconds - self._said_at >= PLAIN_SECONDS
        if new >= PLAIN_STEPS or (new and (quiet or done == progress.total_steps)):
            self._steps = done
            self.tell(step_line(progress), seconds)
        elif waiting and quiet:
            self.tell(waiting, seconds)

    def tell(self, text: str, seconds: float) -> None:
        self._said_at = seconds
        self._console.print(f"[{seconds:4.0f} s] {text}", markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class LiveScreen:
    """One panel, redrawn in place, with the events scrolling above it."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def draw(self, progress: Progress, waiting: str, seconds: float) -> None:
        self._live.update(panel(progress, waiting, seconds), refresh=True)

    def tell(self, text: str, seconds: float) -> None:
        self._live.console.print(Text(f"{seconds:5.0f} s  {text}", style="dim"))

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)


def step_line(progress: Progress) -> str:
    """The last step and the last update, on one line."""
    step = progress.steps[-1]
    parts = [
        f"{where(progress, step)}: reward {step.reward:.3f}, {progress.game.won} {step.win_rate:.0%}",
        f"version {step.version} published, {_or_none(progress.served_version)} served",
        f"changed {step.changed_fraction:.2%}",
        f"delta {size(step.delta_bytes)} of {size(step.model_bytes)}",
        f"staleness {step.staleness:g}",
    ]
    if progress.upload_seconds is not None:
        parts.insert(4, f"upload {progress.upload_seconds:.2f} s")
    if progress.served:
        update = progress.served[-1]
        parts.append(f"pause {update.pause_ms:.1f} ms, {'verified' if update.verified else 'NOT VERIFIED'}")
    return ", ".join(parts)


def where(progress: Progress, step: Step) -> str:
    """Act, learning rate and step: "act 1 of 2, learn at 1e-03, step 12/80"; an only act has no number."""
    number = next(i for i, act in enumerate(progress.game.acts) if act.name == step.act)
    before = sum(act.steps for act in progress.game.acts[:number])
    act = progress.game.acts[number]
    acts = len(progress.game.acts)
    place = f"act {number + 1} of {acts}, " if acts > 1 else ""
    return f"{place}{act.name} at {act.learning_rate:g}, step {step.step - before}/{act.steps}"


def panel(progress: Progress, waiting: str, seconds: float) -> RenderableType:
    """The live screen."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    table.add_row("processes", _lights(progress))
    if progress.steps:
        _add_figures(table, progress)
    if "page" in progress.urls:
        table.add_row("page", progress.urls["page"])
    if progress.problem:
        table.add_row("problem", Text(progress.problem, style="red"))
    rows: list[RenderableType] = [table]
    if waiting:
        rows.append(Text(waiting, style="yellow"))
    title = f"deltawire demo · {int(seconds) // 60}:{int(seconds) % 60:02d}"
    if progress.steps:
        title += f" · {where(progress, progress.steps[-1])}"
    return Panel(Group(*rows), title=title, title_align="left")


def _lights(progress: Progress) -> Text:
    text = Text()
    for name, light in progress.lights.items():
        text.append("● ", style=LIGHTS[light]).append(f"{name}   ", style="dim" if light == "waiting" else "")
    return text


def _add_figures(table: Table, progress: Progress) -> None:
    step = progress.steps[-1]
    rewards, wins = [s.reward for s in progress.steps], [s.win_rate for s in progress.steps]
    densities = [s.changed_fraction for s in progress.steps]
    table.add_row("reward", f"{step.reward:6.3f}  {sparkline(rewards)}")
    table.add_row(progress.game.won, f"{step.win_rate:6.0%}  {sparkline(wins)}")
    lag = f"staleness {step.staleness:g}"
    table.add_row("version", f"{step.version} published, {_or_none(progress.served_version)} served, {lag}")
    bar = Table.grid(padding=(0, 1))
    upload = "" if progress.upload_seconds is None else f", uploaded in {progress.upload_seconds:.2f} s"
    bar.add_row(
        ProgressBar(total=step.model_bytes, completed=step.delta_bytes, width=24),
        f"{size(step.delta_bytes)} of {size(step.model_bytes)}{upload}",
    )
    table.add_row("delta", bar)
    table.add_row("changed", f"{step.changed_fraction:6.2%} of the weights  {sparkline(densities)}")
    if progress.served:
        update = progress.served[-1]
        verified = Text("verified", style="green") if update.verified else Text("NOT VERIFIED", style="red")
        paused = f"pause {update.pause_ms:.1f} ms, {update.publish_to_served_s:.2f} s after publish, "
        table.add_row("served", Text(paused).append_text(verified))


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """The values as `width` or fewer bars, neighbours averaged, from their lowest to their highest."""
    if len(values) > width:
        cuts = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(values), max(values)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] for value in values)


def size(count: float) -> str:
    """Bytes for people: "312.5 KiB", "1.90 MiB", "7.52 GiB"."""
    if count >= 1 << 30:
        return f"{count / (1 << 30):.2f} GiB"
    return f"{count / (1 << 20):.2f} MiB" if count >= 1 << 20 else f"{count / (1 << 10):.1f} KiB"


def _or_none(version: int | None) -> str:
    return "none" if version is None else str(version)
