"""Proxies of the environment: never before this host's own servers, and named where they are in the way."""

import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from deltawire.buckets.proxies import is_loopback, proxy_note, spare_loopback


@pytest.fixture(autouse=True)
def proxied(monkeypatch):
    """A proxy that answers nobody, for every kind of request."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://user:secret@127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "example.org")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1", "http://127.8.9.1:80/x", "http://[::1]:9", "http://localhost:1", "https://x.localhost"]
)
def test_an_address_of_this_host_is_known(url):
    assert is_loopback(url)


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1", "http://localhost.example.org", "http://example.org", "nothing", ""]
)
def test_any_other_is_not(url):
    assert not is_loopback(url)


def test_loopback_is_added_once_to_the_hosts_that_are_reached_without_a_proxy():
    assert not spare_loopback("http://10.0.0.1:80")
    assert os.environ["NO_PROXY"] == "example.org"
    assert spare_loopback("http://127.0.0.5:80")
    assert not spare_loopback("http://127.0.0.5:80")
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "example.org,127.0.0.1,localhost,::1,127.0.0.5"


def test_without_a_proxy_the_environment_is_left_alone(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name)
    assert not spare_loopback("http://127.0.0.1:80")
    assert os.environ["NO_PROXY"] == "example.org"


def test_a_proxy_is_named_without_its_password_where_it_is_in_the_way():
    assert "the proxy 127.0.0.1:1 that HTTPS_PROXY names" in proxy_note("https://s3.amazonaws.com")
    assert "secret" not in proxy_note("https://s3.amazonaws.com")
    assert proxy_note("https://example.org/x") == ""


class Vllm(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "24")
        self.end_headers()
        self.wfile.write(b'{"weight_version":"a:1"}')

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_an_engine_on_loopback_is_asked_directly(host):
    pytest.importorskip("httpx", reason="speaking to vLLM needs httpx")
    from deltawire.vllm.client import EngineClient

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server_class = type("Server", (ThreadingHTTPServer,), {"address_family": family})
    try:
        server = server_class((host, 0), Vllm)
    except OSError:
        pytest.skip(f"this machine has no {host}")
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        named = f"[{host}]" if ":" in host else host
        with EngineClient(f"http://{named}:{server.server_port}") as engine:
            assert engine.weight_version() == "a:1"
        server.shutdown()
        thread.join()


def test_an_engine_behind_a_proxy_names_it():
    pytest.importorskip("httpx", reason="speaking to vLLM needs httpx")
    from deltawire.errors import EngineUnavailable
    from deltawire.vllm.client import EngineClient

    with (
        EngineClient("http://engine.invalid") as engine,
        pytest.raises(EngineUnavailable, match="that HTTP_PROXY names"),
    ):
        engine.weight_version()
