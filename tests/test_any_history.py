"""Any history of a bucket that others may write to: kills, damage, lies and second writers, and what is read is right.

What a reader cannot do without stays whole: commits, their deltas, and the anchor that a chain begins at. All else is
deleted, damaged, exchanged and forged, by the seed.
"""

import shutil
import threading
from contextlib import suppress

import msgspec
import pytest
from blake3 import blake3
from runs import PATIENCE, edit, fresh, served

from deltawire import Publisher, Subscriber, digest
from deltawire.buckets.faulty import Faulty
from deltawire.errors import ApplyError, Forked, FormatError, NotFound
from deltawire.format.checkpoint import Checkpoint
from deltawire.runlog import log
from deltawire.runlog.keys import HEAD_KEY, commit_key, derived_key, way_key
from deltawire.runlog.records import Derived, Head, Link, Payload, Way, write
from deltawire.upkeep import retention
from deltawire.upkeep.compactor import Compactor
from deltawire.weights.digest import root as root_of
from deltawire.weights.tensors import equal
from test_any_order import World

LIMIT = 1 << 20
pytestmark = [
    pytest.mark.usefixtures("quick_retries"),
    pytest.mark.filterwarnings("ignore:the first publish does not look like a continuation"),
]


class Killed(BaseException):
    """What ends a job at a step."""


class Store(Faulty):
    """A bucket that can stall: no write is answered before `open` is set again."""

    def __init__(self, *, fenced):
        super().__init__(fresh(), lambda call: None)
        self.open = threading.Event()
        self.open.set()
        if not fenced:
            self.conditional_writes = False

    def put(self, key, data):
        self.open.wait(PATIENCE)
        super().put(key, data)

    def put_new(self, key, data):
        self.open.wait(PATIENCE)
        super().put_new(key, data)


class History(World):
    """A world in which anyone writes."""

    def __init__(self, seed, folder):
        self.whole = {}
        super().__init__(seed, folder, Store(fenced=seed % 2 == 0))

    # The trainer

    def publish(self):
        said = {}
        for _ in range(self.draw.randrange(1, 6)):
            if self.draw.random() < 0.9:
                edit(self.weights, self.draw.randrange(10**6), share=0.03)
            said[self.publisher.publish(self.weights).version] = served(self.weights)
        self.bucket.open.set()
        run = self.publisher.flush(PATIENCE).run
        for version, key in log.list_commits(self.bucket, run):
            position = log.load_commit(self.bucket, run, version, key=key).record.position
            if version in said and position not in self.right:
                self.right[position] = said[version]

    def stall(self):
        self.bucket.open.clear()  # what is published meanwhile folds
        self.publish()

    def second(self):
        with pytest.raises(Forked, match="two trainers"), Publisher(self.bucket) as other:
            weights = {name: tensor.copy() for name, tensor in self.weights.items()}
            self.publish()
            edit(weights, 7)
            other.publish(weights)
            other.flush(PATIENCE)

    # Upkeep, which may be killed

    def compact(self):
        options = {
            "levels": self.draw.choice([(2, 4, 8), (4, 16), (3, 9)]),
            "anchors": self.draw.choice([2, 5, "never"]),
        }
        try:
            with Compactor(self.bucket, self.folder / "mirror", on_step=self.killer(), **options) as compactor:
                compactor.step()
        except Killed:
            pass

    def prune(self):
        pruned = retention.find_prunable(self.bucket, self.run(), retention.Policy(self.draw.randrange(1, 3), -1.0))
        with suppress(Killed):
            retention.carry_out(self.bucket, pruned, on_step=self.killer())

    def killer(self):
        left = [self.draw.choice([999, 999, self.draw.randrange(9)])]

        def on_step(step):
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        return on_step

    # Everyone else

    def run(self):
        with Subscriber(self.bucket) as subscriber:
            return subscriber.latest().run

    def spare(self):
        """The keys that a reader can do without."""
        run = self.run()
        keys = [stat.key for stat in self.bucket.list(f"runs/{run}/")]
        from_start = log.list_commits(self.bucket, run)[0][0] == 0
        folds = [key for key in keys if "/folds/" in key or "/derived/fold" in key]
        anchors = [key for key in keys if "/anchors/" in key or "/derived/anchor" in key]
        return folds + [key for key in anchors if from_start and "000000" not in key]

    def damage(self):
        spare = self.spare()
        for key in self.draw.sample(spare, min(len(spare), 3)):
            data = self.whole.setdefault(key, self.bucket.get(key, limit=LIMIT))
            at = self.draw.randrange(len(data) or 1)
            turned = data[:at] + bytes([data[at] ^ 1 << self.draw.randrange(8)]) + data[at + 1 :] if data else b"x"
            other = self.bucket.get(self.draw.choice(spare), limit=LIMIT)
            self.bucket.put(key, self.draw.choice([b"", b"{}", data[:at], turned, turned, other]))
            if self.draw.random() < 0.2:
                self.bucket.delete(key)
                return

    def head(self):
        run = self.run()
        version, key = self.draw.choice(log.list_commits(self.bucket, run))
        nobodys = Head("0" * 16, 3, commit_key("0" * 16, 3))
        self.bucket.put(HEAD_KEY, self.draw.choice([b"", b"{", write(Head(run, version, key)), write(nobodys)]))
        if self.draw.random() < 0.3:
            self.bucket.delete(HEAD_KEY)

    def hint(self):
        run = self.run()
        keys = [stat.key for stat in self.bucket.list(f"runs/{run}/")]
        links = []
        for _ in range(self.draw.randrange(9)):
            end = self.draw.randrange(30)
            start = self.draw.choice([None, self.draw.randrange(end + 1)])
            links.append(Link(start, end, self.draw.choice([0, 10, -5000, 1 << 40]), self.draw.choice(keys)))
        self.bucket.put(way_key(run), msgspec.json.encode(Way(run, tuple(links))))

    def lie(self):
        """A record of a fold or an anchor that could be one."""
        with Subscriber(self.bucket) as subscriber:
            chain, run = subscriber.chain, subscriber.run
            on_chain = [*chain.back(chain.newest(log.hinted(self.bucket)))]
        end = self.draw.choice(on_chain)
        start = self.draw.choice([None, *[filed for filed in on_chain if filed.record.version < end.record.version]])
        held = digest(
            self.draw.choice([weights for position, weights in self.right.items() if position.run == run.run])
        )
        names = [*held] if start is None else self.draw.sample([*held], self.draw.randrange(len(held)))
        stat = self.draw.choice([stat for stat in self.bucket.list(f"runs/{run.run}/") if ".safetensors" in stat.key])
        data = self.bucket.get(stat.key, limit=LIMIT)
        payload = Payload(stat.key.split("/", 2)[2], len(data), blake3(data).hexdigest())
        parent = None if start is None else start.record.version
        record = Derived(
            run=run.run,
            version=end.record.version,
            parent=parent,
            root=self.draw.choice([end.record.root, root_of(run.table, held)]),
            digests={name: f"{held[name]:016x}" for name in names} | self.draw.choice([{}, {}, {"foreign": "0" * 16}]),
            payloads=self.draw.choice([(), (payload,)]),
            commit_hash=self.draw.choice([end.hash, "0" * 64]),
            parent_hash=None if start is None else self.draw.choice([start.hash, None, "0" * 64]),
        )
        key = derived_key(run.run, parent, end.record.version, record.payloads)
        try:
            self.bucket.stat(key)
        except NotFound:
            self.bucket.put(key, msgspec.json.encode(record))

    # What is read

    def read(self):
        with Subscriber(self.bucket) as subscriber:
            known = [commit.position for commit in subscriber.commits()]
            for position in self.draw.sample(known, min(len(known), 4)):
                self.change(subscriber, self.draw.choice([None, *known]), position)
                self.follow(subscriber, known, position)
                assert subscriber.digests_at(position.version) == digest(self.right[position])
                assert getattr(subscriber.position_of(position.root), "root", position.root) == position.root
            there = self.draw.choice(known)
        out = self.folder / f"out-{there.run}"
        self.materialize(out, there.version)
        assert equal({name: Checkpoint(out)[name] for name in self.weights}, self.right[there])

    def change(self, subscriber, here, there):
        """As whoever keeps a copy does: a change that does not lead to the commit's digests is passed over."""
        while True:
            change = subscriber.change(here, there.version)
            assert change.position == there
            start = self.right[here] if change.anchor is None else change.anchor
            held = {name: start[name].copy() for name in self.weights}
            try:
                held = held + change.delta
                if digest(held) == subscriber.digests_at(there.version):
                    break
            except (FormatError, ApplyError):
                pass
            assert subscriber.pass_over(change)
        assert equal(held, self.right[there])

    def follow(self, subscriber, known, there):
        held = {}
        for update in subscriber.updates(until=there.version):
            assert update.position in known
            if update.anchor is not None:
                held = {name: update.anchor[name].copy() for name in self.weights}
            else:
                update.delta.apply_(held)
            assert update.digests == digest(held)
            assert equal(held, self.right[update.position])
        assert update.position == there


ACTIONS = (
    "publish",
    "stall",
    "restart",
    "second",
    "compact",
    "compact",
    "prune",
    "damage",
    "head",
    "hint",
    "lie",
    "read",
)


def play(seed, folder, steps):
    history = History(seed, folder)
    try:
        for _ in range(steps):
            getattr(history, history.draw.choice(ACTIONS))()
        history.read()
    finally:
        history.bucket.open.set()
        history.publisher.close(PATIENCE)


@pytest.mark.parametrize("seed", range(10))
def test_what_is_read_is_what_was_captured_whatever_others_wrote(tmp_path, seed):
    play(seed, tmp_path, 20)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_a_thousand_histories(tmp_path):
    for seed in range(100, 1100):
        play(seed, tmp_path / str(seed), 30)
        shutil.rmtree(tmp_path / str(seed))
