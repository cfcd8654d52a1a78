"""A gateway before real vLLM servers: the policy asked for answers, streamed too, and each answer says which it was."""

import json
import sys
from pathlib import Path

import httpx
import pytest
from gateways import StubVLLM, gateway
from servers import START_SECONDS, Server, tiny_qwen3

import deltawire as dw
from deltawire.follow.follower import Follower
from deltawire.gateway.routing import Engine
from deltawire.vllm.client import EngineClient

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "vllm"))
import weight_versions

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3 * START_SECONDS)]


@pytest.fixture
def run(tmp_path):
    """A run of three versions of a small model; its address."""
    model, url = tiny_qwen3(), (tmp_path / "bucket").as_uri()
    with dw.Publisher(dw.open_bucket(url, create=True)) as publisher:
        for _ in range(3):
            publisher.publish(model.named_parameters())
            publisher.flush(30)
            model.lm_head.weight.data[:3] += 0.01
    return url


def serve(url: str, server: Server, version: int) -> str:
    """Bring a server to a version; its label."""
    with Follower(url, EngineClient(server.url), pin=version) as follower:
        follower.step()
    label = httpx.get(f"{server.url}/weight_info", timeout=60).json()["weight_version"]
    assert label.endswith(f":{version}")
    return label


def complete(url: str, prompt: list[int], **headers: str) -> httpx.Response:
    body = {"model": "policy", "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=120)


def test_a_real_server_is_asked_for_what_only_it_serves_and_says_what_it_served(run, server):
    label, old = serve(run, server, 2), StubVLLM(1)
    try:
        with gateway([Engine(old.url), Engine(server.url)], patience=0.5) as door:
            answer = complete(door, [1, 2, 3], **{"X-Min-Policy-Version": label})
            assert answer.status_code == 200 and answer.headers["X-Served-By"] == "1"
            assert answer.headers["X-Policy-Version"] == answer.headers["X-Policy-Version-Last"] == label
            assert len(answer.json()["choices"]) == 1
            assert not old.asked
            newer = {"X-Min-Policy-Version": "3"}
            assert complete(door, [1, 2, 3], **newer).status_code == 503
            body = {"model": "policy", "prompt": [4, 5], "max_tokens": 4, "ignore_eos": True}
            body |= {"stream": True, "return_token_ids": True}
            asking = {"X-Min-Policy-Version": "2"}
            with httpx.stream("POST", f"{door}/v1/completions", json=body, headers=asking, timeout=120) as streamed:
                lines = [line for line in streamed.iter_lines() if line]
            assert streamed.headers["X-Policy-Version"] == label
            chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
            made = [token for chunk in chunks for choice in chunk["choices"] for token in choice["token_ids"]]
            assert len(made) == 4, "a chunk may hold several"
            assert lines[-2:] == ["data: [DONE]", f": X-Policy-Version-Last: {label}"]
            assert weight_versions.policy(door, [1, 2], 3)[0] is not None
        assert weight_versions.policy(server.url, [1, 2], 3) == (label, label)
    finally:
        old.stop()


@pytest.mark.nightly
def test_a_real_pair_follows_a_run_behind_one_door(run, server, checkpoint, tmp_path):
    """One server moves on while the other stays: a floor goes to the new one, and prompts stay where they were."""
    second = Server(checkpoint, tmp_path / "second.log")
    try:
        second.wait()
        serve(run, server, 1)
        serve(run, second, 1)
        prompts = [[number, 2, 3, 4] for number in range(1, 9)]
        with gateway([Engine(server.url), Engine(second.url)], patience=20) as door:
            before = [complete(door, prompt).headers["X-Served-By"] for prompt in prompts]
            assert {*before} == {"0", "1"}
            assert [complete(door, prompt).headers["X-Served-By"] for prompt in prompts] == before
            label = serve(run, second, 2)
            asked = [complete(door, prompt, **{"X-Min-Policy-Version": label}) for prompt in prompts]
            assert {answer.headers["X-Served-By"] for answer in asked} == {"1"}
            second.stop()
            assert {complete(door, prompt).headers["X-Served-By"] for prompt in prompts} == {"0"}
            assert complete(door, prompts[0], **{"X-Min-Policy-Version": "3"}).status_code == 503
    finally:
        second.stop()
