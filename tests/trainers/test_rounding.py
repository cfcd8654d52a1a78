"""Training whose updates rounding undoes is warned with a measured share, which a twin with fp32 weights confirms."""

import warnings

import pytest
import torch
from accelerate import Accelerator
from learners import Settling, small_model, small_trainer
from runs import commits, fresh, publishing

import deltawire as dw
from deltawire.trainers.hook import publish_after_step
from deltawire.trainers.rounding import RoundingWatch, lost_share
from deltawire.trainers.transformers import DeltaWeightSyncCallback


class Twins:
    """The same weights and gradients, once with the given dtype and once in fp32, under AdamW."""

    def __init__(self, lr, dtype=torch.bfloat16):
        self.random = torch.Generator().manual_seed(0)
        self.start = (0.02 * torch.randn(300, 300, generator=self.random)).to(dtype).float()
        self.weights = [torch.nn.Parameter(self.start.clone().to(kind)) for kind in (dtype, torch.float32)]
        self.optimizers = [torch.optim.AdamW([weight], lr=lr, weight_decay=0.0) for weight in self.weights]

    def step(self):
        gradient = torch.randn(300, 300, generator=self.random)
        for weight, optimizer in zip(self.weights, self.optimizers, strict=True):
            weight.grad = gradient.to(weight.dtype)
            optimizer.step()

    def truly_lost(self):
        """1 - how far the first went along the way of the second."""
        narrow, wide = (weight.detach().float() - self.start for weight in self.weights)
        return 1 - float((narrow * wide).sum() / (wide * wide).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lr", [1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
def test_the_share_is_what_a_twin_with_fp32_weights_shows(lr, dtype):
    twins = Twins(lr, dtype)
    twins.step()
    assert lost_share(twins.optimizers[0]) == pytest.approx(max(0, twins.truly_lost()), abs=0.03)


def test_at_a_learning_rate_of_1e_6_bf16_weights_lose_98_percent():
    twins = Twins(1e-6)
    for _ in range(5):
        twins.step()
    assert 0.97 < lost_share(twins.optimizers[0]) <= 1
    assert 0.97 < twins.truly_lost() <= 1


def test_measuring_changes_no_weight():
    twins = Twins(1e-3)
    twins.step()
    before = twins.weights[0].detach().clone()
    lost_share(twins.optimizers[0])
    assert torch.equal(before, twins.weights[0])


def test_there_is_nothing_to_measure_before_the_first_step_without_adam_and_with_fp32_weights():
    twins = Twins(1e-6)
    assert lost_share(twins.optimizers[0]) is None
    twins.step()
    assert lost_share(twins.optimizers[1]) is None
    descent = torch.optim.SGD([twins.weights[0]], lr=1e-6, momentum=0.9)
    descent.step()
    assert lost_share(descent) is None


def test_the_watch_warns_once_and_measures_rarely():
    twins, watch, told = Twins(1e-6), RoundingWatch(), []
    with pytest.warns(UserWarning, match=r"rounding undoes 9\d% of an update: at a learning rate of 1\.0e-06") as seen:
        for _ in range(9):
            twins.step()
            told.append(watch.after_step(twins.optimizers[0]))
    assert len(seen) == 1
    assert [step for step, numbers in enumerate(told, 1) if numbers] == [1, 2, 4, 8]
    assert told[7]["rounding_lost"] > 0.97


def test_a_warm_up_is_not_judged():
    twins, watch = Twins(1e-3), RoundingWatch()
    schedule = torch.optim.lr_scheduler.LambdaLR(twins.optimizers[0], lambda step: min(1.0, (step + 1) / 1000))
    twins.step()
    schedule.step()
    assert lost_share(twins.optimizers[0]) > 0.9
    assert watch.after_step(twins.optimizers[0]) == {}


def test_a_trainer_with_bf16_weights_warns_and_its_commits_tell_the_share(tmp_path):
    url, model = (tmp_path / "bucket").as_uri(), small_model(dtype=torch.bfloat16)
    trainer = small_trainer(model, tmp_path / "out", Settling(url), learning_rate=1e-6)
    with pytest.warns(UserWarning, match="rounding undoes") as seen:
        trainer.train()
    assert len(seen) == 1
    told = {commit.step: commit.metrics.get("rounding_lost") for commit in commits(dw.open_bucket(url))}
    assert told[1] > 0.5 and told[0] is None


def test_fp32_weights_are_never_warned_of(tmp_path):
    url = (tmp_path / "bucket").as_uri()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small_trainer(small_model(), tmp_path / "out", DeltaWeightSyncCallback(url), learning_rate=1e-6).train()
    assert "rounding_lost" not in commits(dw.open_bucket(url))[-1].metrics


def test_the_hook_warns_too_inside_accelerate():
    bucket, model = fresh(), small_model(dtype=torch.bfloat16)
    model, optimizer = Accelerator(cpu=True).prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-6))
    with publishing(bucket) as publisher:
        publish_after_step(publisher, model, optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with pytest.warns(UserWarning, match="rounding undoes"):
            optimizer.step()
    assert commits(bucket)[-1].metrics["rounding_lost"] > 0.5


def test_updates_that_are_no_numbers_measure_nothing():
    weight = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    weight.grad = torch.full_like(weight, float("nan"))
    optimizer.step()
    assert lost_share(optimizer) is None
