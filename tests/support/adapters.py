"""A PEFT adapter that learns to count, its run in a bucket, and what transformers with PEFT say of it."""

import copy
from pathlib import Path

import peft
import torch
from servers import Server
from transformers import AutoModelForCausalLM

import deltawire as dw
from deltawire.trainers import lora
from deltawire.vllm.adapters import AdapterFollower

RANK = 8


class Learner:
    """An adapter on every linear layer of a base; `train` takes AdamW steps."""

    def __init__(self, base: torch.nn.Module, *, rate: float = 1e-3, rank: int = RANK, device: str = "cpu") -> None:
        torch.set_num_threads(1)
        torch.manual_seed(1)
        config = peft.LoraConfig(r=rank, lora_alpha=128, target_modules="all-linear", task_type="CAUSAL_LM")
        self._tokens = torch.arange(16, device=device)[None]
        self.model = peft.get_peft_model(base.to(device), config)
        self.optimizer = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=rate)

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.model(input_ids=self._tokens, labels=self._tokens).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def served(self) -> torch.nn.Module:
        """A copy of model and adapter in bf16, as a server holds them."""
        return copy.deepcopy(self.model).to(torch.bfloat16)


def load(base: Path, adapter: Path) -> torch.nn.Module:
    """The base and an adapter folder, loaded by PEFT alone, in bf16."""
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter)
    return model.to(torch.bfloat16)


@torch.no_grad()
def logprobs(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """The log-probability of every next token after each of these, fp32 [tokens, vocabulary]."""
    return model(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)


class AdapterRun:
    """An adapter on the base that trains fast enough for versions to differ, published to a folder bucket."""

    def __init__(self, base: Path, folder: Path, device: str = "cpu") -> None:
        self.base, self.folder = base, folder
        self.url = (folder / "bucket").as_uri()
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.learner = Learner(model, rate=1e-2, device=device)
        assets = lora.save_config(self.learner.model, folder / "config")
        self.publisher = dw.Publisher(dw.open_bucket(self.url, create=True), assets=assets)
        self.versions = 0

    def publish(self) -> dw.PublishReport:
        """The next version, a few steps of training after the one before."""
        if self.versions:
            self.learner.train(5)
        self.versions += 1
        report = self.publisher.publish(lora.adapter_tensors(self.learner.model))
        self.publisher.flush(60)
        return report

    def follower(self, server: Server, **options) -> AdapterFollower:
        return AdapterFollower(self.url, server.url, "lora", folder=self.folder / "cache", **options)

    def expected(self, version: int, tokens: list[int]) -> torch.Tensor:
        """What PEFT alone says of a version as anyone may materialise it."""
        return logprobs(load(self.base, self.materialized(version)), tokens)

    def materialized(self, version: int) -> Path:
        """A version as a folder of its own."""
        return dw.materialize(dw.open_bucket(self.url), self.folder / f"v{version}", version).folder
