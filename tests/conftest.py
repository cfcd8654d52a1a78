"""What every test shares: hypothesis without a deadline, because a kernel compiles when first called; quick retries; an
S3 server; and which tests go first."""

import uuid

import pytest
from hypothesis import settings

settings.register_profile("deltawire", deadline=None, max_examples=60)
settings.load_profile("deltawire")
REGION = "us-east-1"
pytest_plugins = ["vllm_fixtures"]


def pytest_collection_modifyitems(items):
    """What starts servers or networks goes first, so that of two processes, which get a file each at a time, neither is
    left with all of the slow ones at the end."""
    items.sort(key=lambda item: not (item.get_closest_marker("vllm") or item.get_closest_marker("network")))


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory):
    """What followers remember and fetch goes to no home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.setenv("DELTAWIRE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def quick_retries():
    """A publisher that tries again at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deltawire.publish.uploader.FIRST_RETRY", 0.001)
        patch.setattr("deltawire.publish.uploader.LAST_RETRY", 0.01)
        yield


@pytest.fixture(scope="module")
def s3_endpoint():
    """The address of a moto server, which the environment names too."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        url = f"http://{host}:{port}"
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "NO_PROXY": "127.0.0.1",
        }.items():
            patch.setenv(name, value)
        yield url
    server.stop()


@pytest.fixture
def s3_url(s3_endpoint):
    """An empty bucket of its own."""
    import boto3

    name = f"b{uuid.uuid4().hex}"
    boto3.client("s3", endpoint_url=s3_endpoint, region_name=REGION).create_bucket(Bucket=name)
    return f"s3://{name}/prefix"
