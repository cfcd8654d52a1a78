"""Whether a bucket holds what its commits promise: every delta, fold and anchor of its run, read and recomputed."""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from deltawire import checkpoint
from deltawire.buckets.base import Bucket
from deltawire.checkpoint import Checkpoint
from deltawire.digest import digest_bits
from deltawire.digest import root as root_of
from deltawire.errors import BadDigest
from deltawire.manifests import Run
from deltawire.paths import Edge
from deltawire.reports import VerifyReport
from deltawire.subscriber import Subscriber


def verify(
    bucket: Bucket,
    *,
    base: Path | str | None = None,
    trusted: Iterable[str | Path] = (),
    on_read: Callable[[Edge, int], None] = lambda edge, total: None,
) -> VerifyReport:
    """Read all that the bucket's run holds, from its oldest anchor to its newest commit, and recompute every digest.

    The deltas are applied one after another to a copy of that anchor. Each must lead to the digests its commit
    promises, each fold lead back to those of the version it starts from, each anchor have those of its own; in the end
    all weights are digested anew. Takes the model's size in temporary files, twice, and the memory of one delta.

    `trusted` are public keys, or files of them, one of which must have signed every record. `on_read` hears of each
    delta, fold and anchor, and of how many there are.

    Raises BadDigest, naming the first record that is wrong, and what Subscriber.updates raises.
    """
    started, read = time.monotonic(), Counter[str]()
    with (
        Subscriber(bucket, base=base, trusted=trusted) as subscriber,
        tempfile.TemporaryDirectory(prefix="deltawire-", ignore_cleanup_errors=True) as folder,
    ):
        commits = subscriber.commits()
        edges = _in_order(subscriber.chain.edges(), commits[0].version, commits[-1].version)
        checkpoint.copy(subscriber.anchor_files(commits[0].version), Path(folder))
        weights = Checkpoint(Path(folder), writable=True)
        digests = _digests(weights, subscriber.run)
        for edge in edges:
            ((_, filed),) = subscriber.chain.read([edge])
            if edge.start is None:
                _require(subscriber, _digests(subscriber.open_anchor(filed.record), subscriber.run), edge.end, edge)
                subscriber.close()  # its files are as large as the model
            elif _kind(edge) == "delta":
                delta = subscriber.fetch_delta(filed.record)
                digests = delta.digests_after(digests, weights)
                _require(subscriber, digests, edge.end, edge)
                delta.apply_(weights)
            else:
                back = -subscriber.fetch_delta(filed.record)
                _require(subscriber, back.digests_after(digests, weights), edge.start, edge)
            read.update({_kind(edge): 1, "bytes": filed.record.wire_bytes})
            on_read(edge, len(edges))
        weights.require_digests(digests, where=str(commits[-1].position))
    return VerifyReport(
        position=commits[-1].position,
        first=commits[0].version,
        anchors=read["anchor"],
        deltas=read["delta"],
        folds=read["fold"],
        fetched_bytes=read["bytes"],
        seconds=time.monotonic() - started,
    )


def _in_order(edges: Iterable[Edge], first: int, last: int) -> list[Edge]:
    """What lies on the chain, by where it ends: the delta that leads there before the folds and anchors made of it."""
    kinds = ["delta", "fold", "anchor"]
    here = [edge for edge in edges if edge.end <= last and (edge.end if edge.start is None else edge.start) >= first]
    return sorted(here, key=lambda edge: (edge.end, kinds.index(_kind(edge))))


def _kind(edge: Edge) -> str:
    if edge.start is None:
        return "anchor"
    return "delta" if "/commits/" in edge.record else "fold"


def _digests(weights: Checkpoint, run: Run) -> dict[str, int]:
    return {entry.name: digest_bits(weights[entry.name].data) for entry in run.table}


def _require(subscriber: Subscriber, digests: Mapping[str, int], version: int, edge: Edge) -> None:
    """Raise BadDigest unless these are the digests of a version."""
    if root_of(subscriber.run.table, digests) == subscriber.chain.commit(version).record.root:
        return
    wrong = [name for name, value in subscriber.digests_at(version).items() if digests[name] != value]
    where = f"{subscriber.bucket.url}/{edge.record}"
    what = f"this {_kind(edge)} does not join version {version} as it was committed"
    raise BadDigest(f"{where}: {what}: {len(wrong)} tensors differ ({', '.join(wrong[:5])})")
