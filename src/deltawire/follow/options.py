"""How a bucket is followed: one record of options, whatever serves the versions."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltawire.follow.engine import PauseMode
from deltawire.follow.news import News


def _nothing(_: object) -> None:
    """Hear nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowOptions:
    """What every follower takes.

    `poll` is seconds between looks at the bucket, by default what suits the store. `pin` holds the server at a version,
    older or newer, instead of the newest: how a bad policy is withdrawn. `base` is a folder on the server's host with
    the base checkpoint, for runs that start from one by reference.

    `trusted` are public keys, or files of them: then only records that they signed are followed. `state` is a file, or
    a folder of such, that remembers the newest signed version across restarts. Going back then takes `pin`, and another
    run raises RolledBack unless it continues the one seen. By default it is in this user's state folder for a server,
    and nowhere for a model in this process. `forget_state` forgets it. `run` names the only run that is followed,
    beside those that continue it.

    `replica` names the entry under `replicas/` that says, to others and to retention, what the server serves and needs.
    `on_update` hears each update's report, and `on_problem` what stands in the way. `on_news` hears what is waited for
    and fetched, and when the server is current without an update. `clock` is the time of day, in seconds since the
    epoch.

    An engine whose live weights are patched takes five more; an adapter's follower does not use them. `pause` says
    what becomes of requests in flight during an update: "keep" holds them where they are, "wait" lets them finish
    first, "abort" ends them. `clear_cache` drops the prefix cache and recomputes running requests, so that no token is
    sampled from mixed versions; False keeps both and pauses shorter. Every `audit_every` updates all of live memory is
    digested (0: never) while the server generates. With `pass_endpoint` the workers receive where the bucket's store is
    (HF_ENDPOINT, AWS_ENDPOINT_URL, the region …) as this process's environment says; never a token or key. `take_over`
    drives the server even if another follower does.
    """

    poll: float | None = None
    pin: int | None = None
    base: Path | str | None = None
    trusted: Iterable[str | Path] = ()
    state: Path | str | None = None
    run: str | None = None
    forget_state: bool = False
    replica: str | None = None
    on_update: Callable[[Any], None] = _nothing
    on_problem: Callable[[Exception], None] = _nothing
    on_news: Callable[[News], None] = _nothing
    clock: Callable[[], float] = time.time
    pause: PauseMode = "keep"
    clear_cache: bool = True
    audit_every: int = 100
    pass_endpoint: bool = False
    take_over: bool = False

    def changed(self, **keywords: Any) -> "FollowOptions":
        """The same, with these options in place of its own. Raises TypeError for what is not an option."""
        return replace(self, **keywords)
