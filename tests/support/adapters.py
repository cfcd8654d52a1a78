"""A PEFT adapter that learns to count, and what transformers with PEFT say of one: for tests of adapter runs."""

import copy
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM

RANK = 8


class Learner:
    """An adapter on every linear layer of a base; `train` takes AdamW steps."""

    def __init__(self, base: torch.nn.Module, *, rate: float = 1e-3, rank: int = RANK) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(1)
        config = peft.LoraConfig(r=rank, lora_alpha=128, target_modules="all-linear", task_type="CAUSAL_LM")
        self._tokens = torch.arange(16)[None]
        self.model = peft.get_peft_model(base, config)
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
