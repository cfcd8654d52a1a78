"""Device memory of ours beside the model: one block, taken once, in which updates are staged and from which they are
written.

A server gives nearly all of its device memory to requests. So what we need is taken while it still measures what is
left, and nothing is asked of torch's pool afterwards.
"""

import os
import re
import threading
import weakref
from collections import deque

import torch

from deltawire.errors import EngineUnsupported

VARIABLE = "DELTAWIRE_ARENA"
"""the environment variable that says how large the block is: bytes, or a number of KiB, MiB or GiB; 0 for none"""
DEFAULT = 256 << 20
LEAST = 1 << 10
"""bytes; a smaller block has no window that a change fits in"""
WINDOW_SHARE = 8
"""one byte in so many is the window"""
POOLED_WINDOW = 64 << 20
"""bytes of the window where there is no block"""
ALIGNED = 256
"""bytes: rooms begin at multiples, as torch's own memory does"""
APART = 16
"""bytes: what is taken of a room begins at multiples. Triton compiles a kernel again for addresses that are none."""
_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def wanted_size() -> int:
    """Bytes that the environment asks for. Raises EngineUnsupported for anything but a size."""
    text = os.environ.get(VARIABLE, "").strip()
    found = re.fullmatch(r"(\d+) ?(B|KiB|MiB|GiB|)", text)
    size = DEFAULT if not text else int(found[1]) * _UNITS[found[2]] if found else -1
    if size < 0 or 0 < size < LEAST:
        raise EngineUnsupported(f"{VARIABLE}={text} is no size: write 256MiB, or bytes from {LEAST} on, or 0 for none")
    return size


class Room:
    """Bytes of an arena, free again once nobody holds this."""

    def __init__(self, data: torch.Tensor) -> None:
        self._data = data
        self._taken = 0

    def take(self, count: int, kind: torch.dtype) -> torch.Tensor:
        """The next so many elements, of any value; `bytes_for` says how many bytes those of several kinds need."""
        start = self._taken
        self._taken += _aligned(count * kind.itemsize, APART)
        return self._data[start : start + count * kind.itemsize].view(kind)

    def holds(self, count: int, kind: torch.dtype) -> bool:
        """Whether so many elements can be taken still."""
        return self._taken + count * kind.itemsize <= self._data.numel()


def bytes_for(count: int, *kinds: torch.dtype) -> int:
    """Bytes of a room for so many elements of each kind."""
    return sum(_aligned(count * kind.itemsize, APART) for kind in kinds)


def most_in(size: int, *kinds: torch.dtype) -> int:
    """How many elements of each kind a room of so many bytes has place for."""
    return (size - APART * len(kinds)) // sum(kind.itemsize for kind in kinds)


class Arena:
    """A block of `size` bytes on a device. With 0 there is none, and everything is taken from torch's pool.

    A part of it, the `window`, is used by whatever crosses at the moment: staging, writing and taking back never happen
    at once. The rest is handed out in rooms, which are held as long as an update can be taken back.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self.device, self.size = device, size
        window = _aligned(size // WINDOW_SHARE) if size else 0
        with torch.inference_mode(False):  # who makes a follower in that mode may use it outside
            self._block = torch.empty(size, dtype=torch.uint8, device=device)
        self._window = self._block[:window]
        self._free = [(window, size)] if size else []
        self._returned: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()

    @property
    def window_bytes(self) -> int:
        """Bytes that can cross at a time."""
        return self._window.numel() if self.size else POOLED_WINDOW

    def window(self) -> Room:
        """The window, to be used until the next call."""
        data = self._window if self.size else torch.empty(POOLED_WINDOW, dtype=torch.uint8, device=self.device)
        return Room(data)

    def room(self, size: int) -> Room | None:
        """A room of so many bytes; None where no free part is as large."""
        if not self.size:
            return Room(torch.empty(size, dtype=torch.uint8, device=self.device))
        needed = max(_aligned(size), ALIGNED)
        with self._lock:
            self._take_returned()
            for number, (start, end) in enumerate(self._free):
                if end - start >= needed:
                    self._free[number] = (start + needed, end)
                    room = Room(self._block[start : start + size])
                    # a finalizer may run anywhere, even in here: it only notes what is free again
                    weakref.finalize(room, self._returned.append, (start, start + needed)).atexit = False
                    return room
        return None

    def _take_returned(self) -> None:
        """Join what was given back to the free parts that it touches."""
        while self._returned:
            self._free.append(self._returned.popleft())
        joined: list[tuple[int, int]] = []
        for start, end in sorted(part for part in self._free if part[0] < part[1]):
            if joined and joined[-1][1] == start:
                joined[-1] = joined[-1][0], end
            else:
                joined.append((start, end))
        self._free = joined


def _aligned(size: int, to: int = ALIGNED) -> int:
    return -(-size // to) * to
