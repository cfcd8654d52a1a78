"""Ask vLLM the sums that nobody trained on, greedily, as any client would: through /v1/chat/completions.

    python -m examples.sums.exam --engine http://127.0.0.1:8000

prints one JSON line: the version that answered, and each question with its answer and whether that is right.
"""

import argparse
import asyncio
import json
import sys
from typing import Any

import aiohttp
from examples.sums.game import LONGEST, Sum, held_out

PATIENCE = 120.0
"""seconds for all answers"""


async def ask(engine: str, model: str) -> dict[str, Any]:
    """The record of an exam. Raises ClientError or TimeoutError when the server does not answer well."""
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with aiohttp.ClientSession(engine, timeout=timeout, raise_for_status=True) as client:
        answers = await asyncio.gather(*(answer(client, model, asked) for asked in held_out()))
        async with client.get("/weight_info") as served:
            return {"event": "exam", "weights": (await served.json())["weight_version"], "answers": answers}


async def answer(client: aiohttp.ClientSession, model: str, asked: Sum) -> dict[str, Any]:
    """One question, what the model says to it, and whether that is right."""
    messages = [{"role": "user", "content": asked.question}]
    request = {"model": model, "messages": messages, "max_tokens": LONGEST, "temperature": 0.0}
    async with client.post("/v1/chat/completions", json=request) as response:
        text = (await response.json())["choices"][0]["message"]["content"]
    return {"question": asked.question, "answer": text, "right": asked.is_right(text)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, help="URL of the vLLM server")
    parser.add_argument("--served-model-name", default="policy")
    arguments = parser.parse_args()
    try:
        print(json.dumps(asyncio.run(ask(arguments.engine, arguments.served_model_name))), flush=True)
    except (aiohttp.ClientError, TimeoutError) as error:
        print(f"exam: {arguments.engine}: {error or 'no answer in time'}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
