"""A real vLLM server follows a bucket: bit for bit, at every version, and truthful when something is wrong."""

import copy
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from programs import program
from servers import START_SECONDS, VOCABULARY, Server, tiny_qwen3
from transformers import Qwen3ForCausalLM
from waiting import until

import deltawire as dw
from deltawire.errors import BadDigest, EngineUnavailable, NotFound
from deltawire.follow.follower import Follower
from deltawire.vllm.client import EngineClient

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "vllm"))
import weight_versions

INTERRUPTED = [sys.executable, program("interrupted_follower")]
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2 * START_SECONDS)]


class Trainer:
    """A model trained on noise, published to a folder bucket; `start` says where version 0 comes from."""

    def __init__(self, folder: Path, **start: Path) -> None:
        self.url = folder.as_uri()
        self.model = tiny_qwen3()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        torch.manual_seed(1)
        self.publisher = dw.Publisher(dw.open_bucket(self.url, create=True), **start)

    def step(self) -> dw.PublishReport:
        """Publish, wait for the commit, then train one step."""
        report = self.publisher.publish(self.model.named_parameters())
        self.publisher.flush(30)
        tokens = torch.randint(0, VOCABULARY, (4, 16))
        self.published = {name: f"{value:016x}" for name, value in dw.digest(self.served()).items()}
        self.model(input_ids=tokens, labels=tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return report

    @torch.no_grad()
    def first_logprob(self, prompt: list[int]) -> float:
        """What transformers says of the likeliest next token, with the weights as a server holds them."""
        model = copy.deepcopy(self.model).bfloat16()
        return float(model(input_ids=torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1).max())

    def served(self) -> dict[str, torch.Tensor]:
        """The weights as a server holds them."""
        return {name: value.detach().bfloat16() for name, value in self.model.named_parameters()}


@pytest.fixture
def trainer(tmp_path, checkpoint):
    trainer = Trainer(tmp_path / "bucket", assets=checkpoint)
    yield trainer
    trainer.publisher.close(10)


@pytest.fixture
def on_base(tmp_path, checkpoint):
    """A trainer whose version 0 is the checkpoint by reference, with the head that its file repeats."""
    trainer = Trainer(tmp_path / "bucket", base=checkpoint)
    yield trainer
    trainer.publisher.close(10)


def assert_serves(server, trainer, version):
    with EngineClient(server.url) as engine:
        audit = engine.audit()
        assert audit.position.version == version
        assert audit.digests == trainer.published
        assert audit.mismatched == []
        assert engine.weight_version() == f"{audit.position.run}:{version}"


def follow_six_versions(server, trainer, base):
    """Publish and serve six versions bit for bit."""
    with Follower(trainer.url, EngineClient(server.url), base=base) as follower:
        for version in range(6):
            assert trainer.step().version == version
            report = follower.step()
            assert report is None or (report.version == version and report.verified)
            assert_serves(server, trainer, version)


def test_every_version_is_served_bit_for_bit_and_equals_a_server_started_on_it(server, on_base, checkpoint, tmp_path):
    """The server itself was started on version 0. The nightly twin starts another on the last."""
    trainer = on_base
    follow_six_versions(server, trainer, checkpoint)
    newest = server.at_rest()
    assert newest[1] != server.at_start[1]
    with Follower(trainer.url, EngineClient(server.url), base=checkpoint, pin=0) as follower:
        follower.step()
    assert server.at_rest() == server.at_start
    with Follower(trainer.url, EngineClient(server.url), base=checkpoint) as follower:
        follower.step()
    assert server.at_rest() == newest
    assert_serves(server, trainer, 5)

    out = tmp_path / "materialized"
    dw.materialize(trainer.publisher.bucket, out, base=checkpoint)
    loaded = Qwen3ForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert dw.digest(dict(loaded.named_parameters())) == {name: int(v, 16) for name, v in trainer.published.items()}
    with torch.no_grad():
        logprobs = loaded(torch.tensor([[1, 2, 3]])).logits[0, -1].float().log_softmax(-1)
    assert float(logprobs.max()) == pytest.approx(newest[1][0], abs=0.05)  # vLLM's kernels round otherwise


def test_a_run_whose_deltas_are_read_against_the_live_weights_is_served_forward_and_back(server, checkpoint, tmp_path):
    """Codec `class`. A follower that is started again goes back by what the workers hold, or from an anchor."""
    trainer, published = Trainer(tmp_path / "bucket", assets=checkpoint, codec="class"), []
    for version in range(4):
        trainer.step()
        published.append(trainer.published)
        with Follower(trainer.url, EngineClient(server.url)) as follower:
            follower.step()
            assert "class" in follower.beats.codecs
        assert_serves(server, trainer, version)
    deltas = [stat.key for stat in trainer.publisher.bucket.list("runs/") if "/deltas/" in stat.key]
    assert len(deltas) == 3
    assert all(key.endswith(".class.safetensors") for key in deltas)
    for pin in (2, 0, 3):
        with Follower(trainer.url, EngineClient(server.url), pin=pin) as follower:
            follower.step()
        with EngineClient(server.url) as engine:
            audit = engine.audit()
        assert (audit.position.version, audit.digests, audit.mismatched) == (pin, published[pin], [])
    trainer.publisher.close(10)


@pytest.mark.nightly
def test_a_server_started_on_the_newest_version_holds_and_answers_the_same(server, on_base, checkpoint, tmp_path):
    follow_six_versions(server, on_base, checkpoint)
    out = tmp_path / "materialized"
    dw.materialize(on_base.publisher.bucket, out, base=checkpoint)
    fresh = Server(out, tmp_path / "fresh.log")
    try:
        assert fresh.wait().at_rest() == server.at_rest()
    finally:
        fresh.stop()
    with pytest.raises(EngineUnavailable), Follower(on_base.url, EngineClient(fresh.url)) as other:
        other.step()


def test_a_base_folder_is_opened_by_a_worker_only_where_a_follower_names_it(server, on_base, checkpoint, tmp_path):
    other = Trainer(tmp_path / "other", assets=checkpoint)
    for _ in range(2):
        other.step()
        on_base.step()
    other.publisher.close(10)
    with Follower(other.url, EngineClient(server.url)) as follower:
        follower.step()  # now the server stands on no version of the run that has a base
    with Follower(on_base.url, EngineClient(server.url)) as follower, pytest.raises(NotFound, match="--base FOLDER"):
        follower.step()
    with (
        Follower(on_base.url, EngineClient(server.url), base=checkpoint) as follower,
        EngineClient(server.url) as engine,
    ):
        assert follower.step().from_version is None
        assert engine.audit().digests == on_base.published


def test_versions_that_were_missed_arrive_as_one_update(server, trainer):
    with Follower(trainer.url, EngineClient(server.url)) as follower:
        trainer.step()
        follower.step()
        for _ in range(3):
            trainer.step()
        report = follower.step()
        assert (report.from_version, report.version) == (0, 3)
    with EngineClient(server.url) as engine:
        assert engine.audit().digests == trainer.published


def test_a_damaged_delta_is_refused_and_the_old_version_is_still_served(server, trainer, tmp_path):
    with Follower(trainer.url, EngineClient(server.url)) as follower, EngineClient(server.url) as engine:
        trainer.step()
        follower.step()
        served, label, digests = server.checksums(), engine.weight_version(), trainer.published
        trainer.step()
        (payload,) = (tmp_path / "bucket").glob("runs/*/deltas/*")
        right = payload.read_bytes()
        payload.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
        with pytest.raises(BadDigest):
            follower.step()
        assert server.checksums() == served
        assert engine.weight_version() == label
        assert engine.audit().digests == digests

        payload.write_bytes(right)
        assert follower.step().version == 1
        assert engine.audit().digests == trainer.published


def test_a_new_follower_takes_over_from_the_engines_own_word(server, trainer):
    with Follower(trainer.url, EngineClient(server.url)) as follower:
        trainer.step()
        follower.step()
    trainer.step()
    with Follower(trainer.url, EngineClient(server.url)) as follower:
        assert follower.step().from_version == 0
        assert follower.step() is None


def test_plain_posts_update_without_a_follower(server, trainer):
    for _ in range(2):
        trainer.step()
    position = trainer.publisher.position

    def post(path: str, body: dict) -> None:
        httpx.post(server.url + path, json=body, timeout=60).raise_for_status()

    def posted() -> bool:
        """A server that is still fetching says so, and is posted to again."""
        post("/update_weights", {"update_info": {"bucket": trainer.url, "version": 1}})
        return engine.status().error is None

    with EngineClient(server.url) as engine:
        post("/start_weight_update", {})
        until(posted)
        post("/finish_weight_update", {"weight_version": str(position)})
        audit = engine.audit()
        assert audit.position == position
        assert audit.digests == trainer.published


def test_a_version_that_was_never_committed_and_a_bucket_that_is_not_there_change_nothing(server, trainer, tmp_path):
    trainer.step()
    with Follower(trainer.url, EngineClient(server.url)) as follower:
        follower.step()
    served = server.checksums()
    with EngineClient(server.url) as engine:
        for body in (
            {"bucket": trainer.url, "version": 99},
            {"bucket": (tmp_path / "nowhere").as_uri(), "version": 0},
            {"surprise": 1},
            {},
            [{"bucket": trainer.url, "version": 99}],
        ):
            engine.start()
            httpx.post(f"{server.url}/update_weights", json={"update_info": body}, timeout=60).raise_for_status()
            engine.finish(None)
            assert engine.status().error is not None, body
        assert server.checksums() == served
        with pytest.raises(NotFound):
            engine.audit((tmp_path / "nowhere").as_uri())


def test_a_request_in_flight_lives_through_an_update(server, trainer):
    trainer.step()
    body = {"model": "policy", "prompt": [5, 6, 7], "max_tokens": 100, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True}  # fmt: skip
    tokens = []
    with (
        Follower(trainer.url, EngineClient(server.url)) as follower,
        httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as answer,
    ):
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {"))
        tokens += json.loads(next(lines))["choices"][0]["token_ids"]
        follower.step()
        for line in lines:
            tokens += json.loads(line)["choices"][0].get("token_ids") or []
    assert len(tokens) == 100


class AskingBeforeItPauses(EngineClient):
    """A client that asks for tokens once all is staged, so that only two calls stand between the first token and the
    pause."""

    tokens = 300

    def start(self) -> None:
        super().start()
        self.chunks = weight_versions.generate(self.url, [5, 6, 7], self.tokens)
        self.made = len(next(self.chunks)["token_ids"])


@pytest.mark.parametrize("pause", ["keep", "wait", "abort"])
def test_a_request_that_meets_an_update_names_the_versions_that_made_its_tokens(server, trainer, pause):
    """Kept, it shows both; waited for, it is the old version's alone and whole; aborted, it ends there."""
    trainer.step()
    with Follower(trainer.url, EngineClient(server.url)) as follower:
        follower.step()
    old = trainer.publisher.position
    trainer.step()
    new = trainer.publisher.position
    engine = AskingBeforeItPauses(server.url)
    with server.slowed(), Follower(trainer.url, engine, pause=pause) as follower:
        assert follower.step().version == new.version
        chunks = list(engine.chunks)
    made = engine.made + sum(len(chunk["token_ids"]) for chunk in chunks)
    assert (made == engine.tokens) == (pause != "abort")
    spans = [span["version"] for span in chunks[-1]["weight_versions"]]
    assert spans == ([str(old), str(new)] if pause == "keep" else [str(old)])
    assert server.logprobs([1, 2, 3])


def test_a_copy_of_the_bucket_elsewhere_is_the_same_run(server, trainer, tmp_path):
    trainer.step()
    with Follower(trainer.url, EngineClient(server.url)) as follower:
        follower.step()
    shutil.copytree(tmp_path / "bucket", tmp_path / "copy")
    with Follower((tmp_path / "copy").as_uri(), EngineClient(server.url)) as follower:
        assert follower.step() is None  # the live digests say where the server stands; nothing is fetched


@pytest.mark.parametrize("moment", ["stage", "start", "pause", "update", "finish", "resume"])
def test_a_follower_killed_in_the_middle_of_an_update_leaves_a_server_the_next_one_mends(server, trainer, moment):
    trainer.step()
    with Follower(trainer.url, EngineClient(server.url)) as follower:
        follower.step()
    trainer.step()
    command = [*INTERRUPTED, "KILL", moment, trainer.url, server.url]
    killed = subprocess.run(command, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    with EngineClient(server.url) as engine:
        assert engine.is_paused() == (moment in ("update", "finish", "resume"))
        assert engine.status().session_open == (moment in ("pause", "update", "finish"))
        with Follower(trainer.url, EngineClient(server.url)) as follower:
            started = time.monotonic()
            report = follower.step()
            assert time.monotonic() < started + 60
            in_place = moment in ("finish", "resume")  # killed that late, the new weights were served already
            assert (report is None) == in_place
        assert not engine.is_paused()
        assert not engine.status().session_open
        assert engine.weight_version() == str(trainer.publisher.position)
        assert engine.audit().digests == trainer.published
    assert len(server.logprobs([1, 2, 3])) == 8


@pytest.mark.parametrize("moment", ["start", "update"])
def test_a_follower_stopped_in_an_update_loses_the_server_to_another_and_changes_nothing_when_it_goes_on(
    server, trainer, tmp_path, checkpoint, moment
):
    other = Trainer(tmp_path / "other", assets=checkpoint)
    for each in (trainer, other, other):
        each.step()
    with Follower(trainer.url, EngineClient(server.url)) as follower:
        follower.step()
    trainer.step()
    command = [*INTERRUPTED, "STOP", moment, trainer.url, server.url]
    with EngineClient(server.url) as engine, subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as old:
        until(lambda: psutil.Process(old.pid).status() == psutil.STATUS_STOPPED, unless=old.poll)
        assert engine.is_paused() == (moment == "update")
        assert engine.status().lease.holder.pid == old.pid
        with Follower(other.url, EngineClient(server.url), take_over=True) as new:
            new.step()
            assert engine.weight_version() == str(other.publisher.position)
            served = server.checksums()
            old.send_signal(signal.SIGCONT)
            _, told = old.communicate(timeout=60)
            assert old.returncode == 1
            assert f"AnotherFollower: follower {new.lease.me.replica} (pid {new.lease.me.pid} on" in told
            assert new.step() is None
            assert server.checksums() == served
            assert engine.weight_version() == str(other.publisher.position)
            assert engine.audit().digests == other.published
            assert (engine.is_paused(), engine.status().session_open) == (False, False)
    other.publisher.close(10)


def test_what_is_generated_after_an_update_is_what_the_new_weights_say(server, trainer):
    prompt = [5, 6, 7]
    with Follower(trainer.url, EngineClient(server.url)) as follower:
        old = trainer.first_logprob(prompt)
        trainer.step()
        follower.step()
        assert server.logprobs(prompt)[0] == pytest.approx(old, abs=0.05)
        trainer.optimizer.param_groups[0]["lr"] = 3e-2
        trainer.step()
        new = trainer.first_logprob(prompt)
        trainer.step()
        assert follower.step().version == 2
    assert abs(new - old) > 0.3
    assert server.logprobs(prompt)[0] == pytest.approx(new, abs=0.05)


def test_a_follower_runs_until_it_is_closed_and_serves_what_is_published(server, trainer):
    served = threading.Semaphore(0)
    with Follower(
        trainer.url, EngineClient(server.url), poll=0.05, on_update=lambda report: served.release()
    ) as follower:
        thread = threading.Thread(target=follower.run, daemon=True)
        thread.start()
        for _ in range(3):
            trainer.step()
            trainer.step()
            assert served.acquire(timeout=90)
        follower.close()
        thread.join(90)
        assert not thread.is_alive()
