"""Verbs for a vLLM server on this host: follow a bucket into its live weights, and audit them."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer

from deltawire.buckets import open_bucket
from deltawire.cli.options import AsJson, EngineUrl, Trusted
from deltawire.cli.printing import emit, named, size
from deltawire.errors import some

if TYPE_CHECKING:
    from deltawire.vllm.adapters import AdapterReport
    from deltawire.vllm.follower import UpdateReport

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
    trust: Trusted = None,
    pause: Annotated[PauseChoice, typer.Option(help="Requests in flight: kept, finished first, or ended.")] = "keep",
    keep_cache: Annotated[bool, typer.Option(help="Keep the KV cache of older weights: a shorter pause.")] = False,
    audit_every: Annotated[int, typer.Option(min=0, help="Digest all of live memory every so many updates.")] = 100,
    max_staleness: Annotated[
        int | None, typer.Option(min=0, help="Versions behind at which --health answers 503; default: any.")
    ] = None,
    health: Annotated[int | None, typer.Option(help="Port here that answers 200 when ready, else 503.")] = None,
    once: Annotated[bool, typer.Option(help="Bring the server to the newest version, then stop.")] = False,
    compact: Annotated[Path | None, typer.Option(help="Keep a mirror here, and write folds and anchors.")] = None,
    key: Annotated[Path | None, typer.Option(help="Private key that signs those folds and anchors.")] = None,
    json: AsJson = False,
) -> None:
    """Follow a bucket and patch a vLLM server's live weights, version by version.

    vLLM runs on this host with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config '{"backend":"deltawire"}'. Its API
    key, if it has one, is read from VLLM_API_KEY.

    With --adapter it runs with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora instead. It then holds the two
    newest versions of the adapter, and nothing is paused, kept or audited.
    """
    from deltawire.compactor import Compactor
    from deltawire.tending import Tending
    from deltawire.vllm.adapters import AdapterFollower
    from deltawire.vllm.follower import Follower
    from deltawire.vllm.health import HealthServer

    tending: Tending | None = None

    def report(update: "UpdateReport | AdapterReport") -> None:
        emit({"event": "update", **msgspec.to_builtins(update)}, _as_text(update), json)
        if tending is not None:
            tending.wake()

    def problem(error: Exception) -> None:
        emit({"event": "problem", "error": named(error)}, f"problem: {named(error)}", json)

    common: dict[str, Any] = {"poll": poll, "pin": pin, "trusted": trust or (), "on_problem": problem}
    with ExitStack() as stack:
        if compact is not None:
            compactor = Compactor(open_bucket(bucket), compact, trusted=trust or (), signing_key=key)
            tending = stack.enter_context(Tending(compactor, on_problem=problem))
        follower: Follower | AdapterFollower
        if adapter is None:
            updating: dict[str, Any] = {"pause": pause, "clear_cache": not keep_cache, "audit_every": audit_every}
            follower = stack.enter_context(Follower(bucket, engine, on_update=report, **updating, **common))
        else:
            loading = AdapterFollower(bucket, engine, adapter, folder=adapter_folder, on_update=report, **common)
            follower = stack.enter_context(loading)
        if health is not None:
            standing = follower.standing
            served = stack.enter_context(HealthServer(health, lambda: standing.why_unready(max_staleness), standing))
            emit({"event": "health", "url": served.url}, f"health at {served.url}", json)
        if once:
            follower.step()
        else:
            follower.run()


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


def _as_text(update: "UpdateReport | AdapterReport") -> str:
    from deltawire.vllm.follower import UpdateReport

    how = f"pause {update.pause_ms:.1f} ms" if isinstance(update, UpdateReport) else f"load {update.load_s:.2f} s"
    return (
        f"version {update.version}: {update.changed:,} weights, {size(update.wire_bytes)}, {how}, "
        f"{update.publish_to_served_s:.2f} s after publish"
    )
