"""The class of an element is the exponent of its old value, clamped to sixteen; codec `class` ranks changes in it.

Within a class every element changes about equally often, so the ranks of the changed are an even list. In numpy: the
slow and obvious twin. docs/FORMAT.md §5.7
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from deltawire.errors import WrongBase
from deltawire.format.codecs.lists import CHANGED, Facts
from deltawire.weights.bits import Positions, UInts
from deltawire.weights.found import Found, Scratch
from deltawire.weights.kernels_numpy import collect

CLASSES = 16


@dataclass(frozen=True, slots=True)
class Scheme:
    """class(x) = min(max(((x >> shift) & mask) - lowest, 0), 15)"""

    shift: int
    mask: int
    lowest: int


SCHEMES = {
    "F8_E5M2": Scheme(2, 31, 0),
    "F16": Scheme(10, 31, 0),
    "BF16": Scheme(7, 255, 108),
    "F32": Scheme(23, 255, 108),
    "F64": Scheme(52, 2047, 1004),
    "F8_E4M3": Scheme(3, 15, 0),
}
"""dtypes with exponents; all others have one class"""


def classes(bits: UInts, scheme: Scheme) -> npt.NDArray[np.int64]:
    """The class of each element."""
    exponents = (bits >> bits.dtype.type(scheme.shift)).astype(np.int64) & scheme.mask
    return np.clip(exponents - scheme.lowest, 0, CLASSES - 1)


class Ranked(NamedTuple):
    """The elements of each class, the changes of each class, and class by class the changes' ranks and steps."""

    population: Positions
    changed: Positions
    ranks: Positions
    steps: UInts


def classify(old: UInts, positions: Positions, steps: UInts, scheme: Scheme) -> Ranked:
    """The changes by their classes and ranks."""
    all_classes = classes(old, scheme)
    population = np.bincount(all_classes, minlength=CLASSES)
    own = all_classes[positions]
    changed, order = np.bincount(own, minlength=CLASSES), np.argsort(own, kind="stable")
    ranks = np.empty(positions.size, np.int64)
    for c in range(CLASSES):
        ranks[own == c] = np.searchsorted(np.flatnonzero(all_classes == c), positions[own == c])
    return Ranked(population, changed, ranks[order], steps[order])


def compare(old: UInts, new: UInts, scheme: Scheme, found: Found, scratch: Scratch) -> Ranked:
    """What `collect` finds goes to `found`, and is returned as `classify` ranks it. The arrays may be of `scratch`, and
    then hold until it is used again."""
    first = found.count
    collect(old, new, found)
    return classify(old, found.positions[first : found.count], found.steps[first : found.count], scheme)


def locate(
    old: UInts, facts: Facts, ranks: Positions, steps: UInts, scheme: Scheme
) -> tuple[Positions, Positions, UInts]:
    """The inverse of `classify`: the elements of each class, and the changes' ascending positions and steps. Elements
    have to be counted to the end only for classes of which `facts` say that the unchanged are listed.

    Raises WrongBase for a rank that no element of its class has.
    """
    all_classes = classes(old, scheme)
    population = np.bincount(all_classes, minlength=CLASSES)
    positions, done = np.empty(ranks.size, np.int64), 0
    for c, m in enumerate(facts[:, CHANGED].tolist()):
        own = ranks[done : done + m]
        if m and int(own[-1]) >= population[c]:
            raise WrongBase("a rank beyond its class: these are not the weights that the delta was made from")
        positions[done : done + m] = np.flatnonzero(all_classes == c)[own]
        done += m
    order = np.argsort(positions)
    return population, positions[order], steps[order]
