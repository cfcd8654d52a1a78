"""What a publish reports, in the trainer's own logs: `deltawire/…` beside its loss, wherever those go."""

import inspect
from collections.abc import Callable
from typing import Any

from deltawire.publish.reports import PublishReport

try:
    from transformers import TrainerCallback, TrainerState, TrainingArguments
    from transformers.trainer_callback import CallbackHandler
except ImportError:
    raise ImportError("the Trainer callback needs transformers: pip install 'deltawire[transformers]'") from None


class IntoLogs(TrainerCallback):
    """Adds the numbers of the newest report to what a transformers Trainer logs, before any other callback sees it.

    A callback of yours comes after those that report to W&B and others, which then have written already.
    """

    def __init__(self, report: Callable[[], PublishReport | None]) -> None:
        self._report = report

    def on_log(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        report, logs = self._report(), kwargs.get("logs")
        if report is None or logs is None:
            return
        numbers = report.as_metrics()
        logs.update(numbers)
        if state.log_history:  # a copy of the logs, made before
            state.log_history[-1].update(numbers)

    @staticmethod
    def ahead_of_others(report: Callable[[], PublishReport | None]) -> None:
        """Put one first among the callbacks of the trainer that calls us; nothing happens where none does.

        Transformers hands a callback neither its trainer nor a place in the order, so the caller's frame is asked. A
        new list is set, because the old one is being walked."""
        frame = inspect.currentframe()
        while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
            frame = frame.f_back
        if frame is not None:
            handler = frame.f_locals["self"]
            others = [callback for callback in handler.callbacks if not isinstance(callback, IntoLogs)]
            handler.callbacks = [IntoLogs(report), *others]
