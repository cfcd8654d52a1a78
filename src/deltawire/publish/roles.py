"""Opening a publisher: who captures and who sends in this process, and where the run stands."""

import os
import socket
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from deltawire.buckets.base import Bucket
from deltawire.buckets.wrappers import Typed
from deltawire.errors import NotFound
from deltawire.publish import resuming
from deltawire.publish.capture import WholeCapturer
from deltawire.publish.capturer import CaptureOptions, Capturer
from deltawire.publish.current_run import require_signer
from deltawire.publish.resuming import RunState
from deltawire.publish.sender import Sender, SoloSender
from deltawire.publish.sharded.capture import ShardCapturer
from deltawire.publish.sharded.ranks import Ranks
from deltawire.publish.sharded.senders import LeadSender, RankSender
from deltawire.runlog import signing
from deltawire.runlog.signing import SigningKey


@dataclass(frozen=True, slots=True)
class Keys:
    """Files of keys: the one that signs every record, and public ones that may sign folds and anchors."""

    signing_key: str | Path | None
    compactors: tuple[str | Path, ...]


@dataclass(frozen=True, slots=True)
class Roles:
    """What a publisher is made of. `before` is what a continued run looked like; None for a run that begins. `leads`
    says whether this process makes the commits."""

    capturer: Capturer
    sender: Sender
    before: RunState | None
    leads: bool


@dataclass(frozen=True, slots=True)
class _ReadKeys:
    signing_key: SigningKey | None
    delegates: tuple[str, ...]


def open_roles(
    bucket: Bucket, options: CaptureOptions, keys: Keys, spool: Path, process_group: Any, *, must_resume: bool
) -> Roles:
    """Find where the bucket stands, and settle who captures and who sends. Files of an anchor go to the folder `spool`.

    Raises NotFound for a bucket without a run where one is required; BadSignature for a run of another key; what a
    capturer raises on opening.
    """
    ranks = Ranks(process_group) if process_group is not None else None
    read: list[_ReadKeys] = []  # the private key stays on rank 0

    def read_keys() -> tuple[str, ...]:
        read.append(_read(bucket, keys, supersede=options.supersede))
        return read[0].delegates

    delegates = read_keys() if ranks is None else ranks.from_first(read_keys)
    options = replace(options, compactors=delegates)
    capturer: Capturer
    capturer = WholeCapturer(bucket, spool, options) if ranks is None else ShardCapturer(bucket, ranks, options)
    before = _before(bucket, capturer, ranks, must_resume=must_resume)
    sender = sender_of(Typed(bucket), ranks, read[0].signing_key if read else None)
    return Roles(capturer, sender, before, leads=ranks is None or ranks.rank == 0)


def sender_of(bucket: Bucket, ranks: Ranks | None, key: SigningKey | None) -> Sender:
    """What makes versions durable in this process: it alone, or its rank's part. Commits name it by host and pid;
    `key` signs them."""
    writer = f"{socket.gethostname()} pid {os.getpid()}"
    if ranks is None:
        return SoloSender(bucket, writer=writer, key=key)
    return LeadSender(bucket, ranks, writer=writer, key=key) if ranks.rank == 0 else RankSender(bucket, ranks)


def _read(bucket: Bucket, keys: Keys, *, supersede: bool) -> _ReadKeys:
    key = signing.read_key(keys.signing_key) if keys.signing_key is not None else None
    if not supersede:
        require_signer(bucket, key.public if key is not None else None)
    return _ReadKeys(key, tuple(sorted(signing.trust(keys.compactors).keys)))


def _before(bucket: Bucket, capturer: Capturer, ranks: Ranks | None, *, must_resume: bool) -> RunState | None:
    """What the continued run looked like. Raises NotFound where one was required."""
    if capturer.resumed is None:
        if must_resume:
            raise NotFound(
                f'{bucket.url} holds no run, and resume="require" asks for one: check the address, or begin '
                "a run without it"
            )
        return None
    look = partial(resuming.run_state, bucket, capturer.resumed.position)
    return look() if ranks is None else ranks.from_first(look)
