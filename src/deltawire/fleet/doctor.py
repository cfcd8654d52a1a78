"""What is wrong between a bucket, this host and an engine, and the fix of each: one small check per thing.

A check yields findings and raises nothing that a store or a server may say. It writes one object to the bucket and
removes it; it changes nothing in an engine.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from deltawire.buckets.base import Bucket
from deltawire.fleet import doctor_bucket
from deltawire.fleet.findings import Finding


def examine(
    bucket: Bucket,
    engine_url: str | None = None,
    *,
    run: str | None = None,
    trusted: Iterable[str | Path] = (),
    read_only: bool = False,
) -> Iterator[Finding]:
    """Every finding, as each check ends. `run` is the run that is meant; `trusted` are public keys, or files of them;
    `read_only` says that this host only follows. Without `engine_url` no engine is looked at."""
    yield from doctor_bucket.rights(bucket, read_only=read_only)
    yield from doctor_bucket.records(bucket, run=run, trusted=trusted)
    if engine_url is not None:
        from deltawire.fleet import doctor_engine

        yield from doctor_engine.engine(bucket, engine_url)
