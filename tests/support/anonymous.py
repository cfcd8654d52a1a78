"""How much anonymous memory a process takes: that above the page cache, which what maps a file can always drop."""

import threading
from pathlib import Path


def anonymous() -> int:
    """Bytes of it that this process has now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


class Memory:
    """The most anonymous memory of this process while it is watched, in bytes; looked at `every` so many seconds."""

    def __init__(self, every: float = 0.01) -> None:
        self.most = anonymous()
        self._every, self._done = every, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._every):
            self.most = max(self.most, anonymous())
