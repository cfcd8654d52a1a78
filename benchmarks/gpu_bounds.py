"""What a machine's memory can do at most, measured by copies, and the bytes that each piece of our work must move."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SECTOR = 32
"""bytes that a device reads or writes at least, wherever one element is"""
POSITION, ELEMENT, MASTER = 4, 2, 4
"""bytes of a position, of a 16-bit element, of an fp32 master"""
WRITTEN = 2 * SECTOR + POSITION + ELEMENT + POSITION
"""bytes of a change that is written: its sector read and written, its place, its bits, and room for 64-bit offsets"""
REPEATS = 7


@dataclass(frozen=True, slots=True)
class Copies:
    """Bytes a millisecond that plain copies move: on the device and on the host read and written together, and across
    the bus in one direction, from pinned memory."""

    device: float
    host: float
    bus: float

    def publish(self, elements: int, width: int) -> float:
        """Milliseconds to read weights of a width and a 16-bit baseline once, where they are."""
        return (width + ELEMENT) * elements / self.device

    def stage(self, changed: int) -> float:
        """To bring positions and increments across, and to read the bits that they change."""
        return (POSITION + ELEMENT) * changed / self.bus + (SECTOR + POSITION + 2 * ELEMENT) * changed / self.device

    def write(self, changed: int) -> float:
        """To put new bits in place."""
        return WRITTEN * changed / self.device

    def digest(self, elements: int) -> float:
        """To read 16-bit weights once."""
        return ELEMENT * elements / self.device

    def code(self, changed: int, wire_bytes: int) -> float:
        """To read or write positions and increments on the host, and the file's bytes beside them."""
        return ((2 * POSITION + ELEMENT) * changed + wire_bytes) / self.host


def measure_copies(device: str, elements: int) -> Copies:
    """Copy 16-bit elements. Without a GPU the device is the host, and nothing crosses a bus."""
    here = torch.zeros(elements, dtype=torch.int16)
    on_host = _rate(here, torch.ones_like(here), "cpu", 2)
    if device == "cpu":
        return Copies(on_host, on_host, on_host / 2)
    there = torch.zeros(elements, dtype=torch.int16, device=device)
    pinned = here[: 1 << 28].pin_memory()
    return Copies(
        _rate(there, torch.ones_like(there), device, 2), on_host, _rate(pinned, there[: pinned.numel()], device, 1)
    )


def _rate(source: torch.Tensor, target: torch.Tensor, device: str, passes: int) -> float:
    return passes * source.nbytes / milliseconds(lambda: target.copy_(source, non_blocking=True), device)


def milliseconds(work: Callable[[], object], device: str, repeats: int = REPEATS) -> float:
    """The median time of a call and all that it queued, the first two calls left out."""
    times = []
    for _ in range(repeats + 2):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[2:])


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
