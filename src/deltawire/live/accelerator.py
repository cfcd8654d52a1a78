"""An accelerator beside the model that it serves: memory of ours there, a stream of our own, and what crosses to it."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from deltawire.live.arena import LEAST, Arena, Room, wanted_size
from deltawire.weights.device.landing import give_back_unused, landing

ON_HOST = frozenset({"cpu"})
"""the kinds of devices whose memory the host's threads read and write. Tests take "cpu" out: then torch does it all."""
KEPT = 4 << 30
"""bytes of pinned host memory after which torch is asked to give back what is free of it"""
MOST_A_BYTE = 16
"""bytes of an arena that a byte of the model can make use of"""


class Accelerator:
    """One device. What is queued `beside` the model runs on a stream of its own, and the model's never waits for it.

    The arena's window is used only within `beside` and `crossing`, by one thread at a time: a job that was abandoned
    may come to life while another update is written.
    """

    def __init__(self, device: torch.device, arena_size: int) -> None:
        self.device = device
        self.arena = Arena(device, arena_size)
        self.pinned_bytes = 0
        """host memory that was pinned since torch was last asked to give back what nobody uses"""
        self._window_is_mine = threading.RLock()
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=0)  # the lowest that there is

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Have what the block queues run beside the model, after all that the model's stream has been given so far.
        It is done when the block ends: what is staged is there before anyone asks for a pause."""
        with self._window_is_mine, self._own_stream():
            try:
                yield
            finally:  # a failure, too, leaves nothing behind that still uses the window
                self.wait()

    @contextmanager
    def crossing(self) -> Iterator[Room]:
        """The window, for what a write queues on the current stream. It is done when the block ends."""
        with self._window_is_mine:
            try:
                yield self.arena.window()
            finally:
                self.wait()

    def wait(self) -> None:
        """Wait for what was queued on the current stream; on a device without streams of its own, for all."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).synchronize()
        elif self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def pinned(self, count: int, kind: torch.dtype) -> torch.Tensor:
        """So many elements of host memory, of any value, that cross at full speed and while others compute."""
        self.pinned_bytes += count * kind.itemsize if self.device.type == "cuda" else 0
        return landing(count, kind, self.device)

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        if (current := torch.cuda.current_stream(self.device)) != self._stream:
            self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield


class Accelerators:
    """The accelerators that a model's tensors are on, each made when it is first asked for, and kept.

    `arena_size` is in bytes, and by default what `DELTAWIRE_ARENA` says. No arena is larger than its model can use.
    """

    def __init__(self, arena_size: int | None = None) -> None:
        self._arena_size = wanted_size() if arena_size is None else arena_size
        self._known: dict[torch.device, Accelerator] = {}

    def take_for(self, tensors: Iterable[torch.Tensor]) -> None:
        """Take an arena on every accelerator that one of these tensors is on, unless there is one."""
        held: dict[torch.device, int] = {}
        for tensor in tensors:
            held[tensor.device] = held.get(tensor.device, 0) + tensor.nbytes
        for device, size in held.items():
            if device.type not in {"meta", *ON_HOST} and device not in self._known:
                self._known[device] = Accelerator(device, min(self._arena_size, max(LEAST, MOST_A_BYTE * size)))

    def of(self, device: torch.device) -> Accelerator | None:
        """The accelerator that a device is; None for the host's memory."""
        if device.type in ON_HOST:
            return None
        if device not in self._known:
            self._known[device] = Accelerator(device, self._arena_size)
        return self._known[device]

    def wait(self) -> None:
        """Wait for what this thread has queued: then every other thread reads it, too."""
        for accelerator in self._known.values():
            accelerator.wait()

    def give_back_pinned(self) -> None:
        """Have torch give back the pinned memory that nobody uses, if it is much. Else it keeps twice a model for good
        after a join. It takes moments in which the device may wait: this is for threads that stage."""
        much = [accelerator for accelerator in self._known.values() if accelerator.pinned_bytes > KEPT]
        for accelerator in much:
            accelerator.pinned_bytes = 0
        if much:
            give_back_unused()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """`Accelerator.beside` of all of them at once."""
        with ExitStack() as stack:
            for accelerator in self._known.values():
                stack.enter_context(accelerator.beside())
            yield
