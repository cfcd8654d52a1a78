"""Where the receivers of a run cut its tensors, in the words of a heartbeat: an entry for names that differ in numbers.

A worker that holds a part of a tensor decodes codec `class` by tiles, which then must end where the part does.
"""

from collections.abc import Iterable, Mapping

import msgspec

from deltawire.weights.blocks import WHOLE, Cut, together

Cuts = Mapping[str, Cut]
"""By pattern, the rows and columns of which all edges inside such a tensor are multiples, 0 for no edge. A tensor of
another pattern is cut nowhere."""
MOST = 24 << 10
"""bytes of JSON that all patterns may take; a heartbeat has 64 KiB"""


def pattern(name: str) -> str:
    """A tensor's name with `*` for each number between dots: tensors of equal layers, or experts, have the same."""
    return ".".join("*" if part.isascii() and part.isdigit() else part for part in name.split("."))


def cut_at(cuts: Cuts, name: str) -> Cut:
    """Where a tensor is cut."""
    return cuts.get(pattern(name), WHOLE)


def said(cuts: Iterable[tuple[str, Cut]]) -> Cuts | None:
    """By pattern, what suits all these tensors; None where those are too many to be said."""
    found: dict[str, Cut] = {}
    for name, cut in cuts:
        if cut != WHOLE:
            here = pattern(name)
            found[here] = together(found.get(here, WHOLE), cut)
    return if_short(found)


def if_short(cuts: Cuts) -> Cuts | None:
    """The same; None where a heartbeat has no room for so many words."""
    return cuts if len(msgspec.json.encode(cuts)) <= MOST else None


def merged(receivers: Iterable[Cuts]) -> Cuts:
    """What suits all these receivers."""
    found: dict[str, Cut] = {}
    for cuts in receivers:
        for here, cut in cuts.items():
            found[here] = together(found.get(here, WHOLE), cut)
    return found
