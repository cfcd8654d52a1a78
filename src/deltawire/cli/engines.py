"""Verbs for a vLLM server on this host: follow a bucket into its live weights, and audit them."""

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer

from deltawire.buckets import open_bucket
from deltawire.cli.options import (
    AsJson,
    BaseFolder,
    BucketOption,
    BucketWord,
    EngineUrl,
    SigningKeyFile,
    Trusted,
    bucket_and,
    host_and_port,
    listening_at,
)
from deltawire.cli.printing import emit
from deltawire.cli.telling import Teller
from deltawire.errors import NotFound, some
from deltawire.read.naming import number_in, version_named
from deltawire.read.subscriber import Subscriber

if TYPE_CHECKING:
    from deltawire.follow.follower import Follower, UpdateReport
    from deltawire.follow.options import FollowOptions
    from deltawire.vllm.adapters import AdapterFollower, AdapterReport

PauseChoice = Literal["keep", "wait", "abort"]
Poll = Annotated[
    float | None, typer.Option(help="Seconds between looks; default: what suits the store.", envvar="DELTAWIRE_POLL")
]
Pin = Annotated[
    str | None,
    typer.Option(
        metavar="VERSION",
        help="Hold the server at this version: a number, a tag, or best:METRIC as it stands now.",
        envvar="DELTAWIRE_PIN",
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="The run is of an adapter: answer requests for NAME@VERSION.", envvar="DELTAWIRE_ADAPTER"
    ),
]
AdapterFolder = Annotated[
    Path | None,
    typer.Option(
        help="Where the server reads adapters; default: this user's cache.", envvar="DELTAWIRE_ADAPTER_FOLDER"
    ),
]
State = Annotated[
    Path | None,
    typer.Option(
        help="With --trust: file or folder that remembers the newest version; default: of this user.",
        envvar="DELTAWIRE_STATE",
    ),
]
ForgetState = Annotated[bool, typer.Option("--forget-state", help="Forget it, and follow what the bucket holds now.")]
Run = Annotated[
    str | None, typer.Option(metavar="ID", help="Follow this run, or one that continues it.", envvar="DELTAWIRE_RUN")
]
Pause = Annotated[
    PauseChoice, typer.Option(help="Requests in flight: kept, finished first, or ended.", envvar="DELTAWIRE_PAUSE")
]
KeepCache = Annotated[
    bool, typer.Option(help="Keep the KV cache of older weights: a shorter pause.", envvar="DELTAWIRE_KEEP_CACHE")
]
AuditEvery = Annotated[
    int, typer.Option(min=0, help="Digest all of live memory every so many updates.", envvar="DELTAWIRE_AUDIT_EVERY")
]
PassEndpoint = Annotated[
    bool,
    typer.Option(
        help="Tell vLLM's worker where the store is (HF_ENDPOINT, AWS_REGION …), never a token.",
        envvar="DELTAWIRE_PASS_ENDPOINT",
    ),
]
TakeOver = Annotated[bool, typer.Option("--take-over", help="Drive the server even if another follower does.")]
HealthAddress = Annotated[
    str | None,
    typer.Option(
        metavar="[HOST:]PORT",
        help="Answer /health (200 when ready, else 503) and /live here.",
        envvar="DELTAWIRE_HEALTH",
    ),
]
MaxStaleness = Annotated[
    int | None,
    typer.Option(
        min=0, help="Versions behind, or not known, at which --health answers 503.", envvar="DELTAWIRE_MAX_STALENESS"
    ),
]
MaxAge = Annotated[
    float | None,
    typer.Option(
        min=0, help="Seconds since it was last known current at which --health answers 503.", envvar="DELTAWIRE_MAX_AGE"
    ),
]
Once = Annotated[bool, typer.Option("--once", help="Bring the server to the newest version, then stop.")]
Compact = Annotated[
    Path | None, typer.Option(help="Keep a mirror here, and write folds and anchors.", envvar="DELTAWIRE_COMPACT")
]


def follow(
    bucket: BucketWord = None, engine: EngineUrl = "http://127.0.0.1:8000", poll: Poll = None, pin: Pin = None,
    adapter: Adapter = None, adapter_folder: AdapterFolder = None, base: BaseFolder = None, trust: Trusted = None,
    state: State = None, forget_state: ForgetState = False, run: Run = None, pause: Pause = "keep",
    keep_cache: KeepCache = False, audit_every: AuditEvery = 100, pass_endpoint: PassEndpoint = False,
    take_over: TakeOver = False, health: HealthAddress = None, max_staleness: MaxStaleness = None,
    max_age: MaxAge = None, once: Once = False, compact: Compact = None, key: SigningKeyFile = None,
    at: BucketOption = None, json: AsJson = False,
) -> None:  # fmt: skip
    """Follow a bucket and patch a vLLM server's live weights.

    vLLM runs on this host with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config '{"backend":"deltawire"}'. Its API
    key, if it has one, is read from VLLM_API_KEY. vLLM reads the bucket too, with its own HF_ENDPOINT, HF_TOKEN, AWS_…
    and proxies. The keys given with --trust stay with the server until others are given, or it ends.

    With --pause wait or abort, vLLM 0.33 answers new requests 503 during an update; with keep they wait.

    With --adapter it runs with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora instead. It then holds the two
    newest versions of the adapter, and nothing is paused, kept or audited.
    """
    from deltawire.follow.options import FollowOptions

    (url,), teller = bucket_and(at, bucket), Teller(as_json=json)
    options = FollowOptions(
        poll=poll, pin=_pinned(url, pin, trust or ()), base=base, trusted=tuple(trust or ()),
        state=state, run=run, forget_state=forget_state,
        pause=pause, clear_cache=not keep_cache, audit_every=audit_every, pass_endpoint=pass_endpoint,
        take_over=take_over, on_update=teller.update, on_news=teller.news, on_problem=teller.problem,
    )  # fmt: skip
    with ExitStack() as stack:
        if compact is not None:
            options = stack.enter_context(_compacting(url, compact, key, options, teller))
        follower = _follower(url, engine, adapter, adapter_folder, options, teller)
        stack.enter_context(follower)
        if health is not None:
            stack.enter_context(_serving_health(health, follower, max_staleness, max_age, teller))
        _follow(follower, engine, teller, once=once)


def _pinned(bucket: str, pin: str | None, trust: Iterable[str]) -> int | None:
    """The version to hold a server at. A number is believed: the follower may be started before it is there."""
    if pin is None or (number := number_in(pin)) is not None:
        return None if pin is None else number
    with Subscriber(open_bucket(bucket), trusted=trust) as subscriber:
        return version_named(subscriber, pin)


def _follower(
    bucket: str,
    engine: str,
    adapter: str | None,
    folder: Path | None,
    options: "FollowOptions",
    teller: Teller,
) -> "Follower | AdapterFollower":
    """What follows, whole models or an adapter; a problem is printed with how long it has lasted."""
    from deltawire.follow.follower import Follower
    from deltawire.vllm.adapters import AdapterFollower
    from deltawire.vllm.client import EngineClient

    def problem(error: Exception) -> None:
        teller.problem(error, follower.health)

    options = options.changed(on_problem=problem)
    follower: Follower | AdapterFollower
    if adapter is None:
        follower = Follower(bucket, EngineClient(engine), options)
    else:
        follower = AdapterFollower(bucket, engine, adapter, folder=folder, options=options)
    return follower


@contextmanager
def _compacting(
    bucket: str, mirror: Path, key: Path | None, options: "FollowOptions", teller: Teller
) -> Iterator["FollowOptions"]:
    """The options of a follower that wakes a compactor at each update."""
    from deltawire.upkeep.background import BackgroundCompactor
    from deltawire.upkeep.compactor import Compactor

    compactor = Compactor(open_bucket(bucket), mirror, base=options.base, trusted=options.trusted, signing_key=key)
    with BackgroundCompactor(compactor, on_problem=teller.problem) as compacting:

        def update(report: "UpdateReport | AdapterReport") -> None:
            teller.update(report)
            compacting.wake()

        yield options.changed(on_update=update)


@contextmanager
def _serving_health(
    address: str,
    follower: "Follower | AdapterFollower",
    max_staleness: int | None,
    max_age: float | None,
    teller: Teller,
) -> Iterator[None]:
    """Meanwhile answer whether the server is ready, show the page, and export metrics."""
    from deltawire.fleet.follower_port import board_of, metrics_of
    from deltawire.follow.health import HealthServer

    health = follower.health
    follower.beats.unready = lambda: health.why_unready(max_staleness, max_age)
    host, port = host_and_port(address, "--health")
    with closing(board_of(follower)) as board:
        with listening_at(host, port, "--health"):
            routes = [board, metrics_of(follower)]
            server = HealthServer(port, follower.beats.unready, health, host=host, routes=routes)
        with server, follower.listening():
            page = server.url.removesuffix("health")
            teller.line("health", f"health at {server.url}, page at {page}", url=server.url, page=page)
            yield


def _follow(follower: "Follower | AdapterFollower", engine: str, teller: Teller, *, once: bool) -> None:
    where, pin = follower.bucket.url, follower.options.pin
    server = re.sub("//.*@", "//", engine)  # a password may stand before an "@"
    teller.line("following", f"{server} follows {where}", engine=server, bucket=where, pin=pin)
    with teller.to_the_end(follower.stop, follower.health):
        if once:
            _follow_once(follower, teller)
        else:
            follower.run()


def _follow_once(follower: "Follower | AdapterFollower", teller: Teller) -> None:
    from deltawire.follow.news import Current

    if follower.step() is not None:
        return
    health = follower.health
    if health.waiting is not None:
        raise NotFound(health.waiting)
    if health.served is not None:
        teller.news(Current(health.served.run, health.served.version))


def audit(
    bucket: Annotated[
        str | None, typer.Argument(metavar="BUCKET", help="Compare with this bucket; default: the one followed.")
    ] = None,
    engine: EngineUrl = "http://127.0.0.1:8000",
    at: Annotated[str | None, typer.Option("--bucket", metavar="BUCKET", help="The same as the argument.")] = None,
    json: AsJson = False,
) -> None:
    """Check every weight in a live vLLM server's memory.

    It recomputes their digests, and compares them with the version that the server says it serves.
    """
    from deltawire.vllm.client import EngineClient

    against = None if bucket is None and at is None else bucket_and(at, bucket)[0]
    with EngineClient(engine) as client:
        result = client.audit(against)
    wrong = result.mismatched
    text = f"{result.position}: {result.tensors} tensors, " + (
        f"{len(wrong)} differ: {some(wrong)}" if wrong else "all equal"
    )
    if result.frozen:
        text += f"; {len(result.frozen)} that the run never changes are not loaded by this server"
    emit(msgspec.to_builtins(result), text, json)
    raise typer.Exit(1 if wrong else 0)
