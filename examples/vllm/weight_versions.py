"""Which policy made which token: vLLM's own account of a request, while `deltawire follow` updates the server.

Start vLLM with `--enable-scale-out` beside the options of the README; then `python weight_versions.py --prompt 1 2 3`.
Versions read `<run>:<version>`, and a request that lives through an update shows both.
"""

import argparse
from typing import Any

import httpx


def generate(engine: str, prompt: list[int], tokens: int) -> dict[str, Any]:
    """The one answer to a prompt of token ids: its `token_ids`, and the `weight_versions` that made them."""
    body = {"token_ids": prompt, "sampling_params": {"max_tokens": tokens, "ignore_eos": True}}
    answer = httpx.post(f"{engine}/inference/v1/generate", json=body, timeout=600)
    answer.raise_for_status()
    (choice,) = answer.json()["choices"]
    return dict(choice)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="http://127.0.0.1:8000", help="the vLLM server")
    parser.add_argument("--prompt", type=int, nargs="+", default=[1, 2, 3], help="token ids")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to generate")
    options = parser.parse_args()
    choice = generate(options.engine, options.prompt, options.tokens)
    for span in choice["weight_versions"]:
        print(span)


if __name__ == "__main__":
    main()
