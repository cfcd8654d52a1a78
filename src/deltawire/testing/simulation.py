"""Any history by its seed: a trainer, a compactor, a pruner and followers over a failing store, on a clock of its own.

There is no thread and no sleep. At every operation on the store the seed decides what happens: nothing, a fault, the
death of who asked, or that another takes a whole step of its own first. So a failing run is replayed exactly:

    python -m deltawire.testing.simulation SEED

prints each operation, and what went wrong.
"""

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from deltawire.buckets.base import Bucket
from deltawire.buckets.faulty import Call, Fault, Faulty, Kind
from deltawire.errors import BrokenInvariant, ChainError, DeltaWireError
from deltawire.runlog.keys import REPLICAS
from deltawire.testing.observed import Crash, Observed
from deltawire.testing.store import Clock, MemoryStore
from deltawire.testing.world import World
from deltawire.upkeep.retention import Policy

PUBLISHED = ("gap", "class", "subset")
"""codecs; a seed has one"""
STEPS = 60
"""steps of one history, without those that others take in the middle of them"""
DEPTH = 2
"""how many may stand in the middle of a step at once"""
SHARE = {"trainer": 5, "compactor": 2, "pruner": 2}
"""steps of each for one of anyone else"""
READ: tuple[Kind, ...] = ("fail before", "throttle", "truncate", "flip", "delay")
WRITTEN: tuple[Kind, ...] = ("fail before", "fail after", "throttle", "delay")
FITTING: dict[str, tuple[Kind, ...]] = {
    "get": READ,
    "get_file": READ,
    "stat": ("fail before", "throttle", "delay"),
    "list": ("fail before", "throttle", "delay"),
    "put": WRITTEN,
    "put_new": WRITTEN,
    "delete": ("fail before", "fail after", "throttle"),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one history went. `trace` is a line for each operation and step; `problem` what broke, None where nothing
    did."""

    seed: int
    trace: tuple[str, ...]
    problem: str | None

    @property
    def digest(self) -> str:
        """A hash of the trace: equal for equal histories."""
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()


class Simulation:
    """One history. `run` gives its outcome."""

    def __init__(self, seed: int, folder: Path, *, steps: int = STEPS) -> None:
        self.seed, self._steps, self._trace = seed, steps, list[str]()
        self._draw, self._clock = Random(seed), Clock()
        self._rate = self._draw.choice([0.0, 0.01, 0.05, 0.1])
        self._deaths = self._draw.choice([0.0, 0.005, 0.02, 0.05])
        self._others = self._draw.choice([0.0, 0.02, 0.1])
        self._at_work: list[str] = []
        self._calm = True
        store = MemoryStore(clock=self._clock)
        self.world = World(
            store,
            folder,
            draw=self._draw,
            clock=self._clock,
            through=self._way,
            followers=self._draw.randrange(1, 4),
            codec=PUBLISHED[seed % len(PUBLISHED)],
        )
        trainer = self.world.trainer
        self._actors: dict[str, tuple[Callable[[], None], ...]] = {
            "trainer": (
                trainer.publish,
                trainer.upload,
                trainer.flush,
                trainer.flush,
                trainer.break_off,
                self._restart,
            ),
            "compactor": (self._compact,),
            "pruner": (self._prune,),
            "time": (self._pass,),
            **{
                follower.name: (follower.follow, follower.follow, follower.pin, follower.materialize)
                for follower in self.world.followers
            },
        }

    def run(self) -> Outcome:
        """Play it, to the end or to the first thing that broke."""
        problem = None
        try:
            self.world.trainer.flush()
            self._calm = False
            for _ in range(self._steps):
                self._step(self._draw.choice(self._busy(self._actors)))
                self._settled(self.world.check)
            self._settled(self.world.settle)
        except (Exception, Crash) as error:
            problem = f"{type(error).__name__}: {error}"
        finally:
            self.world.close()
        return Outcome(self.seed, tuple(self._trace), problem)

    # Steps

    def _step(self, name: str) -> None:
        """One step of someone. Who dies, or hears that it is not alone, is started again."""
        verb = self._draw.choice(self._actors[name])
        self._say(f"{name} {verb.__name__.strip('_')}")
        self._at_work.append(name)
        try:
            verb()
        except Crash:
            self._say(f"{name} dies")
            self._replace(name)
        except BrokenInvariant:
            raise
        except ChainError as error:
            self._say(f"{name} {type(error).__name__}")
            self._replace(name)
        except DeltaWireError as error:
            self._say(f"{name} {type(error).__name__}")
        finally:
            self._at_work.pop()

    def _busy(self, names: Iterable[str]) -> list[str]:
        """Each name as often as its share of the steps."""
        return [name for name in names for _ in range(SHARE.get(name, 1))]

    def _replace(self, name: str) -> None:
        if name == "trainer":
            self.world.trainer.kill()
        elif name == "compactor":
            self.world.stop_compactor()

    def _restart(self) -> None:
        self.world.trainer.kill()
        self.world.trainer.start(supersede=self._draw.random() < 0.2)

    def _compact(self) -> None:
        self.world.compact(anchors=self._draw.choice([2, 4, 9]))

    def _prune(self) -> None:
        self.world.prune(Policy(self._draw.randrange(1, 3), self._draw.choice([-1.0, -1.0, 0.01])))

    def _pass(self) -> None:
        """Hours in which nobody does anything: who stood somewhere is silent by then."""
        self._clock.sleep(self._draw.choice([60.0, 7200.0]))

    def _settled(self, what: Callable[[], None]) -> None:
        """Do something with a store that is well."""
        self._calm = True
        what()
        self._calm = False

    # What happens at an operation

    def _way(self, name: str, bucket: Bucket) -> Bucket:
        faulty = Faulty(bucket, self._fault, sleep=self._clock.sleep)
        return Observed(faulty, lambda moment, verb, key: self._visit(name, moment, verb, key))

    def _fault(self, call: Call) -> Fault | None:
        if self._calm or self._draw.random() >= self._rate:
            return None
        kinds = FITTING[call.verb]
        if call.key.startswith(REPLICAS):
            kinds = tuple(kind for kind in kinds if kind != "flip")  # a heartbeat has no hash that would tell
        fault = Fault(self._draw.choice(kinds), self._draw.expovariate(0.1))
        self._say(f"  {fault.kind}")
        return fault

    def _visit(self, name: str, moment: str, verb: str, key: str) -> None:
        if moment == "before":
            self._say(f"  {name} {verb} {key}")
        if self._calm:
            return
        self._clock.sleep(self._draw.expovariate(2.0))
        if self._draw.random() < self._deaths:
            raise Crash(f"{name} {moment} {verb} {key}")
        idle = self._busy(name for name in self._actors if name not in self._at_work)
        if len(self._at_work) <= DEPTH and idle and self._draw.random() < self._others:
            self._step(self._draw.choice(idle))

    def _say(self, line: str) -> None:
        self._trace.append(f"{self._clock() - 1.8e9:10.2f} {'    ' * len(self._at_work)}{line}")


def play(seed: int, *, steps: int = STEPS) -> Outcome:
    """The history of a seed, in a folder that is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="deltawire-"))
    try:
        return Simulation(seed, folder, steps=steps).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(arguments: list[str]) -> int:
    """Replay seeds, and print their histories."""
    for seed in map(int, arguments):
        outcome = play(seed)
        print(*outcome.trace, sep="\n")  # noqa: T201
        print(f"seed {seed}: {outcome.problem or 'nothing broke'} ({outcome.digest[:16]})")  # noqa: T201
        if outcome.problem:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
