"""Memory for a baseline that lies in files: the kernel writes it out where memory is short, and reads it back.

The files have no names, so they go with the process, however that ends. Nothing in them is ever read by another.
"""

import mmap
import os
import tempfile
from pathlib import Path

import numpy as np

from deltawire.buckets.atomic import file_system_errors
from deltawire.weights.bits import Bits

SEGMENT = 64 << 20
"""bytes of a file, or one tensor's where it is larger: a process may have 65,530 mappings, and a model more tensors"""
ALIGNMENT = 64
"""bytes"""


class ScratchFiles:
    """Nameless files in `folder`, which fill with what is copied into them, and are freed with the last copy."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._segment, self._used = np.empty(0, np.uint8), 0

    def copy(self, bits: Bits) -> Bits:
        """The same bits in a file. Raises OutOfSpace, before anything is written, where the disk has no room."""
        size = bits.data.nbytes
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        if start + size > self._segment.size:
            self._segment, start = self._map(max(SEGMENT, size)), 0
        self._used = start + size
        data = self._segment[start : start + size].view(bits.data.dtype)
        data[:] = bits.data
        return Bits(bits.dtype, bits.shape, data)

    def _map(self, size: int) -> np.ndarray:
        with (
            file_system_errors(f"{self._folder} (TMPDIR chooses another disk)"),
            tempfile.TemporaryFile(dir=self._folder) as file,
        ):
            os.posix_fallocate(file.fileno(), 0, size)  # a write to a page without room on the disk is SIGBUS
            return np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8)
