"""Metrics by Prometheus's conventions, and a dashboard whose queries a real Prometheus answers."""

import json
import logging
import re
import shutil
import socket
import subprocess
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from runs import edit, fresh, model, publishing
from small import SmallRun
from stub_engine import StubEngine
from waiting import until

from deltawire.fleet import page
from deltawire.fleet.follower_port import NoMetrics, board_of, metrics_of
from deltawire.fleet.metrics import PublisherMetrics
from deltawire.follow.follower import Follower
from deltawire.follow.health import HealthServer
from deltawire.follow.options import FollowOptions
from deltawire.vllm.client import EngineClient

GRAFANA = Path(__file__).parents[2] / "examples" / "grafana"
QUERIES = [
    target["expr"]
    for panel in json.loads((GRAFANA / "deltawire.json").read_text())["panels"]
    for target in panel["targets"]
]
BUSY = 0.01
"""of a core, that page and metrics may take of a follower"""


@pytest.fixture
def place(tmp_path):
    """A follower's health port and a publisher's port, after a few versions; what publishes another."""
    with ExitStack() as stack:
        run = stack.enter_context(SmallRun(tmp_path / "bucket"))
        engine = stack.enter_context(StubEngine(run.model()))
        updates = []
        follower = stack.enter_context(
            Follower(run.url, EngineClient(engine.url), FollowOptions(on_update=updates.append))
        )
        board, metrics = board_of(follower), metrics_of({"one": follower})
        stack.enter_context(closing(board))
        ready = follower.beats.unready
        health = stack.enter_context(HealthServer(0, ready, follower.health, routes=[board, metrics]))
        trainer = PublisherMetrics()
        port = stack.enter_context(trainer.serve(0))
        other, weights = fresh(), model()
        publisher = stack.enter_context(publishing(other, on_upload=trainer.uploaded))

        def go_on():
            run.publish(a=1)
            follower.step()
            edit(weights, len(updates))
            trainer.published(publisher.publish(weights))
            publisher.flush(30)

        for _ in range(3):
            go_on()
        yield health.url.removesuffix("health"), port.url, follower, metrics, engine, go_on


def scraped(url):
    """Every sample of an endpoint, by its name."""
    answer = httpx.get(url + "metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(answer.text))
    return {sample.name: sample.value for family in families for sample in family.samples}, families


def test_a_follower_and_a_publisher_export_what_they_did(place):
    follower, publisher, _, metrics, _, _ = place
    samples, _ = scraped(follower)
    assert samples["deltawire_follower_version"] == samples["deltawire_follower_newest_version"] == 3
    assert samples["deltawire_follower_updates_total"] == samples["deltawire_follower_pause_seconds_count"] == 3
    assert (samples["deltawire_follower_ready"], samples["deltawire_follower_lag_versions"]) == (1, 0)
    assert samples["deltawire_follower_received_bytes_total"] > 0 and samples["process_cpu_seconds_total"] > 0
    metrics.failed(OSError("x"))
    assert scraped(follower)[0]["deltawire_follower_problems_total"] == 1
    samples, _ = scraped(publisher)
    assert samples["deltawire_publisher_committed_version"] == samples["deltawire_publisher_version"] == 2
    assert samples["deltawire_publisher_uploads_total"] == 3
    assert (samples["deltawire_publisher_waiting_versions"], samples["deltawire_publisher_failing"]) == (0, 0)


def test_names_and_units_follow_prometheus_conventions(place):
    for url in place[:2]:
        families = [family for family in scraped(url)[1] if family.name.startswith("deltawire_")]
        assert len(families) > 8
        for family in families:
            assert re.fullmatch(r"deltawire_(follower|publisher)_[a-z_]+", family.name)
            assert family.documentation.endswith(".")
            assert not re.search(r"_(ms|milliseconds|kib|mib|percent|minutes)\b", family.name), "base units only"
            if family.type == "histogram":
                assert family.name.endswith("_seconds")
            if family.type == "counter":
                assert {sample.name for sample in family.samples} <= {f"{family.name}_total", f"{family.name}_created"}


def test_every_metric_of_the_dashboard_is_exported(place):
    place[3].failed(OSError("x"))
    exported = {*scraped(place[0])[0], *scraped(place[1])[0]}
    asked = {name for query in QUERIES for name in re.findall(r"\b(?:deltawire|process)_[a-z_]+", query)}
    assert len(asked) > 15
    assert asked <= exported


def test_the_dashboards_queries_find_something_in_a_real_prometheus(place, tmp_path):
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus here: apt-get install --no-install-recommends prometheus")
    place[3].failed(OSError("x"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = (GRAFANA / "prometheus.yml").read_text().replace("15s", "500ms")
    for given, here in zip(("127.0.0.1:8001", "127.0.0.1:8002"), place[:2], strict=True):
        config = config.replace(given, here.removeprefix("http://").strip("/"))
    (tmp_path / "prometheus.yml").write_text(config)
    command = [program, f"--config.file={tmp_path}/prometheus.yml", f"--web.listen-address=127.0.0.1:{port}"]
    command.append(f"--storage.tsdb.path={tmp_path}/data")
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process, httpx.Client(trust_env=False) as http:
        try:

            def ask(query):
                try:
                    answer = http.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": query})
                except httpx.ConnectError:
                    return []
                if answer.status_code == 503:  # starting
                    return []
                assert answer.status_code == 200, f"{query}: {answer.text}"
                return answer.json()["data"]["result"]

            until(lambda: len(ask("deltawire_follower_version or deltawire_publisher_version")) == 2)
            place[5]()
            missing = set(QUERIES)
            until(lambda: not missing.difference_update(query for query in [*missing] if ask(query)) and not missing)
        finally:
            process.terminate()


def test_without_prometheus_client_the_endpoint_says_what_to_install():
    answer = NoMetrics().answer("/metrics", "")
    assert answer.status == 501 and b"deltawire[metrics]" in answer.body


def test_page_and_metrics_take_less_than_a_hundredth_of_a_core_and_no_call_of_the_engine(place):
    url, engine = place[0], place[4]
    asked = list(engine.calls)
    httpx.get(url + "metrics"), httpx.get(url)
    seconds, rounds = time.process_time(), 20
    with httpx.Client(base_url=url) as http:
        for _ in range(rounds):
            assert http.get("metrics").status_code == 200
            assert http.get("").status_code == 200
            assert http.get("status.json").status_code == 200
    seconds = (time.process_time() - seconds) / rounds  # the client's own part too
    logging.getLogger("deltawire.test").info("one scrape and one page: %.1f ms of CPU", 1e3 * seconds)
    assert seconds / 15 < BUSY  # a scrape, and somebody who loads the page anew, every 15 seconds
    with httpx.stream("GET", url + "events") as stream:  # and somebody who watches
        next(stream.iter_lines())
        (looking,) = (thread for thread in threading.enumerate() if thread.name == "deltawire-page")
        clock = time.pthread_getcpuclockid(looking.ident)
        used, began = time.clock_gettime(clock), time.monotonic()
        time.sleep(2 * page.BEATS_EVERY)
        assert (time.clock_gettime(clock) - used) / (time.monotonic() - began) < BUSY
    assert engine.calls == asked
