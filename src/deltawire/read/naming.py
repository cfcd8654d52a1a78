"""Which version people mean: a number, `newest`, a tag, or the best by a metric; and how a version gets a tag."""

import re
import secrets

from deltawire.errors import FormatError, Gap, NotFound, WrongBase
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.pruning import announced
from deltawire.runlog.records import Commit, Position
from deltawire.runlog.signing import SigningKey
from deltawire.runlog.tags import TagReport, delete_tag, read_tag, read_tags, write_tag

DIGITS = 16
"""of the largest version"""
_NUMBER = re.compile(f"[0-9]{{1,{DIGITS}}}")
BEST = "best:"
"""`best:reward` is the version of the highest reward; `best:-loss` that of the lowest loss"""


def version_named(subscriber: Subscriber, text: str) -> int:
    """The committed version that a word stands for, as the bucket stands now.

    Raises NotFound for a tag or a metric that is not there, Gap for a version that is not, WrongBase for a tag of
    other weights than its version has; BadSignature for a tag that no trusted key signed.
    """
    if (number := number_in(text)) is not None:
        return subscriber.position_at(number).version
    if text == "newest":
        return subscriber.latest().version
    if text.startswith(BEST):
        return best(subscriber.commits(), text.removeprefix(BEST)).version
    return _tagged(subscriber, text)


def number_in(text: str) -> int | None:
    """The version that a word of digits alone says; None for another word. Raises FormatError for too many digits."""
    if not text.isdecimal():
        return None
    if not _NUMBER.fullmatch(text):
        raise FormatError(f"{text[:DIGITS]!r}… is no version: a version has at most {DIGITS} digits, 0 to 9")
    return int(text)


def name_version(
    subscriber: Subscriber, text: str, name: str, *, move: bool = False, key: SigningKey | None = None
) -> TagReport:
    """Give a version a tag, so that `prune` keeps it; `text` is as for `version_named`, `move` and `key` as for
    `write_tag`.

    Raises what those raise; Gap where a prune removes the version meanwhile, and then nothing has changed: the tag is
    not there, or, with `move`, names what it named.
    """
    position = subscriber.position_at(version_named(subscriber, text))
    if not move:
        return _hold(subscriber, position, name, key)
    guard = f"{name[:80]}.moving-{secrets.token_hex(4)}"  # keeps the version while the tag still keeps the other one
    _hold(subscriber, position, guard, key)
    try:
        return write_tag(subscriber.bucket, position, name, move=True, key=key)
    finally:
        delete_tag(subscriber.bucket, position.run, guard)


def _hold(subscriber: Subscriber, position: Position, name: str, key: SigningKey | None) -> TagReport:
    """Write a tag, then see that no prune takes its version: one that begins later sees the tag. Raises Gap, and then
    the tag is not there, unless it was before."""
    bucket = subscriber.bucket
    report = write_tag(bucket, position, name, key=key)
    subscriber.refresh()
    try:
        under_way = announced(bucket, position.run)
        subscriber.position_at(position.version)
        if under_way is not None and under_way.takes(position.version):
            raise Gap(
                f"{bucket.url}: a prune takes version {position.version}, or was interrupted while it did: run "
                "`deltawire prune --delete` again, then name a version that is still there"
            )
    except Gap:
        if report.before is None:
            delete_tag(bucket, position.run, name)
        raise
    return report


def best(commits: list[Commit], metric: str) -> Commit:
    """The commit with the highest value of a metric, or with `-` before its name the lowest; of equals the newest.

    Raises NotFound where no commit has that metric; it names those that are there.
    """
    sign, name = (-1.0, metric[1:]) if metric.startswith("-") else (1.0, metric)
    scored = [
        (sign * value, commit.version, commit) for commit in commits if (value := commit.metrics.get(name)) is not None
    ]
    if not scored:
        there = ", ".join(sorted({name for commit in commits for name in commit.metrics})) or "none"
        raise NotFound(f"no version of run {commits[0].run} has the metric {name!r}; there are: {there}")
    return max(scored, key=lambda item: item[:2])[2]


def _tagged(subscriber: Subscriber, name: str) -> int:
    bucket, run = subscriber.bucket, subscriber.run.run
    try:
        tag = read_tag(bucket, run, name, trust=subscriber.trust)
    except NotFound:
        there = ", ".join(tag.name for tag in read_tags(bucket, run)) or "none"
        raise NotFound(f"{bucket.url}: run {run} has no tag {name!r}; tags there: {there}") from None
    try:
        position = subscriber.position_at(tag.version)
    except Gap as error:
        raise Gap(f"tag {name}: {error}") from None
    if position.root != tag.root:
        raise WrongBase(f"{bucket.url}: tag {name} names version {tag.version} with other weights than are there")
    return tag.version
