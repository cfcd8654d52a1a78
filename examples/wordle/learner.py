"""One optimizer step: a rollout as tensors, the GRPO objective over it, and what the step saw."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from examples.wordle.grpo import clipped_loss, group_advantages, masked_mean, token_entropy, token_logprobs
from examples.wordle.rollouts import Rollout
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

BETAS = (0.9, 0.95)
"""Adam's: the second moment forgets in 20 steps, since rewards and gradients change fast on a toy."""
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
"""How far the ratio may move before it earns nothing more."""
LONGEST_GRADIENT = 1.0


@dataclass(frozen=True, slots=True)
class Learning:
    """What differs between a toy and a pretrained model. `entropy_bonus` is what a nat of entropy is worth in reward.
    `half` computes in bf16 on the fp32 weights, which is several times as fast where the processor knows bf16. `rows`
    episodes at a time go through the model, for what that takes of memory; the step is the same."""

    entropy_bonus: float = 0.0
    half: bool = False
    rows: int = 64


@dataclass(frozen=True, slots=True)
class Batch:
    """A rollout as tensors, an episode a row: ids [episodes, length]; mask and behaviour [episodes, length - 1]."""

    ids: Tensor
    mask: Tensor
    behaviour: Tensor
    advantages: Tensor

    def parts(self, rows: int) -> Iterator["Batch"]:
        """The same in so many rows at a time."""
        for start in range(0, len(self.ids), rows):
            these = slice(start, start + rows)
            yield Batch(self.ids[these], self.mask[these], self.behaviour[these], self.advantages[these])


def as_batch(rollout: Rollout, device: str = "cpu") -> Batch:
    """Pad the episodes to one length. Padding needs no attention mask: it comes last, and attention looks back."""
    episodes = [episode for group in rollout.groups for episode in group]

    def padded(rows: list[list[Any]], dtype: torch.dtype) -> Tensor:
        return pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True).to(device)

    rewards = torch.tensor([[episode.reward for episode in group] for group in rollout.groups], device=device)
    return Batch(
        ids=padded([episode.tokens for episode in episodes], torch.long),
        mask=padded([episode.sampled for episode in episodes], torch.float32)[:, 1:],
        behaviour=padded([episode.logprobs for episode in episodes], torch.float32)[:, 1:],
        advantages=group_advantages(rewards).flatten(),
    )


def new_optimizer(model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW without weight decay, its moments at zero."""
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=BETAS, weight_decay=0.0, fused=True)


def optimize(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, learning: Learning
) -> dict[str, float]:
    """One optimizer step on one batch, and what it saw: the loss, the entropy in nats per sampled token, the gradient's
    norm before clipping, and how far the log-probabilities are from those the policy was sampled with."""
    optimizer.zero_grad()
    seen = [_backward(model, part, learning, part.mask.sum() / batch.mask.sum()) for part in batch.parts(learning.rows)]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), LONGEST_GRADIENT)
    optimizer.step()
    loss, entropy, off_policy = (sum(values) for values in zip(*seen, strict=True))
    return {"loss": loss, "entropy": entropy, "gradient_norm": norm.item(), "off_policy": off_policy}


def _backward(model: torch.nn.Module, part: Batch, learning: Learning, share: Tensor) -> tuple[float, float, float]:
    """Add the gradient of a part of a batch, which has this share of its tokens. Its share of the loss, of the entropy
    and of how far the log-probabilities are off."""
    read = int(part.mask.any(dim=0).nonzero()[0])  # tokens that all rows begin with: nothing is asked of their logits
    ids, mask, behaviour = part.ids[:, read:], part.mask[:, read:], part.behaviour[:, read:]
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=learning.half):
        logits = model(input_ids=part.ids, logits_to_keep=ids.shape[1]).logits
    logprobs = token_logprobs(logits, ids)
    with torch.set_grad_enabled(learning.entropy_bonus > 0):
        entropy = masked_mean(token_entropy(logits), mask)
    loss = clipped_loss(logprobs, behaviour, part.advantages, mask, low=CLIP_LOW, high=CLIP_HIGH)
    ((loss - learning.entropy_bonus * entropy) * share).backward()
    off_policy = masked_mean((logprobs.detach() - behaviour).abs(), mask)
    return (loss * share).item(), (entropy * share).item(), (off_policy * share).item()
