"""The offline `LLM` class follows a bucket in the process that embeds it."""

import json
import os
import subprocess
import sys

import pytest
from programs import program
from servers import START_SECONDS
from test_models import ALL, Chain

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2 * START_SECONDS)]


def test_an_embedded_engine_is_patched_between_two_calls_of_generate(tmp_path):
    chain = Chain(tmp_path, "qwen3-tied")
    chain.publish(ALL)
    done = subprocess.run(
        [sys.executable, program("embeds_vllm"), str(chain.checkpoint), chain.url, str(tmp_path / "told")],
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
