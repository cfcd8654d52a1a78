"""Where elements of a checkpoint tensor are in a storage, by way of the box that both have in common."""

import numpy as np


def located(box, positions):
    """Which of these positions are in a box, and their offsets in its storage."""
    inside, numbers = box.part.locate(positions)
    return inside, box.at(numbers)[1] if numbers.size else np.empty(0, np.int64)
