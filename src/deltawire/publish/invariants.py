"""What is true of a publisher between any two of its steps, as functions over values: nothing captured is forgotten.

    committed + frozen + waiting == baseline

Each function gives None where its sentence holds, and else says what is wrong.

| function | cost | who asks |
|---|---|---|
| `nothing_is_forgotten` | O(waiting), at most three as a rule | a publisher, at each publish and commit |
| `digests_agree` | O(tensors) | tests |
| `changes_add_up` | O(model) | tests |
"""

from collections.abc import Mapping, Sequence

from deltawire.publish.pending import Captured
from deltawire.runlog.invariants import Problem
from deltawire.weights.bits import Bits
from deltawire.weights.delta import Delta
from deltawire.weights.tensors import equal


def nothing_is_forgotten(committed: int | None, held: Sequence[Captured], following: int) -> Problem:
    """What is committed, and what is held back, oldest first, lead without a hole to the newest captured version.

    `following` is the number that the next version will have.
    """
    here = committed
    for captured in held:
        if captured.parent != here and not (here is None and captured.parent is None):
            return f"version {captured.version} continues {captured.parent}, and what is held before it ends at {here}"
        here = captured.version
    newest = -1 if here is None else here
    return None if newest == following - 1 else f"versions up to {newest} are held, and {following - 1} was captured"


def digests_agree(held: Sequence[Captured], baseline: Mapping[str, int]) -> Problem:
    """The newest captured version has the digests of the baseline. Asked where no capture was broken off."""
    if not held or held[-1].digests == baseline:
        return None
    return f"version {held[-1].version} has other digests than the baseline"


def changes_add_up(
    committed: Mapping[str, Bits], held: Sequence[Captured], uncovered: Delta, baseline: Mapping[str, Bits]
) -> Problem:
    """The weights last committed, every change that is held, and what no version covers are the baseline, bit for bit.

    Asked of a trainer that holds whole tensors, once its first version is committed.
    """
    weights = {name: bits.copy() for name, bits in committed.items()}
    for change in (*(captured.delta for captured in held), uncovered):
        change.apply_(weights)
    return None if equal(weights, dict(baseline)) else "committed + frozen + waiting + uncovered is not the baseline"
