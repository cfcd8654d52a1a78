"""The inner loops, in Numba (`kernels_numba`) where it is installed, else in numpy (`kernels_numpy`): equal results.

Every kernel releases the GIL and none is `parallel=True`: two Python threads inside one under Numba's workqueue abort
the process. Parallelism is a thread pool over chunks. They compile on first use (cached on disk); `warm_up` compiles
them ahead of time, so that nothing compiles inside a pause. A user imports them inside the function that
does: numba costs half a second, and vLLM's start-up (0.32, CPU) looks into every loaded module and fails on llvmlite's.
"""

import numpy as np

from deltawire.weights import kernels_numpy as plain
from deltawire.weights.bits import UInts, unsigned
from deltawire.weights.speed import why_no_numba

if why_no_numba() is None:
    from deltawire.weights.kernels_numba import (
        apply_with_digest,
        collect,
        compare_and_collect,
        digest_at,
        digest_sweep,
        gather,
        scatter,
    )
else:
    from deltawire.weights.kernels_numpy import (
        apply_with_digest,
        collect,
        compare_and_collect,
        digest_at,
        digest_sweep,
        gather,
        scatter,
    )

__all__ = [
    "apply_with_digest",
    "collect",
    "compare_and_collect",
    "digest_at",
    "digest_sweep",
    "gather",
    "plain",
    "scatter",
    "warm_up",
]


def warm_up() -> None:
    """Compile every loop for every element width, so that nothing compiles inside a pause."""
    for dtype in ("U8", "U16", "U32", "U64"):
        old: UInts = np.zeros(2, unsigned(dtype))
        new: UInts = np.ones(2, unsigned(dtype))
        positions, steps = compare_and_collect(old, new)
        apply_with_digest(old, positions, steps)
        digest_sweep(old)
        digest_at(positions, steps)
        scatter(old, positions, gather(old, positions))
