"""The `deltawire` command: one verb per thing people do. It prints reports; `--json` prints them one object a line."""

import math
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from deltawire import wire
from deltawire.buckets import open_bucket
from deltawire.changes import Update
from deltawire.errors import DeltaWireError
from deltawire.manifests import HEAD_KEY
from deltawire.materialize import materialize as materialize_version
from deltawire.subscriber import Subscriber

app = typer.Typer(
    help="Ship only the weights that changed: verified deltas from an RL trainer to vLLM, through a bucket.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
spaces = typer.Typer(help="An RL run as three Spaces of the Hub.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(spaces, name="spaces")
BucketUrl = Annotated[str, typer.Argument(metavar="BUCKET", help="hf://buckets/ns/name, s3://…, file:///folder, …")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object a line instead of text.")]
Trusted = Annotated[
    list[str] | None,
    typer.Option("--trust", metavar="KEY", help="Accept only what this public key, or a key in this file, signed."),
]
BaseFolder = Annotated[Path | None, typer.Option(help="Folder of the base checkpoint, if it is elsewhere here.")]
PauseChoice = Literal["keep", "wait", "abort"]
MIB = 1 << 20


@app.command()
def serve(
    root: Annotated[Path, typer.Option(help="Folder that holds the buckets.")] = Path("buckets"),
    host: Annotated[str, typer.Option(help="Address to listen on; loopback only without --users.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.")] = 8100,
    users: Annotated[Path | None, typer.Option(help="JSON file of users and their tokens; default: one user.")] = None,
    json: AsJson = False,
) -> None:
    """Run a Hub-compatible bucket server for the unmodified huggingface_hub client.

    Point clients at it with HF_ENDPOINT=<the printed URL> and any HF_TOKEN; then hf://buckets/me/NAME lives in --root.

    With --users, tokens are checked and private buckets are private:
    {"users": [{"name": "ada", "token": "a long secret", "orgs": [{"name": "lab", "private_by_default": true}]}]}.
    Tokens travel as they are: beyond your own network, put a server that speaks TLS in front.
    """
    from deltawire.hub_server import serve as serve_forever

    def ready(url: str) -> None:
        token = "local" if users is None else "<your token>"
        text = f"serving {root} at {url}\nexport HF_ENDPOINT={url} HF_TOKEN={token}   # then use hf://buckets/me/NAME"
        _emit({"event": "ready", "url": url, "root": str(root)}, text, json)

    serve_forever(root, host, port, users=users, on_ready=ready)


@app.command()
def follow(
    bucket: Annotated[str, typer.Option(help="The bucket the trainer publishes to.")],
    engine: Annotated[str, typer.Option(help="The vLLM server on this host.")] = "http://127.0.0.1:8000",
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
    from deltawire.vllm.adapters import AdapterFollower, AdapterReport
    from deltawire.vllm.follower import Follower, UpdateReport
    from deltawire.vllm.health import HealthServer

    tending: Tending | None = None

    def report(update: UpdateReport | AdapterReport) -> None:
        how = f"load {update.load_s:.2f} s" if isinstance(update, AdapterReport) else f"pause {update.pause_ms:.1f} ms"
        text = (
            f"version {update.version}: {update.changed:,} weights, {_size(update.wire_bytes)}, "
            f"{how}, {update.publish_to_served_s:.2f} s after publish"
        )
        _emit({"event": "update", **msgspec.to_builtins(update)}, text, json)
        if tending is not None:
            tending.wake()

    def problem(error: Exception) -> None:
        _emit({"event": "problem", "error": _named(error)}, f"problem: {_named(error)}", json)

    with ExitStack() as stack:
        if compact is not None:
            compactor = Compactor(open_bucket(bucket), compact, trusted=trust or (), signing_key=key)
            tending = stack.enter_context(Tending(compactor, on_problem=problem))
        common: dict[str, Any] = {"poll": poll, "pin": pin, "trusted": trust or (), "on_problem": problem}
        follower: Follower | AdapterFollower
        if adapter is None:
            common |= {"pause": pause, "clear_cache": not keep_cache, "audit_every": audit_every}
            follower = Follower(bucket, engine, on_update=report, **common)
        else:
            follower = AdapterFollower(bucket, engine, adapter, folder=adapter_folder, on_update=report, **common)
        stack.enter_context(follower)
        if health is not None:
            standing = follower.standing
            served = stack.enter_context(HealthServer(health, lambda: standing.why_unready(max_staleness), standing))
            _emit({"event": "health", "url": served.url}, f"health at {served.url}", json)
        if once:
            follower.step()
        else:
            follower.run()


@app.command()
def audit(
    engine: Annotated[str, typer.Option(help="The vLLM server on this host.")] = "http://127.0.0.1:8000",
    bucket: Annotated[str | None, typer.Option(help="Compare with this bucket; default: the one followed.")] = None,
    json: AsJson = False,
) -> None:
    """Recompute the digest of every weight in a live vLLM server and compare it with the version it says it serves."""
    from deltawire.vllm.client import EngineClient

    with EngineClient(engine) as client:
        result = client.audit(bucket)
    wrong = result.mismatched
    text = f"{result.position}: {result.tensors} tensors, " + (
        f"{len(wrong)} differ: {', '.join(wrong[:5])}" if wrong else "all equal"
    )
    _emit(msgspec.to_builtins(result), text, json)
    raise typer.Exit(1 if wrong else 0)


@app.command()
def log(bucket: BucketUrl, trust: Trusted = None, json: AsJson = False) -> None:
    """List the versions of the bucket's run: bytes, step and root of each commit."""
    with Subscriber(open_bucket(bucket), trusted=trust or ()) as subscriber:
        commits = subscriber.commits()
    if json:
        for commit in commits:
            _emit(msgspec.to_builtins(commit), "", json)
        return
    table = Table("version", "parent", "step", "bytes", "tensors changed", "root", title=f"run {commits[0].run}")
    for commit in commits:
        parent = "anchor" if commit.parent is None else str(commit.parent)
        step = "" if commit.step is None else str(commit.step)
        row = (str(commit.version), parent, step, _size(commit.wire_bytes), str(len(commit.digests)), commit.root[:12])
        table.add_row(*row)
    Console().print(table)


@app.command()
def inspect(
    file: Annotated[Path | None, typer.Argument(help="A delta file.")] = None,
    engine: Annotated[str | None, typer.Option(help="A vLLM server: show where each tensor lives in it.")] = None,
    json: AsJson = False,
) -> None:
    """Check a delta file's container and seal and show what is in it, or show a server's placement."""
    if (file is None) == (engine is None):
        raise typer.BadParameter("name a delta file, or a server with --engine")
    if engine is not None:
        _show_placement(engine, json)
        return
    assert file is not None
    data = file.read_bytes()
    header = wire.read_header(data)
    if json:
        _emit({"file": str(file), "bytes": len(data), **msgspec.to_builtins(header)}, "", json)
        return
    span = f"{header.run}: {header.parent} to {header.version}" if header.run else "imported, no run named"
    seal = "seal right" if header.sealed else "no seal in the file"
    table = Table("tensor", "dtype", "shape", "changed", "share", "as", title=f"{span}, codec {header.codec}, {seal}")
    for spec, encoding in zip(header.tensors, header.encodings, strict=True):
        share = f"{spec.changed / spec.total:.3%}" if header.sealed else ""
        table.add_row(spec.name, spec.dtype, str(list(spec.shape)), f"{spec.changed:,}", share, encoding)
    Console().print(table)


@app.command()
def verify(
    bucket: BucketUrl,
    base: Annotated[Path | None, typer.Option(help="Folder of the base checkpoint.")] = None,
    trust: Trusted = None,
) -> None:
    """Fetch the whole run, apply every delta and recompute every digest."""
    with tempfile.TemporaryDirectory(prefix="deltawire-") as folder:
        report = _materialize(bucket, Path(folder) / "checkpoint", None, base, trust)
    Console().print(
        f"{report.position}: anchor and {report.deltas} deltas verified, {_size(report.fetched_bytes)} read"
    )


@app.command()
def materialize(
    bucket: BucketUrl,
    out_dir: Annotated[Path, typer.Argument(help="Folder to write, or that holds another version of this run.")],
    version: Annotated[int | None, typer.Option(help="Which version; default: the newest.")] = None,
    base: BaseFolder = None,
    trust: Trusted = None,
    json: AsJson = False,
) -> None:
    """Write a version as a Hugging Face checkpoint folder that vLLM and transformers load."""
    report = _materialize(bucket, out_dir, version, base, trust)
    text = f"{report.position} in {out_dir}: anchor and {report.deltas} deltas, {report.seconds:.1f} s"
    _emit(msgspec.to_builtins(report, enc_hook=str), text, json)


@app.command()
def compact(
    bucket: BucketUrl,
    mirror: Annotated[Path | None, typer.Option(help="Folder that keeps the weights for the next time.")] = None,
    anchor_every: Annotated[
        int | None, typer.Option(min=1, help="Versions between anchors; default: when it pays.")
    ] = None,
    watch: Annotated[bool, typer.Option(help="Go on for ever, as versions come.")] = False,
    base: BaseFolder = None,
    trust: Trusted = None,
    key: Annotated[Path | None, typer.Option(help="Private key that signs what is written.")] = None,
    json: AsJson = False,
) -> None:
    """Write folded deltas (over 4, 16, 64 versions) and anchors, so that late readers fetch little."""
    from deltawire.compactor import Cadence, Compactor

    store = open_bucket(bucket)
    with tempfile.TemporaryDirectory(prefix="deltawire-") as folder:
        place = mirror or Path(folder) / "mirror"
        cadence: Cadence = anchor_every or "adaptive"
        with Compactor(store, place, anchors=cadence, base=base, trusted=trust or (), signing_key=key) as compactor:
            tag = None
            while True:
                for report in compactor.step():
                    span = "anchor" if report.parent is None else f"fold from {report.parent}"
                    text = f"{span} to {report.version}: {_size(report.wire_bytes)}"
                    _emit({"event": "compact", **msgspec.to_builtins(report)}, text, json)
                if not watch:
                    return
                found = store.watch(HEAD_KEY, tag=tag, timeout=60.0)
                tag = found.tag if found else tag


@app.command()
def prune(
    bucket: BucketUrl,
    keep_anchors: Annotated[int, typer.Option(min=1, help="Newest anchors whose chains stay.")] = 2,
    keep_hours: Annotated[float, typer.Option(min=0, help="What was committed within these hours stays.")] = 24.0,
    delete: Annotated[bool, typer.Option(help="Delete; without it only say what would go.")] = False,
    trust: Trusted = None,
    json: AsJson = False,
) -> None:
    """Remove old versions that no active replica needs. Says what would go, and deletes with --delete."""
    from deltawire import retention

    store = open_bucket(bucket)
    with Subscriber(store, trusted=trust or ()) as subscriber:
        plan = retention.plan_prune(store, subscriber.run.run, retention.Policy(keep_anchors, keep_hours))
    if delete:
        retention.carry_out(store, plan)
    done = "deleted" if delete else "would delete (--delete does)"
    text = f"{done} {plan.objects} objects, {_size(plan.bytes)}, all below version {plan.floor}; kept: {plan.reason}"
    _emit({"deleted": delete, **msgspec.to_builtins(plan)}, text, json)


@app.command()
def keygen(
    file: Annotated[Path, typer.Argument(help="File to write the private key to; it is never overwritten.")],
    json: AsJson = False,
) -> None:
    """Make a key that signs a run's records, and print its public half, which followers are told to --trust."""
    from deltawire import signing

    public = signing.generate_key(file).public
    _emit({"file": str(file), "public": public}, public, json)


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Folder for logs and summary.json; default: runs/demo-<time>.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="A few steps of each act; every part is still real.")] = False,
    plain: Annotated[bool, typer.Option(help="Plain lines even on a terminal.")] = False,
) -> None:
    """Train a tiny model by RL while vLLM serves it, weights travelling as deltas through a bucket, on this machine."""
    from deltawire.ops.demo import DemoOptions, run_demo

    summary = run_demo(DemoOptions(out=out, quick=quick, plain=plain))
    raise typer.Exit(0 if summary.audit_equal else 1)


@spaces.command()
def render(
    user: Annotated[str, typer.Option(help="Whose Spaces and bucket they will be.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("spaces"),
    json: AsJson = False,
) -> None:
    """Write the folders of three Spaces (environment, vLLM with its follower, trainer) and print what starts them.

    The printed `hf` commands take two secrets from the environment: HF_TOKEN and a VLLM_API_KEY of your own.
    """
    from deltawire.ops.cast import find_checkout
    from deltawire.ops.spaces import render as render_spaces

    rendered = render_spaces(find_checkout(), user, out)
    _emit({"folders": rendered.folders, "commands": rendered.commands}, "\n".join(rendered.commands), json)


def _show_placement(engine: str, as_json: bool) -> None:
    from deltawire.vllm.client import EngineClient

    with EngineClient(engine) as client:
        workers = client.placement()
    if as_json:
        for worker in workers:
            _emit(worker, "", as_json)
        return
    table = Table("tensor", "worker", "parameter", "elements", "from", title=engine)
    for worker in workers:
        for name, boxes in worker["placement"].items():
            for box in boxes:
                size = math.prod(box["shape"])
                table.add_row(name, str(worker["rank"]), box["parameter"], f"{size:,}", f"{box['source_offset']:,}")
        for module in worker["remade"]:
            table.add_row(f"({module})", str(worker["rank"]), "made anew at each update", "", "")
    Console().print(table)


def _materialize(bucket: str, out_dir: Path, version: int | None, base: Path | None, trust: list[str] | None) -> Any:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    store = open_bucket(bucket)
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        with Subscriber(store, base=base, trusted=trust or ()) as subscriber:
            total = sum(1 for commit in subscriber.commits() if version is None or commit.version <= version)
        task = progress.add_task("versions", total=total)

        def advance(update: Update) -> None:
            progress.advance(task)

        return materialize_version(store, out_dir, version, base=base, trusted=trust or (), on_update=advance)


def _emit(record: object, text: str, as_json: bool) -> None:
    line = msgspec.json.encode(record, enc_hook=str).decode() if as_json else text
    print(line, flush=True)


def _size(count: int) -> str:
    return f"{count / MIB:.2f} MiB" if count >= MIB else f"{count / 1024:.1f} KiB"


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def main() -> None:
    """Run the command; a typed error becomes one line on stderr and exit code 1."""
    try:
        app()
    except (DeltaWireError, ImportError, OSError) as error:
        print(f"deltawire: {_named(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
