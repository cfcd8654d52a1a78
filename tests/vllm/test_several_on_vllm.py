"""Two real vLLM servers, as two copies of one model on a host, that one process brings to each version or to none."""

import pytest
from runs import publish_all
from servers import START_SECONDS, Server, tiny_qwen3

import deltawire as dw
from deltawire.errors import EngineUnavailable, NotServed
from deltawire.follow.broadcast import Broadcast
from deltawire.follow.follower import Follower
from deltawire.follow.options import FollowOptions
from deltawire.vllm.client import EngineClient

pytestmark = [pytest.mark.vllm, pytest.mark.nightly, pytest.mark.timeout(3 * START_SECONDS)]


class Failing(EngineClient):
    """A server that says of an update that it failed, after it was written, while `fails`."""

    fails = False

    def update(self, bucket, target):
        super().update(bucket, target)
        if self.fails:
            raise EngineUnavailable("as planned, after it was written")


@pytest.fixture
def pair(server, checkpoint, tmp_path):
    """The session's server, and another of the same model."""
    second = Server(checkpoint, tmp_path / "second.log")
    try:
        yield server, second.wait()
    finally:
        second.stop()


def test_two_servers_go_from_version_to_version_together_or_stay(pair, tmp_path):
    first = {name: parameter.detach().clone() for name, parameter in tiny_qwen3().named_parameters()}
    second = {**first, "model.norm.weight": first["model.norm.weight"] + 1}
    third = {**second, "model.norm.weight": first["model.norm.weight"] + 2}
    bucket = dw.open_bucket((tmp_path / "bucket").as_uri(), create=True)
    publish_all(bucket, first, second)
    clients = [EngineClient(pair[0].url), Failing(pair[1].url)]
    followers = [Follower(bucket.url, client, take_over=True) for client in clients]
    with Broadcast(bucket.url, followers, FollowOptions()) as broadcast:
        assert {report.version for report in broadcast.step()} == {1}
        before = [server.at_rest() for server in pair]
        assert before[0] == before[1]
        publish_all(bucket, third)
        clients[1].fails = True
        with pytest.raises(NotServed, match=f"version 2 was taken back from all servers: {pair[1].url}"):
            broadcast.step()
        assert [server.at_rest() for server in pair] == before
        assert {client.status().position.version for client in clients} == {1}
        assert [client.is_paused() for client in clients] == [False, False]
        clients[1].fails = False
        broadcast.health.clock = lambda: float("inf")
        assert {report.version for report in broadcast.step()} == {2}
        after = [server.at_rest() for server in pair]
        assert after[0] == after[1] != before[0]
        assert [client.audit().mismatched for client in clients] == [[], []]
