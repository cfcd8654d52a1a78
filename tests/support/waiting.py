"""Waiting for what another thread or process does: looked for again and again, and never for ever."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 90.0
"""seconds after which a wait that should be instant is a failure"""
LOOK = 0.005
"""seconds between looks"""


def until(look: Callable[[], T], *, seconds: float = PATIENCE, unless: Callable[[], object] = lambda: False) -> T:
    """What `look` finds, once it finds something. Fails after `seconds`, or when `unless` comes first."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain"
        assert not unless(), "what was waited for cannot come any more"
        time.sleep(LOOK)
    return found


def await_staging() -> None:
    for thread in threading.enumerate():
        if thread.name == "deltawire-stage":
            thread.join(PATIENCE)
