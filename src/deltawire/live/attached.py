"""One worker's weights beside the run they follow: which parts of its tensors they are, and at which version."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from deltawire.errors import BadDigest, Forked, Gap, WrongBase, some
from deltawire.live import staging, writes
from deltawire.live.accelerator import Accelerators
from deltawire.live.at_hand import cuts_of
from deltawire.live.coverage import Coverage, disagreement
from deltawire.live.live_weights import BetweenPasses, LiveWeights, at_once
from deltawire.live.messages import Audited, Digested, HeldParts
from deltawire.live.staging import PartDigests, Plan
from deltawire.live.transforms import AfterLoading
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.cuts import Cuts
from deltawire.runlog.records import CODECS, NEED_WEIGHTS, Position
from deltawire.weights.digest import root as root_of


@dataclass(frozen=True, slots=True, eq=False)
class Undo:
    """An update that can be taken back: its plan, and the digests and the version from before."""

    plan: Plan
    digests: PartDigests
    position: Position | None


@dataclass(eq=False)
class Attached:
    """A bucket's run beside this worker's weights: their names in that run, the digests that the last update left, and
    their version.

    `frozen` are the committed digests, which no version changes, of frozen tensors of which this worker loads nothing.
    `asked` is the address that was asked for. `coverage` is None when other workers hold the rest, `joined` whether
    the version has been found out. `undo` takes back the last update until that is confirmed.
    """

    asked: str
    subscriber: Subscriber
    live: LiveWeights
    coverage: Coverage | None
    digests: PartDigests
    frozen: dict[str, int]
    position: Position | None = None
    joined: bool = False
    undo: Undo | None = None

    @cached_property
    def codecs(self) -> tuple[str, ...]:
        """Codecs of runs that these weights can be moved by, however their tensors are tiled."""
        return tuple(codec for codec in CODECS if self.cuts == {} or codec not in NEED_WEIGHTS)

    @cached_property
    def cuts(self) -> Cuts | None:
        """Where tiles must end for deltas that are read against these weights; None where none can be."""
        return cuts_of(self.live)

    def find_version(self) -> None:
        """Find the version of a worker that is the only one, by its digests. It is at none when it holds a tensor twice
        and differently. Raises EngineUnsupported when it does not hold the whole model."""
        self.coverage = Coverage(self.live.sizes, [self.live.parts], self.live.placement.computed, self.frozen)
        digests, differing = self.coverage.digests([self.digests])
        root = root_of(self.live.table.values(), digests)
        self.position, self.joined = None if differing else self.subscriber.position_of(root), True

    def wrote(self, plan: Plan) -> None:
        """The plan's bits are in place: stand where it leads, and keep what was before until `confirm`."""
        self.undo = Undo(plan, self.digests, self.position)
        self.subscriber.keep(plan.way)
        self.digests, self.position, self.joined = plan.digests, plan.after, True

    def confirm(self) -> None:
        """Forget what the last update replaced."""
        self.undo = None

    def take_back(self) -> bool:
        """Put back what the last update replaced; False when it was confirmed, or there was none."""
        if self.undo is None:
            return False
        undo, self.undo = self.undo, None
        self.digests, self.position = undo.digests, undo.position
        writes.undo(undo.plan.writes)
        return True

    def forget_version(self) -> None:
        """Stand at no version: these weights are not what was thought."""
        self.position = self.undo = None

    def is_sound(self) -> bool:
        """Whether all of memory is what the last update left there, and what the server makes of it too."""
        return self.live.digests() == self.digests and all(one.is_current() for one in self.live.remade())

    def drifted(self, names: Iterable[str]) -> list[str]:
        """Which of these tensors hold something else than the last update left there."""
        return [name for name, value in self.live.digests(names).items() if value != self.digests[name]]

    def plan(self, version: int) -> Plan:
        """The plan that leads to a version, newer or older, from where these weights are. It starts from an anchor when
        they are at no version, or at one that the chain no longer has. It is compared with its commit, unless other
        workers hold the rest.

        Raises BucketError, FormatError, ChainError; WrongBase for live weights that drifted, BadDigest for a change
        that does not lead where its commit says.
        """
        since = self.position
        try:
            plan = staging.stage(self.live, self.digests, self.subscriber, since, version)
        except (Gap, Forked):
            if since is None:
                raise
            plan = staging.stage(self.live, self.digests, self.subscriber, None, version)
        except WrongBase as error:
            if self.drifted(self.live.table):
                raise
            raise BadDigest(f"{error}; and yet they are those of {since}: it does not lead on from there") from None
        try:
            self._require_promised(plan)
        except BadDigest:
            if self.subscriber.pass_over(plan.way):
                return self.plan(version)
            raise
        return plan

    def require_written(self, plan: Plan) -> None:
        """After an anchor read every weight back: no earlier digest vouches for the rest of the memory. Raises
        WrongBase, with the old weights put back."""
        if plan.since is not None:
            return
        digests = self.live.digests()
        if wrong := [name for name, value in plan.digests.items() if digests[name] != value]:
            writes.undo(plan.writes)
            raise WrongBase(f"{plan.after}: {len(wrong)} tensors read back wrong ({some(wrong)}); put back")

    def audit(self) -> Audited:
        """Recompute every digest from live memory. `promised` are those of the version that these weights should be, or
        of the newest. `drifted` names what changed since the last update."""
        digests = self.live.digests()
        stale = [transform for transform in self.live.remade() if not transform.is_current()]
        drifted = [
            name
            for name in self.live.table
            if digests[name] != self.digests[name] or any(one in stale for one in self.live.transforms.get(name, ()))
        ]
        version = self.position.version if self.position else self.subscriber.latest().version
        return Audited(
            digests=as_hex(digests),
            sizes=self.live.sizes,
            parts=self.live.parts,
            frozen=whole_as_hex(self.frozen),
            position=self.position,
            promised=whole_as_hex(self.subscriber.digests_at(version)),
            drifted=drifted,
        )

    def held_parts(self) -> HeldParts:
        """Which parts of which tensors these are, and the digest of each as the last update left it."""
        digests, frozen = as_hex(self.digests), whole_as_hex(self.frozen)
        return HeldParts(digests=digests, sizes=self.live.sizes, parts=self.live.parts, frozen=frozen)

    def digested(self, staged: Plan | None) -> Digested:
        """The digest of every part after what is staged, or as it is when nothing has to be done."""
        return Digested(as_hex(staged.digests if staged else self.digests))

    def _require_promised(self, plan: Plan) -> None:
        if self.coverage is None:
            return
        digests, differing = self.coverage.digests([plan.digests])
        if not differing and root_of(self.live.table.values(), digests) == plan.after.root:
            return
        promised = self.subscriber.digests_at(plan.after.version)
        wrong = [name for name, value in promised.items() if digests[name] != value or name in differing]
        raise disagreement(plan.after, wrong, self.drifted(wrong))


def attach(
    url: str,
    subscriber: Subscriber,
    model: torch.nn.Module,
    loading: AfterLoading,
    *,
    between_passes: BetweenPasses = at_once,
    accelerators: Accelerators | None = None,
) -> Attached:
    """Put a worker's weights beside the run that a bucket's HEAD names, at no version yet; `url` asked for it.
    `between_passes` does what must not meet a forward pass. The model's tensors are on the `accelerators`, or the host.

    Raises BucketError, FormatError, ChainError; EngineUnsupported for a model that cannot be patched.
    """
    table = subscriber.run.table
    live = LiveWeights(model, table, loading=loading, between_passes=between_passes, accelerators=accelerators)
    absent = live.absent
    committed = subscriber.digests_at(subscriber.latest().version) if absent else {}
    return Attached(url, subscriber, live, None, live.digests(), {name: committed[name] for name in absent})


def whole_as_hex(digests: Mapping[str, int]) -> dict[str, str]:
    """Digests of whole tensors as they travel in JSON."""
    return {name: f"{value:016x}" for name, value in digests.items()}


def as_hex(digests: PartDigests) -> dict[str, list[str]]:
    """Digests as they travel in JSON."""
    return {name: [f"{value:016x}" for value in values] for name, values in digests.items()}
