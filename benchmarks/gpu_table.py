"""Rows that are printed as soon as they are measured, and the peak memory of what each of them measured."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

HEADER = (
    "| what | on the device | bound | times the bound | host path | host / device | device, peak | host, peak |",
    "|---|---|---|---|---|---|---|---|",
)


class OutOfTime(Exception):
    """The next row would begin after the time that was given."""


class Table:
    """A table in markdown, printed row by row; `seconds` from now on no other row is begun. A `silent` one prints
    nothing: what is measured to be compiled and loaded."""

    def __init__(self, seconds: float, *, silent: bool = False) -> None:
        self._end, self._silent = time.monotonic() + seconds, silent
        self._print(*HEADER)

    def require_time(self) -> None:
        """Raise OutOfTime where the time is over."""
        if time.monotonic() > self._end:
            raise OutOfTime

    def row(
        self,
        what: str,
        took: float | None,
        bound: float,
        host: float | None = None,
        memory: "Memory | None" = None,
    ) -> None:
        """Print milliseconds that something took, at least takes, and takes on the host path; with peak memory."""
        mine = took if took is not None else host
        times = f"{mine / bound:.1f}" if mine is not None and bound else ""
        ratio = f"{host / took:.1f}" if took and host is not None else ""
        sizes = (_size(memory.device), _size(memory.host)) if memory else ("", "")
        cells = (what, _time(took), _time(bound), times, _time(host), ratio, *sizes)
        self._print("| " + " | ".join(cells) + " |")

    def _print(self, *lines: str) -> None:
        if not self._silent:
            print(*lines, sep="\n", flush=True)


class Memory:
    """Peak bytes above what was there before, of the device's pool and of this process."""

    def __init__(self, device: str) -> None:
        self._on = device
        self.device = self.host = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take in the peaks of a block: those of the device are 0 where it is the host."""
        before = _start_device(self._on)
        _forget_peak()
        held = _resident("VmRSS")
        yield
        self.host = max(self.host, _resident("VmHWM") - held)
        if self._on != "cpu":
            self.device = max(self.device, torch.cuda.max_memory_allocated() - before)


def _start_device(device: str) -> int:
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _forget_peak() -> None:
    """Have Linux count the peak of this process's memory from now on."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:")), 0)


def _time(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds:.3g} ms" if milliseconds < 100 else f"{milliseconds:,.0f} ms"


def _size(number: int) -> str:
    return f"{number / (1 << 20):,.0f} MiB"
