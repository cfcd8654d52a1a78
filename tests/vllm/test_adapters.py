"""A real vLLM server loads every version of an adapter run beside the last, and answers each by its name."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
import torch
from adapters import AdapterRun
from programs import program
from safetensors.torch import load_file
from servers import Server, save_checkpoint

import deltawire as dw
from deltawire.errors import BadDigest, EngineError, EngineUnsupported
from deltawire.follow.follower import Follower
from deltawire.runlog import heartbeats
from deltawire.trainers import lora
from deltawire.vllm.adapters import AdapterFollower
from deltawire.vllm.client import EngineClient

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
LORA = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2")
PROMPT = list(range(8))
CLOSE = 0.05
"""of log-probabilities in bf16, vLLM's kernels against transformers'"""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_checkpoint(folder)
    return folder


def start(base: Path, log: Path, port: int = 0) -> Server:
    return Server(base, log, backend=None, options=LORA, port=port, VLLM_ALLOW_RUNTIME_LORA_UPDATING="True")


@pytest.fixture(scope="module")
def servers(base, tmp_path_factory):
    """The server of these tests in a list, so that a test may put another in its place."""
    running = [start(base, tmp_path_factory.mktemp("vllm") / "vllm.log").wait()]
    yield running
    running[0].stop()


@pytest.fixture
def run(base, tmp_path, servers):
    """A run of its own, and a server that has no adapter of another test's."""
    made = AdapterRun(base, tmp_path)
    yield made
    made.publisher.close(10)
    with EngineClient(servers[0].url) as engine:
        for name in adapters(servers[0]):
            engine.unload_adapter(name)


def adapters(server: Server) -> list[str]:
    """The adapters a request may name, in order of loading."""
    with EngineClient(server.url) as engine:
        return [name for name in engine.models() if "@" in name]


def ask(server: Server, model: str) -> tuple[list[int], list[float]]:
    """The prompt and four tokens chosen greedily, and the log-probability of each but the first. The answer says who
    gave it."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "logprobs": 0, "echo": True,
            "return_token_ids": True}  # fmt: skip
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    (choice,) = answer.json()["choices"]
    return PROMPT + choice["token_ids"][-4:], choice["logprobs"]["token_logprobs"][1:]


def assert_answers_as_peft_does(server: Server, run: AdapterRun, version: int) -> list[float]:
    tokens, found = ask(server, f"lora@{version}")
    rows = run.expected(version, tokens[:-1])
    assert found == pytest.approx([float(row[token]) for row, token in zip(rows, tokens[1:], strict=True)], abs=CLOSE)
    return found


def test_every_version_is_answered_under_its_name_as_peft_answers_and_the_two_newest_stay(servers, run):
    (server,) = servers
    _, before = ask(server, "policy")
    answers, updates = [], []
    with run.follower(server, replica="one", on_update=updates.append) as follower:
        assert follower.step() is None
        for version in range(4):
            published = run.publish()
            report = follower.step()
            assert (report.name, report.version) == (f"lora@{version}", version)
            assert report.from_version == (version - 1 if version else None)
            assert report.wire_bytes == published.wire_bytes
            assert report.changed == published.changed
            assert adapters(server) == [f"lora@{kept}" for kept in range(max(version - 1, 0), version + 1)]
            answers.append(assert_answers_as_peft_does(server, run, version))
            assert follower.step() is None
        assert [report.version for report in updates] == [0, 1, 2, 3]
        assert assert_answers_as_peft_does(server, run, 2) == answers[2]  # the one before goes on, as it was
        follower.beat()
    assert answers[0] == pytest.approx(before, abs=CLOSE)  # an untrained adapter changes nothing
    prompts = [torch.tensor(answer[: len(PROMPT) - 1]) for answer in answers]
    assert min(float((one - other).abs().max()) for n, one in enumerate(prompts) for other in prompts[:n]) > 4 * CLOSE
    assert ask(server, "policy")[1] == before
    ((_, beat),) = heartbeats.read_all(run.publisher.bucket)
    assert (beat.version, beat.lag) == (3, 0)
    assert len(list((run.folder / "cache" / "lora" / "versions").iterdir())) == 3


def test_a_request_in_flight_is_answered_to_its_end_while_later_versions_come_and_its_own_goes(servers, run):
    (server,) = servers
    for _ in range(3):
        run.publish()
    hold(server, run, 0)
    body = {"model": "lora@0", "prompt": PROMPT, "max_tokens": 1500, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True}  # fmt: skip
    tokens = []
    with ExitStack() as stack:
        with server.slowed():  # from before the request on: it can't be over before the other versions have come
            request = httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120)
            lines = data_lines(stack.enter_context(request))
            tokens += next(lines)["choices"][0]["token_ids"]
            hold(server, run, 1)
            hold(server, run, 2)
            assert adapters(server) == ["lora@1", "lora@2"]
            assert server.requests_running() == 1
        for line in lines:
            assert line["model"] == "lora@0"
            tokens += line["choices"][0].get("token_ids") or []
    assert len(tokens) == 1500
    assert_answers_as_peft_does(server, run, 1)  # which vLLM, with room for two, may have to read again


def data_lines(answer: httpx.Response) -> Iterator[dict]:
    return (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {"))


def hold(server: Server, run: AdapterRun, version: int) -> None:
    with run.follower(server, pin=version) as follower:
        follower.step()


def test_a_damaged_payload_is_refused_and_the_old_version_is_still_answered(servers, run):
    (server,) = servers
    run.publish()
    with run.follower(server) as follower:
        follower.step()
        before = ask(server, "lora@0")
        run.publish()
        (payload,) = (run.folder / "bucket").glob("runs/*/deltas/*")
        right = payload.read_bytes()
        payload.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
        with pytest.raises(BadDigest):
            follower.step()
        assert adapters(server) == ["lora@0"]
        assert ask(server, "lora@0") == before
        assert follower.health.lag == 1
        payload.write_bytes(right)
        assert follower.step().version == 1
    assert_answers_as_peft_does(server, run, 1)


def test_a_pinned_version_is_loaded_again_and_newer_ones_are_no_longer_answered(servers, run):
    (server,) = servers
    for _ in range(3):
        run.publish()
    with run.follower(server) as follower:
        assert follower.step().version == 2
    with run.follower(server, pin=1) as follower:
        assert follower.step().from_version == 2
    assert adapters(server) == ["lora@1"]
    assert_answers_as_peft_does(server, run, 1)


def test_a_run_that_supersedes_ours_takes_over_its_names(servers, run, base):
    (server,) = servers
    run.publish()
    with run.follower(server) as follower:
        follower.step()
        old = ask(server, "lora@0")
        with torch.no_grad():
            for name, parameter in run.learner.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
        bucket = dw.open_bucket(run.url)
        with dw.Publisher(bucket, assets=run.folder / "config", run="supersede") as publisher:
            publisher.publish(lora.adapter_tensors(run.learner.model))
        report = follower.step()
    assert (report.name, report.from_version) == ("lora@0", None)
    assert ask(server, "lora@0") != old
    assert_answers_as_peft_does(server, run, 0)


def test_a_server_started_without_our_engine_is_refused_and_left_as_vllm_makes_it(servers, base, tmp_path):
    (server,) = servers
    url = (tmp_path / "whole").as_uri()
    with dw.Publisher(dw.open_bucket(url, create=True), assets=base) as publisher:
        publisher.publish(load_file(base / "model.safetensors"))
    with (
        pytest.raises(EngineUnsupported, match="weight-transfer-config"),
        Follower(url, EngineClient(server.url)) as follower,
    ):
        follower.step()
    packed = [name for name, value in server.checksums().items() if value == sha256().hexdigest()]
    assert any("down_proj." in name for name in packed)  # oneDNN holds it, as without the plugin


@pytest.mark.parametrize("moment", ["load_adapter", "unload_adapter"])
def test_a_follower_that_was_killed_is_continued_by_the_next_one(servers, run, moment):
    (server,) = servers
    with run.follower(server) as follower:
        for _ in range(2):
            run.publish()
            follower.step()
    run.publish()
    interrupted = [sys.executable, program("interrupted_follower"), "KILL", moment]
    command = [*interrupted, run.url, server.url, "lora", str(run.folder / "cache")]
    assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL
    assert ("lora@2" in adapters(server)) == (moment == "unload_adapter")
    with run.follower(server) as follower:
        report = follower.step()
        assert (report is None) == (moment == "unload_adapter")
    assert adapters(server) == ["lora@1", "lora@2"]
    assert_answers_as_peft_does(server, run, 2)


def test_what_a_server_cannot_take_is_said_and_leaves_it_answering(servers, run, tmp_path, base):
    (server,) = servers
    run.publish()
    with pytest.raises(EngineUnsupported, match="--adapter NAME"), Follower(run.url, EngineClient(server.url)) as whole:
        whole.step()
    with dw.Publisher(dw.open_bucket((tmp_path / "whole").as_uri(), create=True), assets=base) as publisher:
        publisher.publish(run.learner.model.get_base_model().named_parameters())
    with (
        pytest.raises(EngineUnsupported, match="without --adapter"),
        AdapterFollower((tmp_path / "whole").as_uri(), server.url, "lora", folder=tmp_path / "cache") as follower,
    ):
        follower.step()
    config = json.loads((run.folder / "config" / "adapter_config.json").read_text())
    (run.folder / "config" / "adapter_config.json").write_text(json.dumps({**config, "r": 64}))
    url = (tmp_path / "large").as_uri()
    with dw.Publisher(dw.open_bucket(url, create=True), assets=run.folder / "config") as publisher:
        publisher.publish(lora.adapter_tensors(run.learner.model))
    with (
        pytest.raises(EngineError, match="max_lora_rank"),
        AdapterFollower(url, server.url, "lora", folder=tmp_path / "cache") as follower,
    ):
        follower.step()
    assert adapters(server) == []
    assert len(ask(server, "policy")[1]) == len(PROMPT) + 3


@pytest.mark.nightly
def test_the_command_follows_an_adapter_and_loads_it_again_into_a_server_that_was_restarted(
    servers, run, base, tmp_path
):
    """Its twin against a stand-in is in test_adapter_faults."""
    (server,) = servers
    run.publish()
    command = [sys.executable, "-m", "deltawire.cli", "follow", "--bucket", run.url, "--engine", server.url, "--json"]
    command += ["--adapter", "lora", "--adapter-folder", str(run.folder / "cache"), "--poll", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        try:
            assert told(follower, "update")["version"] == 0
            run.publish()
            assert told(follower, "update")["name"] == "lora@1"
            server.stop()
            assert told(follower, "problem")["error"].startswith("EngineUnavailable")
            servers[0] = start(base, tmp_path / "again.log", server.port)
            servers[0].wait()
            again = told(follower, "update")
        finally:
            follower.terminate()
    assert (again["version"], again["wire_bytes"]) == (1, 0)
    assert adapters(servers[0]) == ["lora@1"]
    assert_answers_as_peft_does(servers[0], run, 1)


def told(follower: subprocess.Popen, event: str) -> dict:
    """The next such event a follower's command prints; the test's own limit ends the wait."""
    assert follower.stdout is not None
    for line in follower.stdout:
        if json.loads(line)["event"] == event:
            return json.loads(line)
    raise AssertionError("the follower ended")
