"""The real transformers.Trainer publishes once for each optimizer step, and a killed one continues its run."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from learners import Settling, small_model, small_trainer
from runs import PATIENCE, commits, publishing, read_weights, served
from transformers import AutoModelForCausalLM, TrainerCallback

import deltawire as dw
from deltawire.errors import BadUrl, BucketError, DeltaWireError, DtypeMismatch
from deltawire.trainers.transformers import DeltaWeightSyncCallback

PROGRAM = Path(__file__).parents[1] / "support" / "learners.py"


class Remember(TrainerCallback):
    """What the policy was after each step."""

    def __init__(self):
        self.policies = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        self.policies.append(served(dict(kwargs["model"].named_parameters())))


@pytest.fixture
def url(tmp_path):
    return (tmp_path / "bucket").as_uri()


def test_each_optimizer_step_is_a_version_though_gradients_accumulate_over_two_batches(tmp_path, url):
    remember = Remember()
    trainer = small_trainer(small_model(), tmp_path / "out", Settling(url), remember)
    trainer.train()
    bucket = dw.open_bucket(url)
    chain = commits(bucket)
    assert [(commit.version, commit.step) for commit in chain] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    for commit, policy in zip(chain, remember.policies, strict=True):
        assert dw.equal(read_weights(bucket, commit.version), policy)
    assert not dw.equal(remember.policies[0], remember.policies[3])


def test_the_run_materializes_into_a_folder_that_transformers_loads_as_the_trained_policy(tmp_path, url):
    model = small_model()
    small_trainer(model, tmp_path / "out", DeltaWeightSyncCallback(url)).train()
    dw.materialize(dw.open_bucket(url), tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.bfloat16)
    assert dw.equal(dict(loaded.named_parameters()), served(dict(model.named_parameters())))


def test_a_buffer_of_the_checkpoint_is_published_too(tmp_path, url):
    model = small_model()
    model.register_buffer("bias", torch.ones(3))
    small_trainer(model, tmp_path / "out", DeltaWeightSyncCallback(url)).train()
    assert read_weights(dw.open_bucket(url)).keys() == {*dict(model.named_parameters()), "bias"}


def test_a_commit_tells_what_the_trainer_logged_last_and_of_which_step(tmp_path, url):
    trainer = small_trainer(small_model(), tmp_path / "out", Settling(url, metrics=["loss", "absent"]))
    trainer.train()
    logged = {entry["step"]: float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry}
    told = [commit.metrics for commit in commits(dw.open_bucket(url))]
    assert told[:2] == [{}, {}]
    assert told[2:] == [{"loss": logged[step], "logged_step": step} for step in (1, 2)]


class Reporting(TrainerCallback):
    """What an integration, W&B's or another, is given to log."""

    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append(dict(logs))


def test_what_a_publish_reports_is_in_what_the_trainer_logs_and_hands_to_others(tmp_path, url):
    first = Reporting()
    trainer = small_trainer(small_model(), tmp_path / "out", first, DeltaWeightSyncCallback(url))
    for _ in range(2):  # a second training puts nobody there twice
        trainer.train()
    logged = [entry for entry in first.logged if "loss" in entry]
    versions = [entry["deltawire/version"] for entry in logged]
    assert len(versions) == 6 and versions == sorted(versions)
    assert all(0 < entry["deltawire/density"] < 1 and entry["deltawire/wire_bytes"] > 0 for entry in logged)
    assert {entry["deltawire/failing"] for entry in logged} == {0.0}
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["deltawire/version"] for entry in history] == versions[-3:]
    assert sum(type(callback).__name__ == "IntoLogs" for callback in trainer.callback_handler.callbacks) == 1


def test_a_publisher_of_the_callers_is_flushed_and_stays_open(tmp_path, url):
    bucket, model = dw.open_bucket(url, create=True), small_model()
    with publishing(bucket) as publisher:
        callback = DeltaWeightSyncCallback(publisher)
        small_trainer(model, tmp_path / "out", callback).train()
        assert publisher.position.version == callback.report.version == 3
        publisher.publish(model.named_parameters(), step=99)
        assert publisher.flush(PATIENCE).version == 4
    with pytest.raises(TypeError, match="give dtype to the Publisher itself"):
        DeltaWeightSyncCallback(publisher, dtype="F16")


def test_the_best_weights_put_back_at_the_end_are_published_too(tmp_path, url):
    model = small_model()
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    options = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1, **best}
    trainer = small_trainer(model, tmp_path / "out", Settling(url), **options)
    trainer.train()
    assert trainer.state.best_global_step == 1
    assert dw.equal(read_weights(dw.open_bucket(url)), served(dict(model.named_parameters())))
    assert dw.equal(read_weights(dw.open_bucket(url), 4), read_weights(dw.open_bucket(url), 1))


def test_what_was_captured_before_training_raised_is_sent_on_the_way_out(tmp_path, url):
    class Fail(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise RuntimeError("the reward server went away")

    with pytest.raises(RuntimeError, match="reward server"), DeltaWeightSyncCallback(url) as callback:
        small_trainer(small_model(), tmp_path / "out", callback, Fail()).train()
    assert [commit.step for commit in commits(dw.open_bucket(url))][-1] == 2


def test_a_process_that_ends_by_an_exception_sends_what_was_captured(tmp_path, url):
    command = [sys.executable, str(PROGRAM), "stopped", str(tmp_path), url]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert "stopped by the test" in done.stderr
    assert [commit.step for commit in commits(dw.open_bucket(url))][-1] == 1


def test_a_second_training_continues_the_run(tmp_path, url):
    model = small_model()
    for _ in range(2):
        small_trainer(model, tmp_path / "out", Settling(url), max_steps=1).train()
    chain = commits(dw.open_bucket(url))
    assert [commit.step for commit in chain] == [0, 1, 0, 1]
    assert len({commit.run for commit in chain}) == 1
    assert dw.equal(read_weights(dw.open_bucket(url)), served(dict(model.named_parameters())))


def test_a_killed_trainer_resumes_from_its_checkpoint_and_goes_on_in_the_same_run(tmp_path, url):
    out, bucket, remember = tmp_path / "out", dw.open_bucket(url, create=True), Remember()
    command = [sys.executable, str(PROGRAM), "killed", str(out), url, "3"]
    first = subprocess.run(command, check=False, capture_output=True, timeout=120)
    assert first.returncode == -signal.SIGKILL, first.stderr
    before = commits(bucket)
    assert before[0].step == 0
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    trainer = small_trainer(small_model(), out, Settling(url), remember, **options)
    trainer.train(resume_from_checkpoint=True)
    chain = commits(bucket)
    assert chain[: len(before)] == before
    assert len({commit.run for commit in chain}) == 1
    assert [commit.step for commit in chain[len(before) :]] == [2, 3, 4, 5]
    for commit, policy in zip(chain[len(before) :], remember.policies, strict=True):
        assert dw.equal(read_weights(bucket, commit.version), policy)


def test_only_the_first_process_publishes(tmp_path, url):
    callback = DeltaWeightSyncCallback(url)
    trainer = small_trainer(small_model(), tmp_path / "out", callback)
    trainer.state.is_world_process_zero = False
    arguments = (trainer.args, trainer.state, trainer.control)
    callback.on_train_begin(*arguments, model=trainer.model)
    callback.on_step_end(*arguments, model=trainer.model)
    callback.on_train_end(*arguments, model=trainer.model)
    assert callback.report is None and not (tmp_path / "bucket").exists()


def test_two_processes_that_train_one_model_publish_it_once(tmp_path, url):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, str(PROGRAM), "together", str(tmp_path / "out"), url]
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200, env=settings)
    assert done.returncode == 0, done.stderr
    chain = commits(dw.open_bucket(url))
    assert (chain[0].step, chain[-1].step, len({commit.writer for commit in chain})) == (0, 3, 1)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert dw.equal(read_weights(dw.open_bucket(url)), served(dict(trained.named_parameters())))


def test_sharded_weights_are_refused_on_every_process(tmp_path, url):
    model, callback = small_model(), DeltaWeightSyncCallback(url)
    model.model.norm.weight.ds_id = 1  # what DeepSpeed marks the weights with that it has shared out
    trainer = small_trainer(small_model(), tmp_path / "out", callback)
    trainer.state.is_world_process_zero = False
    with pytest.raises(DtypeMismatch, match=r"norm\.weight is sharded over processes"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)


def test_what_is_misspelt_is_refused_before_training(url):
    with pytest.raises(BadUrl, match="not the address of a bucket"):
        DeltaWeightSyncCallback("fil:///bucket")
    with pytest.raises(TypeError, match="neither the address"):
        DeltaWeightSyncCallback(Path("/bucket"))
    with pytest.raises(TypeError, match="codecs"):
        DeltaWeightSyncCallback(url, codecs="gap")
    with pytest.raises(TypeError, match=r"\['loss'\]"):
        DeltaWeightSyncCallback(url, metrics="loss")


def test_a_callback_that_cannot_open_its_bucket_leaves_no_temporary_files(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    trainer = small_trainer(small_model(), tmp_path / "out", DeltaWeightSyncCallback(f"file://{tmp_path}/file/bucket"))
    with pytest.raises(BucketError, match="file/bucket"):
        trainer.train()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_training_inside_another_with_the_same_callback_says_that_each_needs_its_own(tmp_path, url):
    callback = DeltaWeightSyncCallback(url)
    inner = small_trainer(small_model(1), tmp_path / "inner", callback)

    class Nest(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            inner.train()

    with pytest.raises(DeltaWireError, match="a callback of its own"):
        small_trainer(small_model(), tmp_path / "outer", Nest(), callback).train()
