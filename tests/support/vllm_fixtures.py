"""One real vLLM server for all tests of a session, over a small seeded model: in every file, and in one process."""

import re
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
USES_IT = re.compile(r"^def test_\w+\([^)]*\bserver\b", re.MULTILINE)


@cache
def uses_the_server(file):
    """Whether tests of a file, named from the repository's root, ask for the server."""
    path = REPOSITORY / file
    text = path.read_text() if path.suffix == ".py" and path.exists() else ""
    return "pytest.mark.vllm" in text and USES_IT.search(text) is not None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Of several processes, one runs all files that use the server: it takes longer to start than most of them."""
    from xdist.scheduler import LoadFileScheduling

    class OneServer(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "one server" if uses_the_server(file) else file

    return OneServer(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Show the end of the server's log with a test that failed on it."""
    report = yield
    if report.failed and "server" in getattr(item, "funcargs", {}):
        log = item.funcargs["server"].log.read_text(errors="replace")
        report.sections.append(("end of the vLLM log", log[-3000:]))
    return report


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with the starting checkpoint, in bf16; its file repeats the tied head, as that of Qwen3-0.6B does."""
    from servers import repeat_head, save_checkpoint

    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(folder)
    repeat_head(folder)
    return folder


@pytest.fixture(scope="session")
def server(checkpoint, tmp_path_factory):
    """A vLLM server with the deltawire engine; `at_start` is what it held when it was fresh."""
    from servers import Server

    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    telling = ("--middleware", "deltawire.vllm.middleware.PolicyVersion")
    started = Server(checkpoint, log, options=("--enable-scale-out", *telling))
    try:
        started.wait().remember()
        yield started
    finally:
        started.stop()
