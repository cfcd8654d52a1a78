"""A Hypothesis state machine: publish, fail, restart, fold, compact, anchor, prune, follow, pin and kill in any order.

A store proves itself with it: its test file names the bucket, and is done.

```python
class MyStore(BucketMachine):
    def make_bucket(self, folder):
        return MyBucket(folder)

TestMyStore = MyStore.TestCase
```
Needs hypothesis. A failure is shrunk to the fewest steps, and printed as a program of them.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

try:
    from hypothesis import strategies as st
    from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
except ImportError:
    raise ImportError("the state machine needs hypothesis: pip install hypothesis") from None

from deltawire.buckets.base import Bucket
from deltawire.errors import BrokenInvariant, ChainError, DeltaWireError, Unavailable
from deltawire.testing.observed import Crash, Observed
from deltawire.testing.store import Clock
from deltawire.testing.world import World
from deltawire.upkeep.retention import Policy

FOLLOWERS = 2
LEVELS = (2, 4, 8)
KINDS = st.sampled_from(["fail before", "fail after", "kill before", "kill after"])


class BucketMachine(RuleBasedStateMachine):
    """A subclass gives `make_bucket`, and `TestCase` of it is the test."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = Path(tempfile.mkdtemp(prefix="deltawire-"))
        self._left: int | None = None
        self._kind = ""

    def make_bucket(self, folder: Path) -> Bucket:
        """An empty bucket; `folder` is this run's own."""
        raise NotImplementedError("a subclass of BucketMachine gives `make_bucket`")

    @initialize(seed=st.integers(0, 2**32 - 1), codec=st.sampled_from(["subset", "class"]))
    def open(self, seed: int, codec: str) -> None:
        """A first version is there: a bucket without one has nothing to follow."""
        self.world = World(
            self.make_bucket(self._folder),
            self._folder,
            draw=Random(seed),
            clock=Clock(),
            through=lambda name, bucket: Observed(bucket, self._visit),
            followers=FOLLOWERS,
            codec=codec,
        )
        self.world.trainer.flush()

    def teardown(self) -> None:
        """At the end all goes well, and everyone arrives."""
        self._left = None
        try:
            if hasattr(self, "world"):
                self.world.settle()
        finally:
            if hasattr(self, "world"):
                self.world.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    # The trainer

    @rule(times=st.integers(1, 3))
    def publish(self, times: int) -> None:
        """Several versions before one upload fold into one."""
        for _ in range(times):
            self._try(self.world.trainer.publish)

    @rule()
    def break_off(self) -> None:
        self._try(self.world.trainer.break_off)

    @rule()
    def upload(self) -> None:
        self._try(self.world.trainer.upload)

    @rule(supersede=st.booleans())
    def restart(self, supersede: bool) -> None:
        self.world.trainer.kill()
        self._try(lambda: self.world.trainer.start(supersede=supersede))
        self._try(self.world.trainer.publish)

    # Everyone else

    @rule(anchors=st.sampled_from([2, 4, 100]))
    def compact(self, anchors: int) -> None:
        """Folds, and an anchor every so many versions."""
        self._try(lambda: self.world.compact(LEVELS, anchors))

    @rule(anchors=st.integers(1, 2), hours=st.sampled_from([-1.0, 24.0]))
    def prune(self, anchors: int, hours: float) -> None:
        self._try(lambda: self.world.prune(Policy(anchors, hours)))

    @rule(number=st.integers(0, FOLLOWERS - 1))
    def follow(self, number: int) -> None:
        self._try(self.world.followers[number].follow)

    @rule(number=st.integers(0, FOLLOWERS - 1))
    def pin(self, number: int) -> None:
        self._try(self.world.followers[number].pin)

    @rule(number=st.integers(0, FOLLOWERS - 1))
    def materialize(self, number: int) -> None:
        self._try(self.world.followers[number].materialize)

    # What goes wrong

    @rule(operations=st.integers(0, 12), kind=KINDS)
    def fail(self, operations: int, kind: str) -> None:
        """The store fails, or kills who asks it, after so many operations more."""
        self._left, self._kind = operations, kind

    @rule(operations=st.integers(0, 5), kind=KINDS)
    def fail_an_upload(self, operations: int, kind: str) -> None:
        """The same, to a trainer that uploads."""
        self._try(self.world.trainer.publish)
        self.fail(operations, kind)
        self._try(self.world.trainer.upload)

    @invariant()
    def all_is_well(self) -> None:
        """Whatever went wrong, every invariant holds."""
        if hasattr(self, "world"):
            self.world.check()

    def _visit(self, moment: str, verb: str, key: str) -> None:
        if self._left is None or not self._kind.endswith(moment):
            return
        self._left -= 1
        if self._left >= 0:
            return
        self._left = None
        if self._kind.startswith("kill"):
            raise Crash(f"{moment} {verb} {key}")
        raise Unavailable(f"{verb} {key}: the store fails {moment} it is done")

    def _try(self, step: Callable[[], None]) -> None:
        """A step that may fail as the store does. What is killed, or hears of another writer, is started again."""
        try:
            step()
        except BrokenInvariant:
            raise
        except (Crash, ChainError):
            self.world.trainer.kill()
            self.world.stop_compactor()
        except DeltaWireError:
            pass
