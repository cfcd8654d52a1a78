"""One real vLLM server for all tests of a process, over a small seeded model."""

import pytest


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
    """A vLLM server with the deltawire engine."""
    from servers import Server

    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    started = Server(checkpoint, log, options=("--enable-scale-out",))
    try:
        yield started.wait()
    finally:
        started.stop()
