"""Small seeded models, and real vLLM servers over them that stop with the test."""

import copy
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from deltawire.demo.processes import SUPERVISOR
from deltawire.trainers.state import fp32_marks

START_SECONDS = 420
"""alone it takes 20 to 40; beside another test's workers, all bound to the same cores, it took 240 and more"""
GRACE = 20
VOCABULARY = 300
LONGEST = 2048
"""tokens of a sequence"""
SLOW_PLUGIN = Path(__file__).parent / "slow_plugin"


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": LONGEST,
}


def tiny_qwen3() -> Qwen3ForCausalLM:
    """A tied Qwen3 of about 93,000 fp32 parameters, the same on every call."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen3ForCausalLM(Qwen3Config(**{**SMALL, **heads}, tie_word_embeddings=True))


IN_BLOCKS = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8}
"""of every matrix, each of two workers holds whole blocks of 128 by 128"""
EXPERTS = {"num_experts_per_tok": 2, "tie_word_embeddings": False}
MODELS = {
    "qwen3-tied": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=True)),
    "qwen3-untied": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=False)),
    "qwen3-fp8": lambda: Qwen3ForCausalLM(Qwen3Config(**{**SMALL, **IN_BLOCKS}, tie_word_embeddings=False)),
    "qwen3-one-kv-head": lambda: Qwen3ForCausalLM(Qwen3Config(**{**SMALL, "num_key_value_heads": 1})),
    "qwen2-biases": lambda: Qwen2ForCausalLM(Qwen2Config(**without(SMALL, "head_dim", hidden_size=128))),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SMALL)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SMALL, **EXPERTS, num_experts=4, moe_intermediate_size=64)
    ),
    "glm4-moe": lambda: (
        Glm4MoeForCausalLM(  # a dense layer, then experts whose router has a bias that vLLM keeps in fp32
            Glm4MoeConfig(
                **SMALL,
                **EXPERTS,
                n_routed_experts=4,
                n_shared_experts=1,
                n_group=1,
                topk_group=1,
                first_k_dense_replace=1,
                moe_intermediate_size=64,
                use_qk_norm=True,
            )
        )
    ),
    "ernie-moe": lambda: Ernie4_5_MoeForCausalLM(  # its routers are fp32, in transformers and in vLLM
        Ernie4_5_MoeConfig(
            **SMALL,
            moe_num_experts=4,
            moe_k=2,
            moe_intermediate_size=64,
            moe_num_shared_experts=1,
            moe_layer_start_index=1,
            moe_layer_end_index=1,
        )
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, **EXPERTS, num_local_experts=4)),
    "qwen3-moe-padded": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SMALL, **EXPERTS, num_experts=4, moe_intermediate_size=40)
    ),
}


def without(options: dict, name: str, **others: object) -> dict:
    return {**{key: value for key, value in options.items() if key != name}, **others}


def build(kind: str):
    """A small seeded model of a kind, in fp32; every element differs from what it was made with, norms too."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def save_checkpoint(folder: Path, model=None) -> None:
    """The model in bf16, but what it keeps in fp32 and a router's bias, with a tokenizer of one word per token; the
    model stays as it is."""
    model = model or tiny_qwen3()
    saved = copy.deepcopy(model).to(torch.bfloat16)
    for name in fp32_marks(model):
        saved.get_parameter(name).data = model.get_parameter(name).detach().clone()
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            saved.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = bias.clone()
    saved.save_pretrained(folder)
    save_tokenizer(folder)


def save_tokenizer(folder: Path, words: int = VOCABULARY) -> None:
    """A tokenizer of one word per token, "w17", for the first tokens of a vocabulary."""
    known = Tokenizer(WordLevel({f"w{number}": number for number in range(words)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=known, unk_token="w0").save_pretrained(folder)


def repeat_head(folder: Path) -> None:
    """Put the tied head beside the embedding in a checkpoint's file."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


RUNNING = "vllm:num_requests_running{"
EAGER = ("--enforce-eager",)
"""how vLLM runs its passes on a host without a GPU: no CUDA graphs, no torch.compile"""


class Server:
    """One vLLM server under a supervisor. It ends with its workers even when the tests are killed; `url`, `stop()`.
    `mode` are the options that say how it runs its passes."""

    def __init__(
        self,
        model: Path,
        log: Path,
        *,
        backend: str | None = "deltawire",
        mode: tuple[str, ...] = EAGER,
        options: tuple[str, ...] = (),
        port: int = 0,
        **environ: str,
    ) -> None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            port = probe.getsockname()[1]
        self.model, self.port = model, port
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.command = command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--served-model-name", "policy", "--dtype", "bfloat16", "--max-model-len", str(LONGEST)),
            *("--host", "127.0.0.1", "--port", str(port)),
            *mode,
            *options,
            *(("--weight-transfer-config", f'{{"backend":"{backend}"}}') if backend else ()),
        ]
        self.environment = environment = {
            **os.environ,
            **{"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
            **environ,
        }
        self._slow = log.with_suffix(".slow")
        environment["DELTAWIRE_TEST_SLOW"] = str(self._slow)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SLOW_PLUGIN), environment.get("PYTHONPATH")]))
        reading, self._lifeline = os.pipe()
        kept = [sys.executable, str(SUPERVISOR), str(reading), str(GRACE), *command]
        with log.open("wb") as output:
            self._process = subprocess.Popen(kept, stdout=output, stderr=output, env=environment, pass_fds=[reading])
        os.close(reading)

    def wait(self) -> "Server":
        """Until it answers; fails with the end of its log."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    self._let_others_run()
                    return self
            time.sleep(0.25)
        raise AssertionError(f"vLLM did not start:\n{self.log.read_text(errors='replace')[-3000:]}")

    def _let_others_run(self) -> None:
        """Put a tensor-parallel server behind all others, where the kernel groups sessions. While its workers wait for
        each other they only yield: on two cores an import beside them takes 8 s for 0.1 s, and tests time out."""
        if "--tensor-parallel-size" in self.command:
            for child in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
                with suppress(OSError):
                    Path(f"/proc/{child}/autogroup").write_text("19")

    def remember(self) -> None:
        """Keep what the server holds and answers now, fresh, to compare with later."""
        self.at_start = self.at_rest()

    def at_rest(self) -> tuple[dict[str, str], list[float]]:
        """vLLM's checksum of every live parameter, and what a prompt is answered with."""
        return self.checksums(), self.logprobs([1, 2, 3])

    @property
    def pid(self) -> int:
        """The supervisor's, whose children the server and its workers are."""
        return self._process.pid

    def stop(self) -> None:
        """End it and its workers."""
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None
        self._process.wait(GRACE + 30)

    @contextmanager
    def slowed(self) -> Iterator[None]:
        """Make tokens slowly meanwhile, so that other calls are answered before a request is over."""
        self._slow.touch()
        try:
            yield
        finally:
            self._slow.unlink()

    def checksums(self) -> dict[str, str]:
        """vLLM's own checksum of every live parameter."""
        answer = httpx.post(f"{self.url}/weight_checker", json={"action": "checksum"}, timeout=60)
        return answer.json()["checksums"]

    def requests_running(self) -> int:
        """How many requests vLLM's scheduler holds right now, as its metrics say."""
        metrics = httpx.get(f"{self.url}/metrics", timeout=60).text
        return sum(int(float(line.split()[-1])) for line in metrics.splitlines() if line.startswith(RUNNING))

    def greedy(self, prompt: list[int], length: int = 8, model: str = "policy") -> list[tuple[str, float]]:
        """Greedy generation: each token that it chose, as "token_id:17", and its log-probability."""
        body = {"model": model, "prompt": prompt, "max_tokens": length, "temperature": 0, "logprobs": 0,
                "return_tokens_as_token_ids": True}  # fmt: skip
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        chosen = answer.json()["choices"][0]["logprobs"]
        return list(zip(chosen["tokens"], chosen["token_logprobs"], strict=True))

    def logprobs(self, prompt: list[int], length: int = 8) -> list[float]:
        """Greedy generation: the log-probability of each token it chose."""
        return [logprob for _, logprob in self.greedy(prompt, length)]
