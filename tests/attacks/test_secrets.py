"""Tokens and keys stay out of errors, reprs, logs and buckets, whatever goes wrong."""

import logging
import socket
import time
import traceback
from types import SimpleNamespace

import pytest
from runs import fresh, model, publish_all

from deltawire import open_bucket
from deltawire.errors import DeltaWireError
from deltawire.runlog import signing
from deltawire.vllm.client import EngineClient

CANARY = "canary-7f3a9c51e2"
VARIABLES = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "VLLM_API_KEY")


@pytest.fixture
def nobody(monkeypatch):
    """An address where nobody answers, and canaries wherever a secret is read from."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        for name in VARIABLES:
            monkeypatch.setenv(name, CANARY)
        for name, value in {
            "AWS_ACCESS_KEY_ID": "id", "AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": url,
            "HF_ENDPOINT": url, "HF_XET_CLIENT_RETRY_BASE_DELAY": "1ms", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        hurried = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})  # else 23 s between five tries
        monkeypatch.setattr("huggingface_hub.utils._http.time", hurried)
        yield url


@pytest.mark.parametrize("address", ["s3://bucket", "hf://buckets/me/name"])
def test_a_store_that_does_not_answer_names_no_secret(nobody, address, caplog):
    with caplog.at_level(logging.DEBUG):
        bucket = open_bucket(address)
        with pytest.raises(DeltaWireError) as caught:
            bucket.stat("a")
    said = "".join(traceback.format_exception(caught.value)) + repr(bucket) + bucket.url
    assert CANARY not in said + caplog.text


def test_a_server_that_does_not_answer_names_no_secret(nobody, caplog):
    with caplog.at_level(logging.DEBUG), EngineClient(nobody) as client, pytest.raises(DeltaWireError) as caught:
        client.status()
    assert CANARY not in "".join(traceback.format_exception(caught.value)) + repr(client) + caplog.text


@pytest.mark.parametrize("url", [f"s3://key:{CANARY}@bucket", f"hf://buckets/me/x?token={CANARY}", f"az://x#{CANARY}"])
def test_an_address_with_a_secret_is_refused_without_repeating_it(url):
    with pytest.raises(DeltaWireError) as caught:
        open_bucket(url)
    assert CANARY not in "".join(traceback.format_exception(caught.value))


def test_a_signed_run_holds_no_part_of_the_private_key(tmp_path, monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, CANARY)
    key = signing.generate_key(tmp_path / "key")
    bucket = fresh()
    publish_all(bucket, model(), model(1), signing_key=tmp_path / "key")
    secret = key._private.private_bytes_raw()
    for stat in bucket.list():
        data = bucket.get(stat.key, limit=1 << 24)
        assert secret not in data
        assert secret.hex().encode() not in data
        assert CANARY.encode() not in data
