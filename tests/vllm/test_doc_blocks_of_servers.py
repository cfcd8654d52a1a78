"""The blocks of README and docs that need a vLLM server, on the one that tests start: as they stand, at its address."""

import json
import re
import shlex

import pytest
from doc_blocks import BLOCKS, REPOSITORY, Block, Reader
from runs import publish_all
from servers import START_SECONDS, Server, tiny_qwen3

import deltawire as dw
from deltawire.follow.follower import Follower
from deltawire.vllm.client import EngineClient

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2 * START_SECONDS)]
OURS = [block for block in BLOCKS if block.kind == "vllm"]
STARTS = re.compile(r"vllm serve|vllm\.entrypoints")


@pytest.fixture(scope="module")
def readers(server: Server, tmp_path_factory):
    """The reader of each page; the bucket that the pages name is a folder here, with two versions of the weights."""
    from deltawire.demo.processes import free_port

    folder = tmp_path_factory.mktemp("bucket")
    publish_all(dw.open_bucket(folder.as_uri(), create=True), *two_versions())
    instead = {"hf://buckets/me/wordle": folder.as_uri(), "http://127.0.0.1:8000": server.url}
    pages: dict[str, Reader] = {}

    def reader_of(block: Block) -> Reader:
        if block.page not in pages:
            instead["--health 8001"] = f"--health {free_port()}"
            pages[block.page] = Reader(tmp_path_factory.mktemp("reader"), {}, {}, dict(instead))
        return pages[block.page]

    yield reader_of
    for reader in pages.values():
        reader.__exit__()


def two_versions() -> tuple[dict, dict]:
    """Weights of the server's model, and the ones it was started with."""
    after = {name: parameter.detach().clone() for name, parameter in tiny_qwen3().named_parameters()}
    return {**after, "model.norm.weight": after["model.norm.weight"] + 1}, after


@pytest.mark.parametrize("block", OURS, ids=str)
def test_a_block_for_a_server_runs_on_the_one_that_tests_start(block, readers, server):
    if STARTS.search(block.text):
        require_started_so(block, server)
        return
    reader = readers(block)
    bring_to_newest(server, reader)
    if block.until is None:
        assert reader.bash(block).strip()
    else:
        reader.end(reader.begin(block))  # one follower drives a server


def bring_to_newest(server: Server, reader: Reader) -> None:
    """A follower then says that the server is current, whatever other tests left there."""
    with Follower(reader.instead["hf://buckets/me/wordle"], EngineClient(server.url)) as follower:
        follower.step()


def require_started_so(block: Block, server: Server) -> None:
    """A block that starts vLLM names no variable and no option but those that the tests' server was started with."""
    setting, *words = shlex.split(block.text.replace("\\\n", " "))
    name, _, value = setting.partition("=")
    assert server.environment[name] == value
    if words[:2] == ["vllm", "serve"]:
        model, options = words[2], words[3:]
    else:
        assert words[:3] == ["python", *server.command[1:3]]
        model, options = words[4], words[5:]
    assert model == "path/to/model"
    asked = dict(zip(options[::2], options[1::2], strict=True))
    started = dict(zip(server.command, server.command[1:], strict=False))
    assert json.loads(asked.pop("--weight-transfer-config")) == json.loads(started["--weight-transfer-config"])
    assert asked.items() <= started.items()


def test_what_docs_show_beside_a_server_is_what_the_commands_print(server, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    import cli_examples

    for name, printed in cli_examples.beside_a_server(server.url, tmp_path, *two_versions()).items():
        assert printed == cli_examples.recorded(name), f"look at it, then put it into scripts/transcripts/{name}.txt"
