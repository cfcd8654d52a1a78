"""A follower at work while a test does other things."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from runs import PATIENCE

from deltawire.follow.follower import Follower, UpdateReport
from deltawire.vllm.client import EngineClient


@contextmanager
def following(url: str, engine_url: str) -> Iterator[list[UpdateReport]]:
    """Follow on another thread; the list of reports grows as versions come to be served."""
    reports: list[UpdateReport] = []
    follower = Follower(url, EngineClient(engine_url), poll=0.02, on_update=reports.append)
    thread = threading.Thread(target=follower.run)
    thread.start()
    try:
        yield reports
    finally:
        follower.close()
        thread.join(PATIENCE)
        assert not thread.is_alive()
