"""A bucket server in its own process, and the unmodified Hub client with caches of its own pointed at it."""

import itertools
from collections.abc import Iterator
from functools import partial

import pytest
from hub_client import PAGE_SIZE, Ask, ask, client_environment
from huggingface_hub import HfApi
from huggingface_hub.utils import disable_progress_bars

from deltawire.hub_server import HubProcess

_names = (f"me/bucket-{number}" for number in itertools.count())


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    """A running server with short listing pages."""
    folder = tmp_path_factory.mktemp("hub")
    with HubProcess(folder / "root", page_size=PAGE_SIZE, log=folder / "log") as server:
        yield server


@pytest.fixture(scope="session")
def api(hub: HubProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HfApi]:
    """The real `HfApi`, talking to `hub`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in client_environment(tmp_path_factory.mktemp("client")).items():
            patch.setenv(name, value)
        disable_progress_bars()
        yield HfApi(endpoint=hub.url, token="hf_fake")


@pytest.fixture
def bucket(api: HfApi) -> Iterator[str]:
    """The id of an empty bucket."""
    name = next(_names)
    api.create_bucket(name)
    yield name
    api.delete_bucket(name, missing_ok=True)


@pytest.fixture
def request_hub(hub: HubProcess) -> Ask:
    """`ask`, bound to the running server."""
    return partial(ask, hub.url)
