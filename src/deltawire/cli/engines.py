"""Verbs for a vLLM server on this host: follow a bucket into its live weights, and audit them."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

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
)
from deltawire.cli.printing import emit
from deltawire.errors import some
from deltawire.read.naming import number_in, version_named
from deltawire.read.subscriber import Subscriber

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
LOCAL = "http://127.0.0.1:8000"
Engines = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        metavar="URL",
        help=f"A vLLM server on this host, by default {LOCAL}; give it again for each.",
        envvar="DELTAWIRE_ENGINE",
    ),
]
AllOrNothing = Annotated[bool, typer.Option("--all-or-nothing", help="A version goes live on all servers, or on none.")]
Compact = Annotated[
    Path | None, typer.Option(help="Keep a mirror here, and write folds and anchors.", envvar="DELTAWIRE_COMPACT")
]


def follow(
    bucket: BucketWord = None, engine: Engines = None, poll: Poll = None, pin: Pin = None,
    adapter: Adapter = None, adapter_folder: AdapterFolder = None, base: BaseFolder = None, trust: Trusted = None,
    state: State = None, forget_state: ForgetState = False, run: Run = None, pause: Pause = "keep",
    keep_cache: KeepCache = False, audit_every: AuditEvery = 100, pass_endpoint: PassEndpoint = False,
    take_over: TakeOver = False, health: HealthAddress = None, max_staleness: MaxStaleness = None,
    max_age: MaxAge = None, once: Once = False, compact: Compact = None, key: SigningKeyFile = None,
    all_or_nothing: AllOrNothing = False, at: BucketOption = None, json: AsJson = False,
) -> None:  # fmt: skip
    """Follow a bucket and patch a vLLM server's live weights.

    vLLM runs on this host with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config '{"backend":"deltawire"}'. Its API
    key, if it has one, is read from VLLM_API_KEY. vLLM reads the bucket too, with its own HF_ENDPOINT, HF_TOKEN, AWS_…
    and proxies. The keys given with --trust stay with the server until others are given, or it ends.

    With --pause wait or abort, vLLM 0.33 answers new requests 503 during an update; with keep they wait.

    With --adapter it runs with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora instead. It then holds the two
    newest versions of the adapter, and nothing is paused, kept or audited.

    One process drives several servers: give --engine for each. They need nothing of each other. With --all-or-nothing a
    version goes live on all of them or on none.
    """
    from deltawire.cli.following import Following
    from deltawire.follow.options import FollowOptions

    (url,), servers = bucket_and(at, bucket), list(dict.fromkeys(engine or [LOCAL]))
    _require_apart(servers, adapter, adapter_folder, state, all_or_nothing=all_or_nothing)
    options = FollowOptions(
        poll=poll, pin=_pinned(url, pin, trust or ()), base=base, trusted=tuple(trust or ()),
        state=state, run=run, forget_state=forget_state,
        pause=pause, clear_cache=not keep_cache, audit_every=audit_every, pass_endpoint=pass_endpoint,
        take_over=take_over,
    )  # fmt: skip
    following = Following(url, options, as_json=json)
    with ExitStack() as stack:
        if compact is not None:
            stack.enter_context(following.compacting(compact, key))
        stack.enter_context(following.of(servers, adapter, adapter_folder, all_or_nothing=all_or_nothing))
        if health is not None:
            stack.enter_context(following.serving_health(health, max_staleness, max_age))
        following.run(once=once)


def _require_apart(
    servers: Sequence[str], adapter: str | None, folder: Path | None, state: Path | None, *, all_or_nothing: bool
) -> None:
    """Raise BadParameter where followers of several servers would share what each needs for itself."""
    if all_or_nothing and adapter is not None:
        raise typer.BadParameter("an adapter is loaded beside the last: leave it out", param_hint="--all-or-nothing")
    if len(servers) > 1 and folder is not None:
        raise typer.BadParameter("several servers cannot share one: leave it out", param_hint="--adapter-folder")
    if len(servers) > 1 and state is not None and not state.is_dir():
        raise typer.BadParameter("for several servers it is a folder that exists", param_hint="--state")


def _pinned(bucket: str, pin: str | None, trust: Iterable[str]) -> int | None:
    """The version to hold a server at. A number is believed: the follower may be started before it is there."""
    if pin is None or (number := number_in(pin)) is not None:
        return None if pin is None else number
    with Subscriber(open_bucket(bucket), trusted=trust) as subscriber:
        return version_named(subscriber, pin)


def audit(
    bucket: Annotated[
        str | None, typer.Argument(metavar="BUCKET", help="Compare with this bucket; default: the one followed.")
    ] = None,
    engine: EngineUrl = LOCAL,
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
