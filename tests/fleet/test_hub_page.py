"""The page of `deltawire serve` and of `deltawire status --serve`, as people start them."""

import json
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import pytest
from runs import edit, fresh, model, publish_all, publishing
from test_page import say, told

import deltawire as dw
from deltawire.errors import NotFound, NotOffered, TooLarge
from deltawire.fleet.hub_page import StoreView, hub_page, runs_in
from deltawire.hub_server import HubServer


@contextmanager
def started(*arguments):
    """A verb that runs on; the first thing it says."""
    command = [sys.executable, "-m", "deltawire.cli", *map(str, arguments), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield json.loads(process.stdout.readline()), process
        finally:
            process.terminate()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A bucket server in this process, its page, and a run in a bucket of it and one in a folder of another."""
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "any")
        publish_all(dw.open_bucket("hf://buckets/me/one", create=True), model(), model(1))
        publish_all(dw.open_bucket("hf://buckets/me/two/run-7", create=True), model())
        yield server


def test_the_runs_of_a_server_are_listed_and_each_has_a_page(hub):
    store = hub._store
    assert runs_in(store) == ["me/one", "me/two/run-7"]
    page = hub_page(store)
    try:
        assert json.loads(page.answer("/status.json", "").body) == {"buckets": ["me/one", "me/two/run-7"]}
        assert page.answer("/events", "bucket=me/none").status == 404
        for name, version in (("me/one", 1), ("me/two/run-7", 0)):
            events = page.answer("/events", f"bucket={name}").body
            pieces = (json.loads(piece.removeprefix(b"data: ")) for piece in events if piece.startswith(b"data: "))
            assert next(piece for piece in pieces if "trainer" in piece)["trainer"]["version"] == version
            events.close()
        assert page.answer("/elsewhere", "") is None
    finally:
        page.close()


def test_a_view_of_a_servers_store_reads_as_its_bucket_does_and_writes_nothing(hub):
    bucket, view = dw.open_bucket("hf://buckets/me/one"), StoreView(hub._store, "me/one")
    assert [(stat.key, stat.size) for stat in view.list()] == [(stat.key, stat.size) for stat in bucket.list()]
    keys = [stat.key for stat in view.list("runs/")]
    assert [stat.key for stat in view.list("runs/", after=keys[1])] == keys[2:]
    assert view.get("HEAD.json", limit=1000) == bucket.get("HEAD.json", limit=1000)
    assert view.stat("HEAD.json").tag == view.watch("HEAD.json", tag=None, timeout=0).tag
    with pytest.raises(TooLarge):
        view.get("HEAD.json", limit=1)
    with pytest.raises(NotFound):
        view.stat("nowhere")
    for write in (lambda: view.put("x", b""), lambda: view.put_new("x", b""), lambda: view.delete("HEAD.json")):
        with pytest.raises(NotOffered):
            write()


def test_a_started_server_shows_its_page_and_one_with_users_does_not(tmp_path, monkeypatch):
    with started("serve", "--root", tmp_path / "hub", "--port", 0) as (ready, process):
        answer = httpx.get(ready["url"])
        assert answer.status_code == 200 and "<html" in answer.text
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert httpx.get(ready["url"] + "/status.json").json() == {"buckets": []}
        monkeypatch.setenv("HF_ENDPOINT", ready["url"])
        monkeypatch.setenv("HF_TOKEN", "any")
        publish_all(dw.open_bucket("hf://buckets/me/one", create=True), model())
        with httpx.stream("GET", ready["url"] + "/events?bucket=me/one", timeout=60) as stream:
            lines = (line for line in stream.iter_lines() if '"trainer"' in line)
            assert '"version":0' in next(lines)
            began = time.monotonic()
            process.terminate()
            process.wait(60)
            assert time.monotonic() - began < 8, "a stream kept the server from ending"
    users = tmp_path / "users.json"
    users.write_text(json.dumps({"users": [{"name": "ada", "token": "a-long-secret"}]}))
    with started("serve", "--root", tmp_path / "closed", "--port", 0, "--users", users) as (ready, _):
        assert httpx.get(ready["url"] + "/status.json").status_code == 404


def test_status_serves_a_page_that_follows_the_run(tmp_path):
    url = (tmp_path / "bucket").as_uri()
    weights = model()
    with publishing(dw.open_bucket(url, create=True)) as publisher:
        publisher.publish(weights)
        run = publisher.flush(30).run
        say(publisher.bucket, "alpha", run, 0)
        with started("status", url, "--serve", 0) as (page, _):
            assert "<html" in httpx.get(page["url"]).text
            events = told(page["url"])
            assert next(event for event in events if "trainer" in event)["replicas"][0]["replica"] == "alpha"
            edit(weights, 1)
            publisher.publish(weights)
            publisher.flush(30)
            assert next(events)["trainer"]["version"] == 1
            events.close()


def test_a_port_that_cannot_be_had_is_named(tmp_path):
    command = [sys.executable, "-m", "deltawire.cli", "status", fresh().url, "--serve", "here"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "--serve" in done.stderr
