"""Whether Numba can be used here, and one warning where a job is slow without it."""

import warnings
from functools import cache
from threading import Lock

NOTICEABLE = 1 << 26
"""elements: their digest takes 0.5 s in numpy and 0.02 s in Numba (`benchmarks/without_numba.py`)"""
_lock = Lock()
_elements = 0


@cache
def why_no_numba() -> str | None:
    """Why Numba cannot be imported; None where it can."""
    try:
        import numba  # noqa: F401
    except ImportError as error:  # not installed, or refuses the numpy that is
        return str(error)
    return None


def slow(elements: int) -> None:
    """Count the elements a numpy loop goes through. Where Numba is missing, the first NOTICEABLE of them make a
    RuntimeWarning that says what to install: once per process, and never for small jobs."""
    global _elements
    if why_no_numba() is None:
        return
    with _lock:
        before, _elements = _elements, _elements + elements
    if before < NOTICEABLE <= before + elements:
        warnings.warn(
            f"deltawire runs its inner loops in numpy, several times slower than in Numba ({why_no_numba()}). "
            "Install Numba: pip install 'deltawire[fast]'",
            RuntimeWarning,
            stacklevel=3,
        )
