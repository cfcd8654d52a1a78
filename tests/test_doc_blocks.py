"""Every command and code block of README and docs runs as it stands, or is listed here with the reason why not.

tests/vllm/test_doc_blocks.py runs those that need a vLLM server.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from doc_blocks import BLOCKS, PAGES, REPOSITORY, Block, Reader, blocks_of

LANGUAGES = {"python", "bash", "text"}
NOT_RUN = {
    "sudo useradd": "changes this host; tests/examples/test_deploy.py checks the units",
    "cp examples/deploy/deltawire.env": "needs Docker; tests/examples/test_deploy.py checks the files",
    "kubectl create": "needs a cluster; tests/examples/test_deploy.py checks the manifest",
    "deltawire follow --bucket hf://buckets/me/wordle --health 8100": (
        "needs two servers; tests/vllm/test_several_on_vllm.py starts them"
    ),
    "export VLLM_SERVER_DEV_MODE=1": "needs two servers; tests/vllm/test_several_on_vllm.py starts two of one model",
}
"""blocks that no test runs, by how they begin, and the reasons that their marks give"""
COMMANDS = "deltawire|pip|make|vllm|python3?|curl|hf|export|torchrun|sudo|docker|kubectl|cp"
COMMAND = re.compile(rf"^\s*(\$ |([A-Z_]+=\S* )*({COMMANDS}) )", re.M)
PROMPT = 3000.0
"""seconds for a nightly block, which may set up an environment"""
EXTRAS = re.compile(r"pip install '[^\[']*\[([\w,]+)\]'")


def as_they_stand(page) -> list[Block]:
    return [block for block in blocks_of(page) if block.language != "text" and block.kind in ("", "background")]


RUN = [block for page in PAGES for block in as_they_stand(page)]
NIGHTLY = [block for block in BLOCKS if block.kind == "nightly"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Settings by which `hf://` is a bucket server here."""
    from hub_client import client_environment

    from deltawire.hub_server import HubProcess

    folder = tmp_path_factory.mktemp("hub")
    with HubProcess(folder / "root", log=folder / "log") as server:
        yield {**client_environment(folder), "HF_ENDPOINT": server.url}


@pytest.fixture(scope="module")
def s3(s3_endpoint) -> str:
    """An S3 server with the bucket that the pages name."""
    import boto3

    boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1").create_bucket(Bucket="weights")
    return s3_endpoint


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    """A trained model, whose run of two versions is in the bucket that the pages name; the folder of a page has it."""
    import torch
    from servers import save_checkpoint, tiny_qwen3

    model = tiny_qwen3()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    before = {
        name: torch.where(torch.arange(tensor.shape[-1]) % 100 == 0, 0, tensor) for name, tensor in weights.items()
    }
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, model)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in hub.items():
            patch.setenv(name, value)
        publish("hf://buckets/me/wordle", before, weights)
    return folder


def publish(url: str, *versions) -> None:
    import deltawire as dw

    with dw.Publisher(dw.open_bucket(url, create=True)) as publisher:
        for step, weights in enumerate(versions):
            publisher.publish(weights, step=step)
            publisher.flush(60)


@pytest.fixture(scope="module")
def readers(hub, s3, published, tmp_path_factory):
    """The reader of each page, made when its first block is read."""
    from deltawire.demo.processes import free_port

    reading: dict[str, Reader] = {}

    def reader_of(page: str) -> Reader:
        if page not in reading:
            folder = tmp_path_factory.mktemp("reader")
            (folder / "path" / "to").mkdir(parents=True)
            (folder / "path" / "to" / "model").symlink_to(published)
            instead = {"http://127.0.0.1:9000": s3, "--host 0.0.0.0": "--host 127.0.0.1"}
            instead |= {port: str(free_port()) for port in ("8100", "8101", "8102")}
            reading[page] = Reader(folder, hub, at_hand(folder), instead)
        return reading[page]

    yield reader_of
    for reader in reading.values():
        reader.__exit__()


def at_hand(folder) -> dict:
    """What the pages say their reader has: a model, its optimizer, a step, a PEFT model, a Trainer's options."""
    import peft
    import torch
    from servers import VOCABULARY, tiny_qwen3
    from transformers import TrainingArguments

    model = tiny_qwen3()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    tokens = torch.randint(0, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
    model(input_ids=tokens, labels=tokens).loss.backward()
    options = {"max_steps": 1, "learning_rate": 1e-6, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    return {
        "model": model,
        "optimizer": optimizer,
        "step": 2,
        "peft_model": peft.get_peft_model(tiny_qwen3(), peft.LoraConfig(r=2, target_modules=["q_proj"])),
        "arguments": TrainingArguments(str(folder / "trainer"), use_cpu=True, dataloader_pin_memory=False, **options),
        "samples": [{"input_ids": row, "labels": row} for row in tokens.tolist()],
    }


@contextmanager
def one_rank(block: Block):
    """A process group of this process alone, where a block asks for one."""
    if "dist.group.WORLD" not in block.text:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("block", RUN, ids=str)
def test_a_block_runs_as_it_stands(block, readers):
    reader = readers(block.page)
    if block.kind == "background":
        reader.begin(block)
    elif block.language == "bash":
        reader.bash(block)
    else:
        with one_rank(block):
            reader.python(block)


def test_a_block_that_fails_fails_its_test(tmp_path):
    with Reader(tmp_path, {}, {}) as reader:
        with pytest.raises(ZeroDivisionError):
            reader.python(Block("page", 1, "python", "1 / 0", "", ""))
        with pytest.raises(AssertionError, match="page:2"):
            reader.bash(Block("page", 2, "bash", "false\ntrue", "", ""))
        reader.bash(Block("page", 3, "bash", "export KEPT=yes", "", ""))
        assert reader.bash(Block("page", 4, "bash", "echo $KEPT", "", "")) == "yes\n"


def test_every_block_says_what_it_is():
    assert len(BLOCKS) > 40
    assert {block.language for block in BLOCKS} <= LANGUAGES, [str(b) for b in BLOCKS if b.language not in LANGUAGES]


def test_no_command_hides_in_a_block_of_text():
    """docs/CLI.md shows commands with what they print; tests/cli/test_cli.py runs them again."""
    texts = [block for block in BLOCKS if block.language == "text" and block.page != "docs/CLI.md"]
    assert texts and not [str(block) for block in texts if COMMAND.search(block.text)]


def test_the_blocks_that_no_test_runs_are_listed_with_their_reasons():
    marked = {block.text: block.reason for block in BLOCKS if block.kind == "not run"}
    assert sorted(marked.values()) == sorted(NOT_RUN.values())
    for begins, reason in NOT_RUN.items():
        assert [text for text in marked if text.startswith(begins)] == [
            text for text in marked if marked[text] == reason
        ]


def test_a_mark_that_is_none_is_refused():
    for page in PAGES:
        for mark in re.findall(r"^<!-- (.*) -->\n```", page.read_text(), re.M):
            assert re.match(r"(background|nightly|vllm|not run): \S", mark), f"{page.name}: {mark}"


def test_every_extra_that_a_page_installs_is_one_of_the_package():
    import tomllib

    known = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = {name for page in PAGES for found in EXTRAS.findall(page.read_text()) for name in found.split(",")}
    assert asked and asked <= known.keys()


TRL = """
import sys
sys.path[:0] = {paths!r}
from examples.trl import on_cpu
on_cpu.prepare()
from datasets import Dataset
from immediate_eos import immediate_eos as reward, tokenizer_of
from trl.experimental.async_grpo import AsyncGRPOConfig
from deltawire.trainers.trl import DeltaWeightTransfer
tokenizer = tokenizer_of("path/to/model")
transfer = DeltaWeightTransfer("memory://trl", assets="path/to/model")
prompts = Dataset.from_dict({{"prompt": [[{{"role": "user", "content": "w100"}}]]}})
config = AsyncGRPOConfig(output_dir="trl", max_steps=1, report_to=[], **on_cpu.OPTIONS)
"""
LLM = """
import functools
import vllm
vllm.LLM = functools.partial(vllm.LLM, dtype="bfloat16", max_model_len=128, enforce_eager=True)
if __name__ == "__main__":
"""


def program(text: str) -> str:
    """A nightly Python block after what its page calls yours, and what a CPU asks for."""
    if "from vllm import" in text:
        return LLM + "".join(f"    {line}" for line in text.splitlines(keepends=True))
    return TRL.format(paths=[str(REPOSITORY), str(REPOSITORY / "tests" / "support")]) + text


def fresh_environment(folder: Path) -> dict[str, str]:
    """Settings by which `pip` installs into an environment of its own, which sees what is installed here."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "here.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return {**os.environ, "PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]]), "PYTHONPATH": ""}


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("block", NIGHTLY, ids=str)
def test_a_block_that_takes_its_time_runs_too(block, readers, tmp_path):
    reader = readers(block.page)
    if block.language == "python":
        script = tmp_path / "block.py"
        script.write_text(program(reader.typed(block)))
        command, place = [sys.executable, str(script)], reader.folder
        settings = {**reader.environment, "VLLM_CPU_KVCACHE_SPACE": "1"}
    else:  # in a checkout
        command = ["bash", "-euo", "pipefail", "-c", block.text.replace("/tmp/", f"{tmp_path}/")]
        place, settings = REPOSITORY, {**os.environ, "PATH": reader.environment["PATH"]}
        if "pip install" in block.text:
            settings = fresh_environment(tmp_path / "environment")
    subprocess.run(command, cwd=place, env=settings, timeout=PROMPT, check=True)
    if "pip install" in block.text:
        subprocess.run(["deltawire", "--version"], cwd=tmp_path, env=settings, check=True)
