"""The loops of codec `gap`, gaps and varints written and read: Numba's where it is installed, else their numpy twins.

Every reader checks every bound. Import this module inside the function that needs it, as `deltawire.weights.kernels`
explains.
"""

from deltawire.weights.speed import why_no_numba

if why_no_numba() is None:
    from deltawire.format.codecs.varints_numba import read_gaps, read_varints, write_gaps, write_varints
else:
    from deltawire.format.codecs.varints_numpy import read_gaps, read_varints, write_gaps, write_varints

__all__ = ["read_gaps", "read_varints", "write_gaps", "write_varints"]
