"""What the trainer last captured, bit for bit: the copy that new weights are compared with.

It costs two bytes per bf16 element: of host memory, of a file, or of the memory of the device where the weights are.
It is scratch: after a crash it is rebuilt from the last commit, never trusted.
"""

from collections.abc import Callable, Iterable, Mapping

from deltawire.errors import CopiesDiffer
from deltawire.format.codecs import fused
from deltawire.format.codecs.fused import Coding
from deltawire.format.codecs.subset import Coded
from deltawire.publish.devices import Lent
from deltawire.publish.requirements import require_shape
from deltawire.weights.bits import Bits
from deltawire.weights.boxes import Box
from deltawire.weights.delta import TensorDelta, between_bits
from deltawire.weights.digest import digest_bits, moved
from deltawire.weights.table import TensorEntry

Own = Callable[[Bits], Bits]
"""the same bits in memory that nothing else writes"""


class Baseline:
    """The weights last captured and their digests, which every capture moves together in O(changed).

    A rank of a sharded job seeds the boxes it holds. Shapes and positions then are those inside a box, and digests are
    the part that the box has in its tensor's digest. `own` says where what is seeded lies. What is `lent` lies on a
    device, where `publish/on_device.py` compares it; what a method here looks at comes back to the host.
    """

    def __init__(self, own: Own = Bits.copy) -> None:
        self._own = own
        self._weights: dict[str, Bits | Lent] = {}
        self.boxes: dict[str, Box] = {}
        self.digests: dict[str, int] = {}

    @classmethod
    def of(cls, weights: Mapping[str, Bits], own: Own = Bits.copy) -> "Baseline":
        """A baseline that holds these weights, in memory of its own."""
        baseline = cls(own)
        for name in weights:
            baseline.seed(name, weights[name])
        return baseline

    def __getitem__(self, name: str) -> Bits:
        held = self._weights[name]
        return held if isinstance(held, Bits) else held.home()

    def __len__(self) -> int:
        return len(self._weights)

    def seed(self, name: str, bits: Bits, box: Box | None = None) -> None:
        """Take a tensor, or a box of one, as captured, in memory of our own."""
        held = self._own(bits)  # what is given may be written meanwhile, and the digest is that of what we hold
        self._weights[name] = held
        if box is not None:
            self.boxes[name] = box
        self.digests[name] = digest_bits(held.data) if box is None else box.digest(held.data)

    def forget(self, name: str) -> None:
        """Let go of a tensor, as if it had never been seeded."""
        for kept in (self._weights, self.boxes, self.digests):
            kept.pop(name, None)

    def require_alike(self, alias: str, name: str, bits: Bits) -> None:
        """Raise CopiesDiffer unless what a publish gave of tensor `name` under a second name is the same."""
        if bits != self[name]:
            raise CopiesDiffer(
                f"{alias} is another name of {name} in this run, because the two are tied, and this publish gave them "
                "different bits. Tie them again by model.tie_weights(), or set tie_word_embeddings to false in the "
                'config and begin a run of two tensors: another bucket, or Publisher(run="supersede")'
            )

    def rename(self, old: str, new: str) -> None:
        """Hold a tensor under another name, in the place of what was held under it."""
        self._weights[new], self.digests[new] = self._weights.pop(old), self.digests.pop(old)
        if old in self.boxes:
            self.boxes[new] = self.boxes.pop(old)

    @property
    def held(self) -> Mapping[str, Bits | Lent]:
        """The dtype and shape of each tensor, and its bits wherever they lie."""
        return self._weights

    def as_mapping(self) -> Mapping[str, Bits]:
        """The weights, name -> Bits, not to be written; shared memory, but for what lies on a device."""
        return {name: held if isinstance(held, Bits) else held.home() for name, held in self._weights.items()}

    def lend(self, name: str, place: Lent | Bits) -> None:
        """Have a tensor lie elsewhere; its bits are the same, or those to which `move` has moved its digest."""
        self._weights[name] = place

    def bring_home(self) -> None:
        """Have every tensor lie on the host."""
        for name in self._weights:
            self.at_home(name)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(held.data.nbytes if isinstance(held, Bits) else held.nbytes for held in self._weights.values())

    @property
    def device_bytes(self) -> int:
        """Bytes of those on devices."""
        return sum(held.nbytes for held in self._weights.values() if not isinstance(held, Bits))

    def compare(self, name: str, new: Bits) -> TensorDelta:
        """The change since the last capture; nothing moves. Raises UnknownTensor, ShapeMismatch, DtypeMismatch."""
        require_shape(name, new.shape, self._weights)
        return between_bits(self.at_home(name), new)

    def compare_and_encode(self, name: str, new: Bits, coding: Coding) -> tuple[TensorDelta, Coded]:
        """The same, and its encoding against the last capture, made in one pass. Raises as `compare` does."""
        require_shape(name, new.shape, self._weights)
        return fused.compare(self.at_home(name), new, by_class=coding.by_class, tile=coding.tile)

    def advance(self, name: str, change: TensorDelta) -> None:
        """Move the baseline and its digest by a change, which from here on only the caller holds."""
        data, box = self.at_home(name).data, self.boxes.get(name)
        self.move(name, *(change.apply_(data) if box is None else box.apply_(data, change)))

    def move(self, name: str, before: int, after: int) -> None:
        """Move a tensor's digest, of whose bits those that made `before` of it come to make `after`."""
        self.digests[name] = moved(self.digests[name], before, after)

    def holds_alike(self, one: str, other: str) -> bool:
        """Whether two tensors, or what is held of them, have the same bits; true of one that is not held by itself."""
        return not {one, other} <= self._weights.keys() or self[one] == self[other]

    def table(self, trainable: Iterable[str]) -> tuple[TensorEntry, ...]:
        """The tensor table in the order of seeding."""
        names = frozenset(trainable)
        return tuple(TensorEntry(name, bits.dtype, bits.shape, name in names) for name, bits in self._weights.items())

    def at_home(self, name: str) -> Bits:
        """A tensor's bits, which lie on the host from here on."""
        self._weights[name] = held = self[name]
        return held
