"""The offline `LLM` class follows a bucket in the process that embeds it."""

import json
import os
import subprocess
import sys

import pytest
from servers import START_SECONDS
from test_models import ALL, Chain

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2 * START_SECONDS)]
EMBEDS = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
import deltawire.vllm

if __name__ == "__main__":
    checkpoint, bucket, told = sys.argv[1:]
    llm = LLM(checkpoint, dtype="bfloat16", max_model_len=128, enforce_eager=True,
              weight_transfer_config=WeightTransferConfig(backend="deltawire"))
    greedy = SamplingParams(temperature=0, max_tokens=8, logprobs=0)
    def logprobs():
        (answer,) = llm.generate([{"prompt_token_ids": [1, 2, 3]}], greedy, use_tqdm=False)
        return [next(iter(token.values())).logprob for token in answer.outputs[0].logprobs]
    before = logprobs()
    with deltawire.vllm.follow(llm, bucket) as follower:
        report = follower.step()
        again = follower.step()
        audit = follower.audit()
    open(told, "w").write(json.dumps({"before": before, "after": logprobs(), "version": report.version, "again": again,
                      "digests": audit.digests, "mismatched": audit.mismatched}))
"""


def test_an_embedded_engine_is_patched_between_two_calls_of_generate(tmp_path):
    chain = Chain(tmp_path, "qwen3-tied")
    chain.publish(ALL)
    script = tmp_path / "embeds.py"
    script.write_text(EMBEDS)
    done = subprocess.run(
        [sys.executable, str(script), str(chain.checkpoint), chain.url, str(tmp_path / "told")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    chain.publisher.close(10)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads((tmp_path / "told").read_text())
    assert (told["version"], told["again"], told["mismatched"]) == (1, None, [])
    assert told["digests"] == chain.versions[1]
    assert told["before"] != told["after"]
