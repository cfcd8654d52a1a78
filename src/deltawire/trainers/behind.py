"""The TRL trainer behind the weights that it hands over: its model, and the metrics that it logs."""

import inspect
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any


def trainer_behind(pairs: Iterable[tuple[str, Any]]) -> Any:
    """The trainer whose generator these pairs come from, as TRL's do, before it is used up; None where that cannot be
    known."""
    if not inspect.isgenerator(pairs) or pairs.gi_frame is None:
        return None
    return inspect.getgeneratorlocals(pairs).get("self")


def log_into(trainer: Any, numbers: Mapping[str, float]) -> None:
    """Have a TRL trainer log these with its next step, as it logs what its rollouts measured. A trainer that keeps no
    such metrics is left as it is."""
    with suppress(AttributeError, KeyError, TypeError):
        metrics = trainer._metrics["train"]
        for name, value in numbers.items():
            metrics[name].append(value)
