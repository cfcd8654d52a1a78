"""The verb that opens a door before several engines."""

from typing import Annotated

import typer

from deltawire.cli.options import AsJson
from deltawire.cli.printing import emit


def gateway(
    engine: Annotated[
        list[str],
        typer.Option(
            metavar="URL[,HEALTH]",
            help="A vLLM server, and where its follower's --health answers; repeat it.",
            envvar="DELTAWIRE_ENGINES",
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.", envvar="DELTAWIRE_GATEWAY_HOST")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port; 0 picks a free one.", min=0, max=65535, envvar="DELTAWIRE_GATEWAY_PORT")
    ] = 8080,
    wait: Annotated[float, typer.Option(min=0, help="Seconds that a request waits for an engine that will do.")] = 30.0,
    poll: Annotated[float, typer.Option(min=0.01, help="Seconds between looks at each engine.")] = 0.5,
    json: AsJson = False,
) -> None:
    """Pass OpenAI requests to several vLLM servers.

    Each goes to one that is ready, new enough, and knows the prefix. A request with the header X-Min-Policy-Version
    gets an engine that serves this version or a newer one; it waits for one. Answers say X-Policy-Version. Only
    /v1/completions, /v1/chat/completions and /v1/models are passed on, with the client's API key; /health lists the
    engines.
    """
    try:
        from deltawire.gateway.serving import serve
    except ImportError:
        raise ImportError("the gateway needs starlette, uvicorn and httpx: pip install 'deltawire[gateway]'") from None
    from deltawire.gateway.engines import parse_engine

    def ready(url: str) -> None:
        emit({"event": "ready", "url": url, "engines": engine}, f"gateway at {url} before {len(engine)} engines", json)

    serve([parse_engine(each) for each in engine], host, port, patience=wait, poll=poll, on_ready=ready)
