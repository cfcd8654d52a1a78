"""Where the baseline of this process lies: on the host, in files, or on the device beside the weights.

Nothing here imports torch; a process without CUDA tensors never touches torch.cuda.
"""

import sys
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from deltawire.weights.bits import Bits
from deltawire.weights.tensors import is_torch, is_wrapper

Asked = Literal["auto", "device", "host", "file"]
"""`baseline` of a Publisher"""
SPARE = 0.1
"""share of a device's memory that stays free with a baseline there, when the trainer takes as much as it ever did"""


class Lent(Protocol):
    """A tensor that lies on a device."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...
    def home(self) -> Bits:
        """The same bits, in host memory that nothing else writes."""


class Sized(Protocol):
    """Something in memory."""

    @property
    def nbytes(self) -> int: ...
    @property
    def device_bytes(self) -> int: ...


class Devices(Protocol):
    """Which tensors have a device on which their baseline may lie, and how much room that has."""

    def holds(self, tensor: Any) -> bool:
        """Whether a tensor, of any library, lies on such a device."""

    def has_room(self, device: Any, nbytes: int) -> bool:
        """Whether so many bytes more leave enough of the device's memory free."""


class Cuda:
    """The GPUs that torch sees."""

    def holds(self, tensor: Any) -> bool:
        """Whether this is a plain torch tensor in a GPU's memory."""
        return is_torch(tensor) and tensor.device.type == "cuda" and not is_wrapper(tensor)

    def has_room(self, device: Any, nbytes: int) -> bool:
        """Whether SPARE of the memory stays free: after the most that torch reserved so far, and these bytes."""
        cuda = sys.modules["torch"].cuda
        free, total = cuda.mem_get_info(device)
        to_come = cuda.max_memory_reserved(device) - cuda.memory_reserved(device)
        return bool(free - to_come - nbytes >= SPARE * total)


@dataclass(frozen=True, slots=True)
class Lies:
    """Where a baseline lies ("host", "file", "device", or "device and host"), its bytes, and those on devices."""

    where: str
    nbytes: int
    device_bytes: int


class Place:
    """One process's choice. "auto" is the host until the second publish, when Adam's state and activations have been
    there once, and the device from then on if it has room. Out of memory, it is the host for good."""

    def __init__(self, asked: Asked, devices: Devices) -> None:
        self._asked, self._devices = asked, devices
        self._publishes = 0
        self._chosen: bool | None = {"auto": None, "device": True}.get(asked, False)

    def begin(self) -> None:
        """A publish begins."""
        self._publishes += 1

    def takes(self, tensor: Any, baseline: Sized) -> bool:
        """Whether a tensor's part of the baseline is to lie on the tensor's device."""
        if self._chosen is False or not self._devices.holds(tensor):
            return False
        if self._chosen is None and self._publishes > 1:
            self._chosen = self._devices.has_room(tensor.device, baseline.nbytes)
        return bool(self._chosen)

    def crosses(self, tensor: Any) -> bool:
        """Whether a tensor lies on a device, where its part of the baseline does not."""
        return self._devices.holds(tensor)

    def refuse(self) -> None:
        """The device had no room after all."""
        self._chosen = False

    def describe(self, baseline: Sized) -> Lies:
        """Where the baseline lies now."""
        nbytes, device_bytes = baseline.nbytes, baseline.device_bytes
        host = "file" if self._asked == "file" else "host"
        where = host if not device_bytes else "device" if device_bytes == nbytes else "device and host"
        return Lies(where, nbytes, device_bytes)
