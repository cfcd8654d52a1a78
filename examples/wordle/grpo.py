"""Group relative policy optimisation as pure functions: advantages in a group, log-probabilities, the clipped loss.

Shao et al. 2024, "DeepSeekMath", eq. 3 (the objective) and section 4.1.2 (outcome supervision), without its KL term;
the mean over all tokens of a batch and the wider upper clip are those of Yu et al. 2025, "DAPO", eq. 8.
"""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, floor: float = 1e-4) -> Tensor:
    """A[g, i] = (r[g, i] - mean(r[g])) / (std(r[g]) + floor), for rewards [groups, members].

    A group whose members all got the same reward has no say: its advantages are 0.
    """
    return (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + floor)


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log p(ids[:, t + 1] | ids[:, : t + 1]) in fp32, [batch, length - 1], from logits [batch, length, vocabulary]."""
    return torch.log_softmax(logits[:, :-1].float(), dim=-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def token_entropy(logits: Tensor) -> Tensor:
    """-sum over v of p(v) log p(v), in nats: what is still open at each position, [batch, length - 1]."""
    logprobs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the tokens the mask picks, whatever episode they belong to."""
    return (values * mask).sum() / mask.sum()


def clipped_loss(
    logprobs: Tensor, behaviour: Tensor, advantages: Tensor, mask: Tensor, *, low: float = 0.2, high: float = 0.28
) -> Tensor:
    """-mean over the masked tokens of min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), a scalar.

    ratio = exp(logprobs - behaviour): the policy being trained over the one that sampled, both [batch, length], so that
    samples of an older version still point the right way. `advantages` is [batch], `mask` [batch, length].
    """
    ratio = torch.exp((logprobs - behaviour) * mask)
    advantage = advantages[:, None]
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    return -masked_mean(gain, mask)
