"""Verbs for a vLLM server on this host: follow a bucket into its live weights, and audit them."""

import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer

from deltawire.buckets import open_bucket
from deltawire.cli.options import AsJson, BaseFolder, EngineUrl, Trusted
from deltawire.cli.printing import emit
from deltawire.cli.telling import Teller
from deltawire.errors import NotFound, some

if TYPE_CHECKING:
    from deltawire.follow.follower import Follower, UpdateReport
    from deltawire.follow.health import HealthServer, Standing
    from deltawire.vllm.adapters import AdapterFollower, AdapterReport

PauseChoice = Literal["keep", "wait", "abort"]


def follow(
    bucket: Annotated[str, typer.Option(help="The bucket the trainer publishes to.")],
    engine: EngineUrl = "http://127.0.0.1:8000",
    poll: Annotated[float | None, typer.Option(help="Seconds between looks; default: what suits the store.")] = None,
    pin: Annotated[int | None, typer.Option(help="Hold the server at this version, older or newer.")] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="NAME", help="The run is of an adapter: answer requests for NAME@VERSION.")
    ] = None,
    adapter_folder: Annotated[
        Path | None, typer.Option(help="Where the server reads adapters; default: this user's cache.")
    ] = None,
    base: BaseFolder = None,
    trust: Trusted = None,
    state: Annotated[
        Path | None,
        typer.Option(help="With --trust: file or folder that remembers the newest version; default: of this user."),
    ] = None,
    forget_state: Annotated[bool, typer.Option(help="Forget it, and follow what the bucket holds now.")] = False,
    run: Annotated[str | None, typer.Option(metavar="ID", help="Follow this run, or one that continues it.")] = None,
    pause: Annotated[PauseChoice, typer.Option(help="Requests in flight: kept, finished first, or ended.")] = "keep",
    keep_cache: Annotated[bool, typer.Option(help="Keep the KV cache of older weights: a shorter pause.")] = False,
    audit_every: Annotated[int, typer.Option(min=0, help="Digest all of live memory every so many updates.")] = 100,
    pass_endpoint: Annotated[
        bool, typer.Option(help="Tell vLLM's worker where the store is (HF_ENDPOINT, AWS_REGION …), never a token.")
    ] = False,
    take_over: Annotated[bool, typer.Option(help="Drive the server even if another follower does.")] = False,
    health: Annotated[
        str | None,
        typer.Option(metavar="[HOST:]PORT", help="Answer /health (200 when ready, else 503) and /live here."),
    ] = None,
    max_staleness: Annotated[
        int | None, typer.Option(min=0, help="Versions behind, or not known, at which --health answers 503.")
    ] = None,
    max_age: Annotated[
        float | None, typer.Option(min=0, help="Seconds since it was last known current at which --health answers 503.")
    ] = None,
    once: Annotated[bool, typer.Option(help="Bring the server to the newest version, then stop.")] = False,
    compact: Annotated[Path | None, typer.Option(help="Keep a mirror here, and write folds and anchors.")] = None,
    key: Annotated[Path | None, typer.Option(help="Private key that signs those folds and anchors.")] = None,
    json: AsJson = False,
) -> None:
    """Follow a bucket and patch a vLLM server's live weights, version by version.

    vLLM runs on this host with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config '{"backend":"deltawire"}'. Its API
    key, if it has one, is read from VLLM_API_KEY. vLLM reads the bucket too, with its own HF_ENDPOINT, HF_TOKEN, AWS_…
    and proxies. The keys given with --trust stay with the server until others are given, or it ends.

    With --pause wait or abort, vLLM 0.33 answers new requests 503 during an update; with keep they wait.

    With --adapter it runs with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora instead. It then holds the two
    newest versions of the adapter, and nothing is paused, kept or audited.
    """
    from deltawire.follow.follower import Follower
    from deltawire.upkeep.background import BackgroundCompactor
    from deltawire.upkeep.compactor import Compactor
    from deltawire.vllm.adapters import AdapterFollower
    from deltawire.vllm.client import EngineClient

    teller, compacting = Teller(as_json=json), None

    def report(update: "UpdateReport | AdapterReport") -> None:
        teller.update(update)
        if compacting is not None:
            compacting.wake()

    def problem(error: Exception) -> None:
        teller.problem(error, follower.standing)

    common: dict[str, Any] = {"poll": poll, "pin": pin, "base": base, "trusted": trust or ()}
    common |= {"state": state, "forget_state": forget_state, "run": run}
    common |= {"on_problem": problem, "on_news": teller.news}
    with ExitStack() as stack:
        if compact is not None:
            compactor = Compactor(open_bucket(bucket), compact, base=base, trusted=trust or (), signing_key=key)
            compacting = stack.enter_context(BackgroundCompactor(compactor, on_problem=teller.problem))
        follower: Follower | AdapterFollower
        if adapter is None:
            updating: dict[str, Any] = {"pause": pause, "clear_cache": not keep_cache, "audit_every": audit_every}
            updating |= {"pass_endpoint": pass_endpoint, "take_over": take_over}
            follower = stack.enter_context(
                Follower(bucket, EngineClient(engine), on_update=report, **updating, **common)
            )
        else:
            loading = AdapterFollower(bucket, engine, adapter, folder=adapter_folder, on_update=report, **common)
            follower = stack.enter_context(loading)
        if health is not None:
            served = stack.enter_context(_serve_health(health, follower.standing, max_staleness, max_age))
            stack.enter_context(follower.listening())
            teller.line("health", f"health at {served.url}", url=served.url)
        where = follower.bucket.url
        server = re.sub("//.*@", "//", engine)  # a password may stand before an "@"
        teller.line("following", f"{server} follows {where}", engine=server, bucket=where, pin=pin)
        with teller.to_the_end(follower.stop, follower.standing):
            if once:
                _follow_once(follower, teller)
            else:
                follower.run()


def _serve_health(
    address: str, standing: "Standing", max_staleness: int | None, max_age: float | None
) -> "HealthServer":
    from deltawire.follow.health import HealthServer

    host, _, port = address.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not port.isdecimal() or int(port) > 65535:
        raise typer.BadParameter(
            f"{address!r} is not PORT or HOST:PORT, as 8001 or 0.0.0.0:8001", param_hint="--health"
        )
    try:
        return HealthServer(int(port), lambda: standing.why_unready(max_staleness, max_age), standing, host=host)
    except OSError as error:
        why = error.strerror or str(error)
        raise typer.BadParameter(
            f"cannot listen at {host} port {port}: {why}; name another port (0 picks a free one)", param_hint="--health"
        ) from None


def _follow_once(follower: "Follower | AdapterFollower", teller: Teller) -> None:
    from deltawire.follow.news import Current

    if follower.step() is not None:
        return
    standing = follower.standing
    if standing.waiting is not None:
        raise NotFound(standing.waiting)
    if standing.served is not None:
        teller.news(Current(standing.served.run, standing.served.version))


def audit(
    engine: EngineUrl = "http://127.0.0.1:8000",
    bucket: Annotated[str | None, typer.Option(help="Compare with this bucket; default: the one followed.")] = None,
    json: AsJson = False,
) -> None:
    """Recompute the digest of every weight in a live vLLM server and compare it with the version it says it serves."""
    from deltawire.vllm.client import EngineClient

    with EngineClient(engine) as client:
        result = client.audit(bucket)
    wrong = result.mismatched
    text = f"{result.position}: {result.tensors} tensors, " + (
        f"{len(wrong)} differ: {some(wrong)}" if wrong else "all equal"
    )
    if result.frozen:
        text += f"; {len(result.frozen)} that the run never changes are not loaded by this server"
    emit(msgspec.to_builtins(result), text, json)
    raise typer.Exit(1 if wrong else 0)
