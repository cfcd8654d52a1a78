"""The doctor, the page and the metrics beside a real vLLM server: it is examined and followed, and never waited for."""

from contextlib import closing

import httpx
import pytest
from runs import publish_all
from servers import tiny_qwen3

import deltawire as dw
from deltawire.fleet.doctor import examine
from deltawire.fleet.follower_port import board_of, metrics_of
from deltawire.follow.follower import Follower
from deltawire.follow.health import HealthServer
from deltawire.follow.options import FollowOptions
from deltawire.vllm.client import EngineClient

pytestmark = pytest.mark.vllm


@pytest.fixture
def bucket(tmp_path):
    """Two versions, of which the server serves the first."""
    first = {name: parameter.detach().clone() for name, parameter in tiny_qwen3().named_parameters()}
    second = {**first, "model.norm.weight": first["model.norm.weight"] + 1}
    bucket = dw.open_bucket((tmp_path / "bucket").as_uri(), create=True)
    publish_all(bucket, first, second)
    return bucket


def test_a_real_server_is_found_sound_before_and_while_it_is_followed_and_the_page_asks_it_nothing(server, bucket):
    before = {one.check: one for one in examine(bucket, server.url)}
    assert {one.level for one in before.values()} <= {"ok", "note"}, before
    assert {"version", "plugin", "exposure", "worker", "model"} <= before.keys()
    with Follower(bucket.url, EngineClient(server.url), FollowOptions(replica="mine", take_over=True)) as follower:
        report = follower.step()
        assert report.version == 1
        after = {one.check: one for one in examine(bucket, server.url)}
        assert {one.level for one in after.values()} <= {"ok", "note"}, after
        assert "mine" in after["lease"].said and after["prepacking"].level == "ok"
        metrics = metrics_of({"one": follower})
        with closing(board_of(follower)) as board:
            routes = [board, metrics]
            with HealthServer(0, follower.beats.unready, follower.health, routes=routes) as health:
                home = health.url.removesuffix("health")
                asked = requests_of(server)
                for path in ("", "status.json", "metrics", "health"):
                    assert httpx.get(home + path).status_code == 200
                assert requests_of(server) == asked, "a page request made a call of vLLM"


def requests_of(server):
    """How many requests vLLM has answered, but for those of its own metrics, as its metrics say."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    counted = [line for line in lines if line.startswith("http_requests_total{") and 'handler="/metrics"' not in line]
    assert counted
    return sum(float(line.rpartition(" ")[2]) for line in counted)
