"""What people train, each served by a real vLLM server: bit for bit through deltas, a fold and a rollback.

`make test` runs three kinds and layouts (the third in test_two_workers). Each goes back to the version that its server
was started on, to be compared with that. `make test-vllm` runs all of them, and starts another server on the newest
version of each.
"""

import os

import httpx
import pytest
import torch
from random_models import quantise
from safetensors.torch import load_file
from servers import START_SECONDS, VOCABULARY, Server, build, repeat_head, save_checkpoint

import deltawire as dw
from deltawire.follow.follower import Follower
from deltawire.prepare.fp8 import Fp8
from deltawire.trainers.conversion import name_map
from deltawire.trainers.state import checkpoint_tensors
from deltawire.vllm.client import EngineClient

TP2 = ("--tensor-parallel-size", "2")
TWO = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
KEEP = {"DELTAWIRE_PREPACK": "keep"}
ALWAYS = [("qwen3-moe", "tp1"), ("qwen3-untied", "packed")]
OFTEN = [
    ("qwen3-one-kv-head", "tp2"),
    ("qwen3-tied", "tp1"), ("qwen3-untied", "tp1"), ("llama", "tp1"), ("gemma", "tp1"), ("qwen2-biases", "tp1"),
    ("mixtral", "tp1"), ("glm4-moe", "tp1"), ("qwen3-moe-padded", "tp1"), ("qwen3-tied", "tp2"), ("llama", "tp2"),
    ("gemma", "tp2"), ("qwen2-biases", "tp2"), ("qwen3-moe", "tp2"), ("mixtral", "tp2"), ("qwen3-untied", "tp2"),
    ("glm4-moe", "tp2"), ("ernie-moe", "tp1"), ("ernie-moe", "tp2"), ("qwen3-tied", "packed"), ("qwen3-moe", "packed"),
    ("qwen3-fp8", "tp1"), ("qwen3-fp8", "tp2"),
]  # fmt: skip
LAYOUTS = {"tp1": ((), {}), "tp2": (TP2, TWO), "packed": ((), KEEP)}
every = os.environ.get("DELTAWIRE_TEST_VLLM") == "all"
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3 * START_SECONDS)]  # two servers may start within one test


RARE, ALL = 3e-6, 1e-2
"""learning rates at which a step changes a few in a hundred elements in bf16, and nearly all of them"""


class Chain:
    """A small model in training: a checkpoint of its start for servers, and a bucket with a version after each step.

    `versions` are the digests of what `save_pretrained` writes of each, in bf16: experts one by one, a tied head once.
    """

    def __init__(self, folder, kind):
        self.checkpoint, self.url = folder / "model", (folder / "bucket").as_uri()
        self.model = build(kind)
        self.prepare = [name_map(self.model), *([Fp8()] if kind.endswith("fp8") else [])]
        self.save(self.checkpoint)
        self.publisher = dw.Publisher(
            dw.open_bucket(self.url, create=True), assets=self.checkpoint, prepare=self.prepare
        )
        self.versions = []
        self._saved = folder / "saved"
        self._optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0)
        self._words = torch.Generator().manual_seed(7)
        self.publish()

    def publish(self, rate=RARE):
        """Train for a step on every word there is, and commit what that made."""
        if self.versions:
            words = torch.randperm(VOCABULARY, generator=self._words).reshape(4, -1)
            self._optimizer.param_groups[0]["lr"] = rate
            self.model(input_ids=words, labels=words).loss.backward()
            self._optimizer.step()
            for name, buffer in self.model.named_buffers():
                if name.endswith("e_score_correction_bias"):  # a router's, balanced by hand and not by gradients
                    buffer.add_(rate * torch.randn(buffer.shape, generator=self._words))
            self._optimizer.zero_grad()
        self.publisher.publish(checkpoint_tensors(self.model))
        self.publisher.flush(60)
        self.save(self._saved)
        weights = load_file(self._saved / "model.safetensors")
        self.versions.append({name: f"{value:016x}" for name, value in dw.digest(weights).items()})
        return len(self.versions) - 1

    def save(self, folder):
        """The model as a checkpoint for vLLM: what transformers writes, and where it is quantised our fp8 instead."""
        save_checkpoint(folder, self.model)
        for fp8 in self.prepare[1:]:
            quantise(folder, fp8, dict(self.prepare[0](checkpoint_tensors(self.model))))


@pytest.mark.parametrize("combination", [*ALWAYS, *(OFTEN if every else [])], ids=" ".join)
def test_every_version_is_served_bit_for_bit(combination, tmp_path):
    kind, layout = combination
    if kind.endswith("fp8") and not torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM's CPU build serves fp8 on hosts with AMX only")
    chain = Chain(tmp_path, kind)
    options, environ = LAYOUTS[layout]
    server = Server(chain.checkpoint, tmp_path / "vllm.log", options=options, **environ)
    try:
        server.wait().remember()
        walk(chain, server, remade=layout == "packed" or kind == "qwen3-moe-padded")
        newest = server.at_rest()
        with Follower(chain.url, EngineClient(server.url), pin=0) as follower:
            assert follower.step().version == 0
        assert server.at_rest() == server.at_start  # when it had just been started on version 0
    finally:
        server.stop()
        chain.publisher.close(10)
    if not every:
        return
    chain.save(chain.checkpoint)
    fresh = Server(chain.checkpoint, tmp_path / "fresh.log", options=options, **environ)
    try:
        fresh.wait()
        with Follower(chain.url, EngineClient(fresh.url)) as follower:
            assert follower.step() is None
        assert fresh.at_rest() == newest
    finally:
        fresh.stop()


@pytest.mark.nightly
@pytest.mark.parametrize("layout", ["tp2", "packed"])
def test_a_tied_head_that_the_file_repeats_is_one_tensor_in_every_layout(layout, tmp_path):
    """`test_server` does this on one worker, unpacked."""
    model, checkpoint = build("qwen3-tied"), tmp_path / "model"
    save_checkpoint(checkpoint, model)
    repeat_head(checkpoint)
    bucket = dw.open_bucket((tmp_path / "bucket").as_uri(), create=True)
    options, environ = LAYOUTS[layout]
    server = Server(checkpoint, tmp_path / "vllm.log", options=options, **environ)
    try:
        server.wait()
        with (
            dw.Publisher(bucket, base=checkpoint) as publisher,
            Follower(bucket.url, EngineClient(server.url)) as follower,
            EngineClient(server.url) as engine,
        ):
            for version in range(3):
                publisher.publish(model.state_dict())
                publisher.flush(60)
                assert (follower.step() is None) == (version == 0)
                audit = engine.audit()
                right = {name: tensor.detach().bfloat16() for name, tensor in model.named_parameters()}
                assert audit.digests == {name: f"{value:016x}" for name, value in dw.digest(right).items()}
                assert (audit.position.version, audit.mismatched) == (version, [])
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(1e-2 * torch.randn_like(parameter))
    finally:
        server.stop()


def walk(chain, server, *, remade=False):
    """From the checkpoint a server was started on through deltas, a fold, a dense change and a rollback."""
    with Follower(chain.url, EngineClient(server.url)) as follower, EngineClient(server.url) as engine:
        start = server.logprobs([1, 2, 3])
        follower.step()
        modules = [module for worker in engine.placement() for module in worker.remade]
        assert bool(modules) == remade, modules
        assert follower.step() is None  # the checkpoint it was started on is version 0
        for version in (1, 2):
            assert chain.publish() == version
            assert follower.step().from_version == version - 1
            assert_served(chain, engine, version)
        for _ in range(3):
            chain.publish()
        assert (follower.step().from_version, engine.status().position.version) == (2, 5)
        assert_served(chain, engine, 5)
        dense = chain.publish(ALL)
        follower.step()
        assert_served(chain, engine, dense)
        newest = server.logprobs([1, 2, 3])
        assert newest != start
    with Follower(chain.url, EngineClient(server.url), pin=2) as follower, EngineClient(server.url) as engine:
        assert follower.step().version == 2
        assert_served(chain, engine, 2)
    with Follower(chain.url, EngineClient(server.url)) as follower, EngineClient(server.url) as engine:
        chain.publish()
        follower.step()
        assert_served(chain, engine, 7)


def assert_served(chain, engine, version):
    report = engine.audit()
    assert (report.position.version, report.mismatched) == (version, [])
    assert report.digests == chain.versions[version]
    assert httpx.get(f"{engine.url}/weight_info", timeout=30).json()["weight_version"] == str(report.position)
