"""Which policy made which token: vLLM's own account of a request, while `deltawire follow` updates the server.

vLLM 0.33 tells with every completion (and chat completion) that asks for `return_weight_versions`; before that, its
`/inference/v1/generate` does, if started with `--enable-scale-out`. Run `python weight_versions.py --prompt 1 2`.
Versions read `<run>:<version>`, and a request that lives through an update shows both.

Of a whole answer, any vLLM started with `--middleware deltawire.vllm.middleware.PolicyVersion` tells the first and the
last version in two headers: `python weight_versions.py --headers`. So does `deltawire gateway` of the first.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx

STALLED = 120.0
"""seconds without a token, or without being let in, after which a request is given up"""
ASK_AGAIN = 0.1
"""seconds between requests to a server that answers 503, as vLLM 0.33 does in a pause of `--pause wait` or `abort`"""


def generate(engine: str, prompt: list[int], tokens: int) -> Iterator[dict[str, Any]]:
    """The answer to a prompt of token ids as it is made: chunks with new `token_ids`, the last of them with the
    `weight_versions` that made all of them."""
    path, body = request(prompt, tokens, tells=_tells(engine))
    deadline = time.monotonic() + STALLED
    while True:
        with httpx.stream("POST", engine + path, json=body, timeout=STALLED) as answer:
            if answer.status_code != 503 or time.monotonic() >= deadline:
                answer.raise_for_status()
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        yield from json.loads(line.removeprefix("data: ")).get("choices", ())
                return
        time.sleep(ASK_AGAIN)


def policy(engine: str, prompt: list[int], tokens: int) -> tuple[str | None, str | None]:
    """The first and the last version that made an answer, by its headers; None for one that no header tells."""
    path, body = request(prompt, tokens, tells=True)
    answer = httpx.post(engine + path, json={**body, "stream": False}, timeout=STALLED)
    answer.raise_for_status()
    return answer.headers.get("X-Policy-Version"), answer.headers.get("X-Policy-Version-Last")


def request(prompt: list[int], tokens: int, *, tells: bool) -> tuple[str, dict[str, Any]]:
    """Path and body of the request; `tells` is whether `/v1/completions` tells which weights made its tokens."""
    sampling = {"max_tokens": tokens, "ignore_eos": True}
    if tells:
        asked = {"return_token_ids": True, "return_weight_versions": True}
        return "/v1/completions", {"prompt": prompt, "stream": True, **asked, **sampling}
    return "/inference/v1/generate", {"token_ids": prompt, "stream": True, "sampling_params": sampling}


def _tells(engine: str) -> bool:
    """Whether this vLLM is 0.33 or newer."""
    version = re.match(r"(\d+)\.(\d+)", str(httpx.get(f"{engine}/version", timeout=STALLED).json().get("version")))
    return version is not None and tuple(map(int, version.groups())) >= (0, 33)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="http://127.0.0.1:8000", help="the vLLM server")
    parser.add_argument("--prompt", type=int, nargs="+", default=[1, 2, 3], help="token ids")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to generate")
    parser.add_argument("--headers", action="store_true", help="by the headers of a whole answer")
    options = parser.parse_args()
    if options.headers:
        print(*policy(options.engine, options.prompt, options.tokens))
        return
    *_, last = generate(options.engine, options.prompt, options.tokens)
    for span in last["weight_versions"]:
        print(span)


if __name__ == "__main__":
    main()
