"""The objective, against cases worked by hand."""

import math

import pytest
import torch
from examples.wordle.grpo import clipped_loss, group_advantages, masked_mean, token_entropy, token_logprobs


def test_advantages_are_standard_scores_within_each_group() -> None:
    advantages = group_advantages(torch.tensor([[1.0, 0.0], [10.0, 30.0]]), floor=0.0)
    root = math.sqrt(0.5)  # (1 - 0.5) / std, and the std of two values is their distance over the root of two
    torch.testing.assert_close(advantages, torch.tensor([[root, -root], [-root, root]]))


def test_a_group_of_equal_rewards_has_no_say() -> None:
    assert group_advantages(torch.full((1, 4), 0.7)).abs().max() < 1e-3


def test_the_loss_is_the_clipped_objective_over_all_masked_tokens() -> None:
    behaviour = torch.zeros(2, 3)
    ratios = torch.tensor([[1.0, 1.5, 9.0], [0.5, 1.1, 1.5]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    loss = clipped_loss(ratios.log(), behaviour, torch.tensor([1.0, -2.0]), mask, low=0.2, high=0.28)
    # A = 1: 1, then 1.5 clipped to 1.28. A = -2: 0.5 clipped to 0.8, then 1.1, then 1.5, whose penalty is never clipped
    assert loss.item() == pytest.approx(-(1.0 + 1.28 - 2 * (0.8 + 1.1 + 1.5)) / 5)


def test_a_ratio_beyond_the_clip_moves_the_policy_no_further() -> None:
    logprobs = torch.tensor([[math.log(1.5), 0.0]], requires_grad=True)
    clipped_loss(logprobs, torch.zeros(1, 2), torch.tensor([1.0]), torch.ones(1, 2)).backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, -0.5]]))


def test_tokens_outside_the_mask_count_for_nothing_however_wild() -> None:
    logprobs = torch.tensor([[0.0, 500.0]], requires_grad=True)
    loss = clipped_loss(logprobs, torch.zeros(1, 2), torch.tensor([1.0]), torch.tensor([[1.0, 0.0]]))
    loss.backward()
    assert loss.item() == -1.0
    assert logprobs.grad is not None
    assert logprobs.grad[0, 1] == 0.0


def test_logprobs_are_those_of_the_next_token() -> None:
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(4.0), 0.0], [7.0, 7.0]]])
    logprobs = token_logprobs(logits, torch.tensor([[0, 1, 0]]))
    torch.testing.assert_close(logprobs, torch.tensor([[math.log(3 / 4), math.log(4 / 5)]]))


def test_entropy_is_the_log_of_the_choices_where_all_are_alike_and_zero_where_one_is_sure() -> None:
    logits = torch.tensor([[[5.0] * 8, [1000.0] + [0.0] * 7, [0.0] * 8]])
    torch.testing.assert_close(token_entropy(logits), torch.tensor([[math.log(8), 0.0]]))


def test_the_mean_over_tokens_weighs_long_episodes_more() -> None:
    values = torch.tensor([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]])
    assert masked_mean(values, torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])).item() == 2.0
