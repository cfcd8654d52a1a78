"""vLLM on a GPU loads every version of an adapter run, and answers as when it loads the materialised folder itself."""

import pytest
from gpu_scenarios import LORA, launch, named
from random_models import save_random
from servers import EAGER

from deltawire.vllm.client import EngineClient

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(LORA not in named(), reason='LoRA runs by name: make test-gpu SCENARIOS="lora"'),
]
OPTIONS = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2")
PROMPT = list(range(8))


def test_every_version_of_an_adapter_answers_as_its_folder_does(device, tmp_path):
    from adapters import AdapterRun

    save_random(tmp_path / "base", "tiny", device)
    server = launch(
        EAGER,
        tmp_path / "base",
        tmp_path / "vllm.log",
        device,
        backend=None,
        options=OPTIONS,
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="True",
    )
    run = AdapterRun(tmp_path / "base", tmp_path, device)
    try:
        server.wait()
        answers = []
        with run.follower(server) as follower, EngineClient(server.url) as engine:
            for version in range(3):
                run.publish()
                follower.step()
                answers.append(server.greedy(PROMPT, 24, f"lora@{version}"))
                engine.load_adapter("direct", run.materialized(version))
                assert server.greedy(PROMPT, 24, "direct") == answers[-1]
                engine.unload_adapter("direct")
        assert answers[0] != answers[1] != answers[2]
    finally:
        server.stop()
        run.publisher.close(10)
