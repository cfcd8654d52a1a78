"""DeltaWeightTransfer by itself: what TRL's protocol asks of it, and for whom it waits. tests/vllm has TRL and vLLM."""

import time
from collections import defaultdict
from contextlib import contextmanager

import msgspec
import peft
import pytest
import torch
from faults import Faulty, down
from following import following
from runs import PATIENCE, commits, fresh, read_weights
from safetensors.torch import save_file
from small import Fused, make_weights
from stub_engine import StubEngine

import deltawire as dw
from deltawire.errors import AccessRefused, BadUrl, EngineUnsupported, NotServed, ShapeMismatch
from deltawire.runlog import heartbeats
from deltawire.runlog.heartbeats import Heartbeat
from deltawire.trainers.trl import DeltaWeightTransfer

BRIEFLY = 2.0
"""seconds of a wait that is to fail; the commit has to fit into it, on a busy machine too"""
QUICK = {"timeout": PATIENCE, "poll": 0.01}


@contextmanager
def sending(bucket, *arguments, **options):
    """A transfer as TRL uses it, let go of at the end."""
    transfer = DeltaWeightTransfer(bucket, *arguments, **{**QUICK, **options})
    try:
        transfer.init_weight_transfer()
        yield transfer
    finally:
        transfer.destroy()


@pytest.fixture
def url(tmp_path):
    return (tmp_path / "bucket").as_uri()


@pytest.fixture
def held():
    """A server's weights, which are no version yet."""
    return Fused(make_weights(seed=5))


@pytest.fixture
def engine(held):
    with StubEngine(held) as engine:
        yield engine


def rounded(weights):
    return {name: tensor.bfloat16() for name, tensor in weights.items()}


def stream(weights, taken):
    """As TRL yields them: one at a time; what was taken, and that the end was reached, is noted."""
    for name, tensor in weights.items():
        taken.append(name)
        yield name, tensor
    taken.append("the end")


def beat(url, version, run, **said):
    heartbeats.beat(dw.open_bucket(url), Heartbeat("another", run=run, version=version, **said))


def test_making_one_opens_nothing_because_every_rank_does(url, tmp_path):
    DeltaWeightTransfer(url, ["http://127.0.0.1:1"])
    assert not (tmp_path / "bucket").exists()


def test_a_misspelt_option_or_address_is_refused_before_anything_trains(url):
    with pytest.raises(BadUrl, match="not the address of a bucket"):
        DeltaWeightTransfer("fil:///bucket")
    with pytest.raises(TypeError, match="asets"):
        DeltaWeightTransfer(url, asets="model")
    with pytest.raises(ValueError, match="comit"):
        DeltaWeightTransfer(url, wait_for="comit")


@pytest.mark.parametrize("asked", ["the heartbeats", "vLLM"])
def test_send_weights_returns_once_a_replica_serves_what_was_sent(url, engine, held, asked):
    weights, taken = make_weights(), []
    nowhere = "http://127.0.0.1:9"
    with (
        sending(url, None if asked == "the heartbeats" else [nowhere, engine.url]) as transfer,
        following(url, engine.url),
    ):
        for _ in range(4):
            transfer.pause()
            transfer.send_weights(stream(weights, taken))
            assert dw.equal(held.served(), rounded(weights))
            assert engine.weight_version == str(transfer.position)
            transfer.resume()
            weights["a"] += 1
    assert taken == ["a", "b", "v", "the end"] * 4


def test_weights_that_did_not_change_are_a_version_too_and_are_served(url, engine):
    weights = make_weights()
    with sending(url) as transfer, following(url, engine.url):
        for version in range(3):
            transfer.send_weights(iter(weights.items()))
            assert (transfer.position.version, transfer.last.version) == (version, version)
        assert engine.weight_version == str(transfer.position)
        assert transfer.last.changed == 0
        assert [position.version for position in transfer.policies] == [0, 1, 2], "what TRL tags 1, 2, 3"


def test_what_is_trained_is_what_comes_and_the_rest_is_the_bases(url, tmp_path):
    weights = make_weights()
    (tmp_path / "base").mkdir()
    save_file(rounded(weights), tmp_path / "base" / "model.safetensors")
    with sending(url, wait_for="commit", base=tmp_path / "base") as transfer:
        weights["b"][0] += 1
        transfer.send_weights(iter([("b", weights["b"])]))
        assert transfer.last.version == 1
    bucket = dw.open_bucket(url)
    assert dw.equal(read_weights(bucket, base=tmp_path / "base"), rounded(weights))
    with dw.Subscriber(bucket) as subscriber:
        assert [entry.name for entry in subscriber.run.table if entry.trainable] == ["b"]


def test_the_iterator_is_consumed_to_its_end_even_when_sending_fails(url):
    weights, taken = make_weights(), []
    with sending(url, wait_for="commit") as transfer:
        transfer.send_weights(iter(weights.items()))
        with pytest.raises(ShapeMismatch):
            transfer.send_weights(stream({**weights, "a": weights["a"][:1]}, taken))
        assert taken == ["a", "b", "v", "the end"]
        weights["v"] += 1
        transfer.send_weights(iter(weights.items()))
    assert dw.equal(read_weights(dw.open_bucket(url)), rounded(weights))


def test_when_nobody_serves_it_in_time_the_error_says_who_was_seen_and_the_change_is_kept(url, engine, held):
    weights = make_weights()
    with sending(url, timeout=BRIEFLY) as transfer:
        with pytest.raises(NotServed, match=r"no replica was seen at all.*deltawire follow --bucket file:"):
            transfer.send_weights(iter(weights.items()))
        run = transfer.position.run
        beat(url, None, None, error="Unavailable: the disk is away", lag=7)
        with pytest.raises(NotServed, match=rf"serves {run}:1,.*another: no version \(lag 7, .*disk is away"):
            transfer.send_weights(iter(weights.items()))
        beat(url, 99, "0123456789abcdef")  # newer, but of a run that is not ours
        weights["a"] += 1
        with pytest.raises(NotServed, match="another: 0123456789abcdef:99"):
            transfer.send_weights(iter(weights.items()))
    with sending(url) as transfer, following(url, engine.url):
        transfer.send_weights(iter(weights.items()))
        assert dw.equal(held.served(), rounded(weights))
    assert [commit.version for commit in commits(dw.open_bucket(url))] == [0, 1, 2, 3]


def test_what_a_stranger_wrote_as_a_heartbeat_is_told_short_and_without_control_characters(url):
    with sending(url, timeout=BRIEFLY) as transfer:
        said = Heartbeat("another", run="\n" * 4_000, version=3, error="\x07" * 4_000)
        dw.open_bucket(url).put("replicas/another.json", msgspec.json.encode(said))
        with pytest.raises(NotServed, match="another") as caught:
            transfer.send_weights(iter(make_weights().items()))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2_000


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "ftp://host", "http://[::1", "http://"])
def test_what_is_no_address_of_a_server_is_refused_when_training_begins(url, address):
    transfer = DeltaWeightTransfer(url, [address])
    with pytest.raises(EngineUnsupported, match="not the address of a server"):
        transfer.init_weight_transfer()
    with pytest.raises(TypeError, match="a list of addresses"):
        DeltaWeightTransfer(url, address)


def test_servers_that_do_not_answer_or_serve_no_version_are_named(url, engine):
    nowhere = "http://127.0.0.1:9"
    with (
        sending(url, [nowhere, engine.url], timeout=BRIEFLY) as transfer,
        pytest.raises(NotServed, match=rf"{nowhere}: no version \(.*does not answer.*{engine.url}.*'default'"),
    ):
        transfer.send_weights(iter(make_weights().items()))


def test_a_server_that_will_never_say_is_refused_at_once(url, engine):
    engine.fail("/weight_info", 404)
    with sending(url, [engine.url]) as transfer, pytest.raises(EngineUnsupported, match="VLLM_SERVER_DEV_MODE"):
        transfer.send_weights(iter(make_weights().items()))


def test_waiting_for_the_commit_needs_no_replica(url):
    weights = make_weights()
    with sending(url, wait_for="commit") as transfer:
        for version in range(3):
            weights["a"] += 1
            transfer.send_weights(iter(weights.items()))
            assert len(commits(dw.open_bucket(url))) == version + 1
    assert dw.equal(read_weights(dw.open_bucket(url)), rounded(weights))


def test_a_store_that_refuses_ends_the_wait_and_the_error_of_the_training_is_the_one_that_is_seen():
    plan, _ = down(AccessRefused("the token may not write"))
    began = time.monotonic()
    with pytest.raises(AccessRefused, match="may not write") as caught, sending(Faulty(fresh(), plan)) as transfer:
        transfer.send_weights(iter(make_weights().items()))
    assert time.monotonic() - began < PATIENCE
    assert any("may not write" in note for note in caught.value.__notes__)


def test_training_again_after_the_end_continues_the_run(url):
    weights = make_weights()
    transfer = DeltaWeightTransfer(url, wait_for="commit")
    for _ in range(2):
        transfer.send_weights(iter(weights.items()))
        transfer.destroy()
        transfer.destroy()
        weights["b"] += 1
    first, second = commits(dw.open_bucket(url))
    assert (first.run, first.version + 1) == (second.run, second.version)


def test_an_unchanged_heartbeat_is_not_fetched_again(url):
    bucket = dw.open_bucket(url, create=True)
    beat(url, 1, "0123456789abcdef")
    known = heartbeats.read_all(bucket)
    (tmp,) = known
    marked = [(tmp[0], Heartbeat("as it was held"))]
    assert heartbeats.read_all(bucket, marked) == marked
    beat(url, 2, "0123456789abcdef")
    assert [entry.version for _, entry in heartbeats.read_all(bucket, marked)] == [2]


class MergingTrainer:
    """The part of TRL's trainer that merges a PEFT adapter, streams every base weight and unmerges."""

    def __init__(self, model):
        self.model = model

    def _streaming_iter(self):
        for name, parameter in self.model.named_parameters():
            if self.model.prefix not in name:
                yield name.removeprefix("base_model.model.").replace(".base_layer", ""), parameter.detach()

    def sync(self, transfer):
        self.model.merge_adapter()
        try:
            transfer.send_weights(self._streaming_iter())
        finally:
            self.model.unmerge_adapter()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_adapter_merged_into_16_bit_weights_at_every_sync_is_warned_of_once(dtype, recwarn):
    base = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False)).to(dtype)
    trainer = MergingTrainer(peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"])))
    with sending(fresh(), wait_for="commit") as transfer:
        trainer.sync(transfer)
        trainer.sync(transfer)
    said = [str(warning.message) for warning in recwarn if "adapter_tensors" in str(warning.message)]
    assert len(said) == (dtype is torch.bfloat16)


class LoggingTrainer:
    """Hands its weights over as TRL's trainers do, and logs what stands in its metrics as they do."""

    def __init__(self, metrics):
        self.model, self._metrics = torch.nn.Linear(4, 4), metrics

    def _streaming_iter(self):
        yield from ((name, parameter.detach()) for name, parameter in self.model.named_parameters())


def test_what_a_publish_reports_is_among_the_metrics_that_trl_logs():
    trainer = LoggingTrainer({"train": defaultdict(list), "eval": defaultdict(list)})
    with sending(fresh(), wait_for="commit") as transfer:
        for _ in range(2):
            transfer.send_weights(trainer._streaming_iter())
    assert trainer._metrics["train"]["deltawire/version"] == [0, 1]
    assert trainer._metrics["train"]["deltawire/changed"] == [20, 0]
    assert not trainer._metrics["eval"]


@pytest.mark.parametrize("metrics", [None, {}, {"train": {}}, {"train": None}])
def test_a_trainer_that_keeps_other_metrics_is_left_as_it_is(metrics):
    trainer = LoggingTrainer(metrics)
    with sending(fresh(), wait_for="commit") as transfer:
        transfer.send_weights(trainer._streaming_iter())
    assert trainer._metrics == metrics
