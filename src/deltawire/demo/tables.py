"""What a demo says at its end: how the training went, act by act, and what the model answers now."""

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from deltawire.demo.games import Game
from deltawire.demo.screen import size
from deltawire.demo.summary import Answered, DemoSummary

LONGEST_ANSWER = 60
"""characters of an answer that are shown"""


def final_tables(summary: DemoSummary, game: Game) -> Iterator[Table]:
    """The exam before and after, where there was one, and the training with the proof that all weights are equal."""
    if len(summary.exams) > 1:
        yield exam_table(summary)
    yield training_table(summary, game)


def training_table(summary: DemoSummary, game: Game) -> Table:
    """What the demo showed, act by act."""
    table = Table("act", "rate", "versions", "reward", game.won, "changed", "delta", title="deltawire demo")
    for act in summary.acts:
        table.add_row(
            act.name,
            f"{act.learning_rate:g}",
            str(act.versions),
            f"{act.reward_first:.3f} → {act.reward_last:.3f}",
            f"{act.win_rate_first:.0%} → {act.win_rate_last:.0%}",
            f"{act.changed_fraction:.2%}",
            size(act.delta_bytes),
        )
    audit = summary.audit
    equal = "equal" if audit.equal else "DIFFERENT"
    table.caption = (
        f"vLLM, bucket, fresh server and trainer at version {audit.version}: {equal}\n"
        f"{summary.versions} deltas are {size(summary.delta_bytes)}, as many checkpoints are "
        f"{size(summary.versions * summary.model_bytes)}\n"
        f"{audit.tensors} tensors, {size(summary.model_bytes)}; pause {summary.pause_ms:.1f} ms, "
        f"published to served {summary.publish_to_served_s:.2f} s (medians)"
    )
    return table


def exam_table(summary: DemoSummary) -> Table:
    """What vLLM answered to questions that nobody trained on, before the first step and after the last."""
    before, after = summary.exams[0], summary.exams[-1]
    table = Table("held out", "before", f"at version {summary.audit.version}", title="greedy answers of vLLM")
    for first, last in zip(before.answers, after.answers, strict=True):
        table.add_row(first.question, _marked(first), _marked(last))
    count = len(after.answers)
    table.caption = f"right: {before.right} of {count} → {after.right} of {count}"
    return table


def answer_line(answered: Answered) -> str:
    """A question and its answer, on one line."""
    return f"{answered.question} {one_line(answered.answer)} [{'right' if answered.right else 'wrong'}]"


def one_line(answer: str) -> str:
    """What a model wrote, as text for a terminal: no escape, no line of its own, and its end cut off."""
    shown = "".join(char if char.isprintable() else "�" for char in " ".join(answer.split()))
    return shown if len(shown) <= LONGEST_ANSWER else f"{shown[: LONGEST_ANSWER - 1]}…"


def _marked(answered: Answered) -> Text:
    mark, style = ("✓", "green") if answered.right else ("✗", "red")
    return Text(f"{mark} {one_line(answered.answer)}", style=style)
