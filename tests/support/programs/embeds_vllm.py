"""A process that embeds vLLM's LLM class and follows a bucket with it: CHECKPOINT BUCKET ANSWER.

Writes what it served before and after the newest version, and what an audit found, as JSON into the file ANSWER.
"""

import json
import sys
from pathlib import Path

from vllm.config import WeightTransferConfig

import deltawire.vllm
from vllm import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8, logprobs=0)


def logprobs(llm):
    (answer,) = llm.generate([{"prompt_token_ids": [1, 2, 3]}], GREEDY, use_tqdm=False)
    return [next(iter(token.values())).logprob for token in answer.outputs[0].logprobs]


if __name__ == "__main__":
    checkpoint, bucket, answer = sys.argv[1:]
    transfer = WeightTransferConfig(backend="deltawire")
    llm = LLM(checkpoint, dtype="bfloat16", max_model_len=128, enforce_eager=True, weight_transfer_config=transfer)
    before = logprobs(llm)
    with deltawire.vllm.follow(llm, bucket) as follower:
        report = follower.step()
        again = follower.step()
        audit = follower.audit()
    found = {"version": report.version, "again": again, "digests": audit.digests, "mismatched": audit.mismatched}
    Path(answer).write_text(json.dumps({"before": before, "after": logprobs(llm), **found}))
