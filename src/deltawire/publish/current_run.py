"""What a bucket holds when a publisher opens it: which run, where it stands, and whose key signed it."""

from pathlib import Path

from deltawire.buckets.base import Bucket
from deltawire.errors import BadDigest, BadSignature, NotFound
from deltawire.publish.baseline import Baseline, Own
from deltawire.publish.sender import Tip
from deltawire.read.subscriber import Subscriber
from deltawire.runlog import log
from deltawire.runlog.chain import Chain
from deltawire.runlog.records import Position
from deltawire.weights.digest import root as root_of

LOOKS = 3
"""times a trainer looks for the newest commit before it continues from it"""


def holds_run(bucket: Bucket) -> bool:
    """Whether anything is published."""
    try:
        log.current_run(bucket)
    except NotFound:
        return False
    return True


def require_signer(bucket: Bucket, signer: str | None) -> None:
    """Raise BadSignature when the run that is there began with a key, and `signer`, a public key, is another or none.

    Every reader who trusts that key would refuse what is committed then.
    """
    try:
        run = log.read_run(bucket, log.current_run(bucket))
    except NotFound:
        return
    if run.signer not in (None, signer):
        ours = "no signing_key was given" if signer is None else f"signing_key= is {signer[:16]}…"
        raise BadSignature(
            f"{bucket.url}: run {run.run} is signed by {run.signer[:16]}…, and {ours}: followers that --trust that key "
            'would be left behind. Give its file to Publisher(signing_key=…); Publisher(run="supersede") begins a new '
            "run without it"
        )


def near_base(base: str | Path | None) -> str | Path | None:
    """The base checkpoint where it is a folder on this host."""
    return base if base is not None and Path(base).is_dir() else None


def newest(bucket: Bucket) -> Position | None:
    """Where the bucket's run stands; None while nothing is published."""
    with Subscriber(bucket) as subscriber:
        try:
            return subscriber.chain.settled(subscriber.latest().version).record.position
        except NotFound:
            return None


def newest_of(subscriber: Subscriber) -> Position:
    """The newest committed position, by looks that share nothing: one may be stale, or damaged on its way.

    A trainer that took an older version for the newest would commit beside it.
    """
    looks = [subscriber.latest()]
    for _ in range(LOOKS - 1):
        again = Chain(subscriber.bucket, subscriber.chain.filed, subscriber.trust)
        looks.append(again.newest(log.hinted(subscriber.bucket)).record.position)
    return max(looks, key=lambda position: position.version)


def tip_at(subscriber: Subscriber, position: Position) -> Tip:
    """A committed position, with the hash that the next commit names."""
    return Tip(position, subscriber.chain.settled(position.version).hash)


def weights_at(subscriber: Subscriber, position: Position, own: Own) -> Baseline:
    """The weights at a committed position, checked, where `own` puts them. Raises BadDigest, and what a reader
    raises."""
    table = subscriber.run.table
    while True:
        change = subscriber.change(None, position.version)
        assert change.anchor is not None
        baseline = Baseline.of({entry.name: change.anchor[entry.name] for entry in table}, own)
        for name, tensor in change.delta.items():
            baseline.advance(name, tensor)
        if root_of(table, baseline.digests) == position.root:
            return baseline
        if subscriber.pass_over(change):
            continue
        subscriber.digests_at(position.version)  # says so if it is the record that is damaged
        raise BadDigest(f"{subscriber.bucket.url}: what was fetched of {position} is not what was committed; try again")
