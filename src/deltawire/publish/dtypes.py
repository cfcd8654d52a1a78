"""In which dtype a tensor is shipped: as the server holds it, by a rule where no tensor table says so."""

import re
import warnings
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from deltawire.errors import NAMED, DtypeMismatch, some
from deltawire.weights.bits import Bits
from deltawire.weights.tensors import FLOATS, cast, dtype_of, mark_of, naming

WIDE = ("F32", "F64")
"""float dtypes that trainers hold and servers do not"""
NARROW = ("BF16", "F16")
DEFAULT = "BF16"


class Casting:
    """Casts the tensors of one publisher, and warns when its first publish rounds what the user did not ask to round.

    `rule` is a dtype, or a mapping from patterns over the checkpoint's names to dtypes. The first pattern that fits
    rules, and "*" is for all other names. Raises ValueError for a dtype that is not a float, TypeError for another kind
    of rule.
    """

    def __init__(self, rule: str | Mapping[str, str]) -> None:
        given = {"*": rule} if isinstance(rule, str) else rule
        if not isinstance(given, Mapping):
            raise TypeError(f"dtype={rule!r}: a dtype, or a mapping from patterns over names to dtypes")
        for dtype in given.values():
            if dtype not in FLOATS:
                raise ValueError(f"dtype={rule!r}: {dtype!r} is not one of {', '.join(FLOATS)}")
        self._patterns = {pattern: dtype for pattern, dtype in given.items() if pattern != "*"}
        self._rest = given.get("*", DEFAULT)
        self._rounded: dict[str, bool] = {}
        """tensors in fp32 that no pattern had rounded, and whether the model says that it keeps them so"""
        self._is_mixed = self._is_settled = False

    def served_as(self, name: str, tensor: Any) -> str:
        """The dtype in which a server holds a tensor that no table has.

        That is what a pattern says, else the tensor's own dtype, or the rule's for a dtype that only trainers hold. A
        server of fp16 holds bf16 weights as fp16 too. Bits are what the checkpoint holds, as the scales of fp8 are, and
        so is what a model keeps in fp32.
        """
        own = dtype_of(tensor)
        if (asked := self._asked(name, own)) is not None:
            return asked
        if isinstance(tensor, Bits) or mark_of(tensor) == "kept":
            return own
        return self._rest if own in WIDE or (own, self._rest) == ("BF16", "F16") else own

    def begin(self) -> None:
        """A publish begins: forget what one that failed gave."""
        self._rounded, self._is_mixed = {}, False

    def cast(self, name: str, tensor: Any, held: str, *, shard: Any = None) -> Bits:
        """A tensor, or the `shard` of it that is here, as `held`, the dtype in the run's table.

        Raises DtypeMismatch, naming the tensor, for dtypes that do not convert, and as `through` does.
        """
        asked, here = self.through(name, tensor, held), tensor if shard is None else shard
        with naming(name):
            return cast(here if asked is None else cast(here, asked), held)

    def through(self, name: str, tensor: Any, held: str) -> str | None:
        """The dtype by way of which a tensor becomes `held`, the dtype in the run's table; None where it is cast to
        that at once.

        A pattern may ask for fewer bits than the table has: values are rounded to those, and widened. Raises
        DtypeMismatch, naming the tensor, where a pattern asks for more than the table can hold.
        """
        own = dtype_of(tensor)
        asked = self._asked(name, own)
        if asked is None and own in WIDE and held in NARROW:
            self._rounded[name] = mark_of(tensor) is not None
        self._is_mixed = self._is_mixed or (own in NARROW and not isinstance(tensor, Bits))
        if asked is not None and asked != held and (asked in WIDE or held not in WIDE):
            raise DtypeMismatch(
                f"{name}: dtype= asks for {asked}, and this run has it in {held}, as its base or its first publish had "
                'it. Leave the pattern out, or begin another run: without that base, or Publisher(run="supersede")'
            )
        return asked

    def settle(self, names: Iterable[str], *, warn: bool = True) -> None:
        """Check the rule once the first publish has given all its tensors, `names`.

        Warns of fp32 tensors that were rounded unasked, beside others of 16 bits or although their model keeps them in
        fp32. Raises DtypeMismatch for a pattern that fits no tensor.
        """
        if self._is_settled:
            return
        given = sorted(names)
        if unused := [pattern for pattern in self._patterns if not any(fnmatchcase(name, pattern) for name in given)]:
            raise DtypeMismatch(
                f"dtype= has {', '.join(map(repr, unused))}, which fits no tensor that was published: patterns are "
                f"over the checkpoint's names, as {some(map(repr, given))}"
            )
        self._is_settled = True
        if warn and (meant := [name for name, is_said in self._rounded.items() if is_said or self._is_mixed]):
            warnings.warn(_what_was_rounded(meant), stacklevel=4)

    def _asked(self, name: str, own: str) -> str | None:
        """What the first pattern that fits says of a float tensor."""
        if own not in FLOATS:
            return None
        return next((dtype for pattern, dtype in self._patterns.items() if fnmatchcase(name, pattern)), None)


def _what_was_rounded(names: list[str]) -> str:
    kinds = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
    keep = ", ".join(f'"{kind}": "F32"' for kind in kinds[:NAMED])
    return (
        f"{len(names)} tensors that the model keeps in fp32 beside 16-bit ones were rounded to 16 bits: "
        f"{some(kinds)}. Where servers hold them in fp32, begin a run with "
        f'Publisher(dtype={{{keep}}}); where they do not, say so there: "BF16"'
    )
