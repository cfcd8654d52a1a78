"""Which policy made which token: vLLM's own account of a request, while `deltawire follow` updates the server.

Start vLLM with `--enable-scale-out` beside the options of the README; then `python weight_versions.py --prompt 1 2 3`.
Versions read `<run>:<version>`, and a request that lives through an update shows both.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import httpx

STALLED = 120.0
"""seconds without a token after which a request is given up"""


def generate(engine: str, prompt: list[int], tokens: int) -> Iterator[dict[str, Any]]:
    """The answer to a prompt of token ids as it is made: chunks with new `token_ids`, the last of them with the
    `weight_versions` that made all of them."""
    body = {"token_ids": prompt, "sampling_params": {"max_tokens": tokens, "ignore_eos": True}, "stream": True}
    with httpx.stream("POST", f"{engine}/inference/v1/generate", json=body, timeout=STALLED) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield from json.loads(line.removeprefix("data: "))["choices"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="http://127.0.0.1:8000", help="the vLLM server")
    parser.add_argument("--prompt", type=int, nargs="+", default=[1, 2, 3], help="token ids")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to generate")
    options = parser.parse_args()
    *_, last = generate(options.engine, options.prompt, options.tokens)
    for span in last["weight_versions"]:
        print(span)


if __name__ == "__main__":
    main()
