"""Which policy answered, in two headers: with a stand-in for vLLM's application here, with vLLM in test_gateway.py."""

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from deltawire.vllm.middleware import PolicyVersion

PATHS = ("/v1/completions", "/v1/chat/completions")


class Engine:
    """Tells one label after another; the last for ever."""

    def __init__(self, *labels: str) -> None:
        self.labels = list(labels)

    async def get_weight_version(self) -> str:
        return self.labels.pop(0) if len(self.labels) > 1 else self.labels[0]


def ask(path: str, engine: object, *, stream: bool = False) -> httpx.Response:
    async def answer(request):
        async def pieces():
            yield b"data: {}\n\n"
            yield b"data: [DONE]\n\n"

        return StreamingResponse(pieces(), media_type="text/event-stream") if stream else JSONResponse({"done": True})

    app = Starlette(routes=[Route(path, answer)], middleware=[Middleware(PolicyVersion)])
    app.state.engine_client = engine

    async def asking() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://vllm") as client:
            return await client.get(path)

    return asyncio.run(asking())


@pytest.mark.parametrize("path", PATHS)
def test_an_answer_names_the_policy_before_it_and_after(path):
    headers = ask(path, Engine("ab:1", "ab:2")).headers
    assert (headers["X-Policy-Version"], headers["X-Policy-Version-Last"]) == ("ab:1", "ab:2")


def test_a_streamed_answer_ends_with_the_last_as_a_comment():
    answer = ask(PATHS[0], Engine("ab:1", "ab:2"), stream=True)
    assert answer.headers["X-Policy-Version"] == "ab:1" and "X-Policy-Version-Last" not in answer.headers
    assert answer.text == "data: {}\n\ndata: [DONE]\n\n: X-Policy-Version-Last: ab:2\n\n"


@pytest.mark.parametrize("label", ["policy €", "ab:1\r\nX-Evil: 1", "ab:1\x1b[2J"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_label_that_fits_no_header_is_not_told(label, stream):
    answer = ask(PATHS[0], Engine(label), stream=stream)
    assert answer.status_code == 200 and "X-Policy" not in f"{answer.headers} {answer.text}"


def test_other_paths_and_engines_that_do_not_tell_are_left_alone():
    assert "X-Policy-Version" not in ask("/v1/models", Engine("ab:1")).headers
    for stream in (False, True):
        answer = ask(PATHS[0], object(), stream=stream)
        assert answer.status_code == 200 and "X-Policy-Version" not in answer.headers
        assert "X-Policy" not in answer.text
