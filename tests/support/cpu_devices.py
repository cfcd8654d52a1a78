"""A device on this host: torch tensors of the CPU count as on a device, so that all that a GPU does is run here."""

import torch

from deltawire import Publisher


class CpuDevice:
    """Holds torch tensors, or those of them that `only` says; `room` is what it answers when asked."""

    def __init__(self, *, room=True, only=lambda tensor: True):
        self.room, self.only, self.asked = room, only, []

    def holds(self, tensor):
        return isinstance(tensor, torch.Tensor) and not hasattr(tensor, "full_tensor") and self.only(tensor)

    def has_room(self, device, nbytes):
        self.asked.append((device, nbytes))
        return self.room


class DevicePublisher(Publisher):
    """A publisher for which tensors of the CPU lie on a device."""

    _devices = CpuDevice()
