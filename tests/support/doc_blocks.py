"""The code blocks of README and docs, and a reader who types them in, page by page.

A block of `python` or `bash` runs as it stands. A comment on the line before it says otherwise:

    <!-- background: until "serving" -->     it goes on while the rest of its page is read, once it says these words
    <!-- nightly: why -->                    it takes more than a minute
    <!-- vllm: … until "current" -->         it needs the vLLM server that the tests start
    <!-- not run: why -->                    it is listed in tests/test_doc_blocks.py

A block of `text` is a drawing or output. There are no others.
"""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from waiting import until

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
KINDS = ("background", "nightly", "vllm", "not run")
FENCE = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^ *```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.M | re.S)
UNTIL = re.compile(r'until "([^"]+)"')
LIMIT = 60.0
"""seconds for a block that is not nightly"""


@dataclass(frozen=True, slots=True)
class Block:
    """One block: where it stands, what it is, and how it is to be run ("" is: as it stands)."""

    page: str
    line: int
    language: str
    text: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def until(self) -> str | None:
        """What a command that goes on says once it is at work."""
        found = UNTIL.search(self.reason)
        return found[1] if found else None


def blocks_of(page: Path) -> list[Block]:
    """Every block of a page, in order."""
    text = page.read_text()
    name = page.relative_to(REPOSITORY).as_posix()
    found = []
    for match in FENCE.finditer(text):
        kind, _, reason = (match["mark"] or "").partition(":")
        kind = kind if kind in KINDS else ""
        line = text[: match.start("language")].count("\n") + 1
        found.append(Block(name, line, match["language"], match["text"], kind, reason.strip() if kind else ""))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


class Reader:
    """Somebody at a shell and a Python prompt in one folder, who types in a page's blocks one after another. `settings`
    is the environment to begin with; what a bash block exports stays. `instead` is what is typed in place of what."""

    def __init__(
        self, folder: Path, settings: dict[str, str], at_hand: dict[str, Any], instead: dict[str, str] | None = None
    ) -> None:
        self.folder, self.instead = folder, instead or {}
        own = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]),
        }
        self.environment = {**os.environ, **own, **settings}
        self.names: dict[str, Any] = {"__name__": "__main__", **at_hand}
        self._running: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._running:
            self.end(process)

    def typed(self, block: Block) -> str:
        """The block's text, with what is another on this machine."""
        text = block.text
        for shown, here in self.instead.items():
            text = text.replace(shown, here)
        return text

    def python(self, block: Block) -> None:
        """Run a block at the prompt: names of the blocks before it are there."""
        before, place = dict(os.environ), Path.cwd()
        os.environ.update({name: value for name, value in self.environment.items() if name != "PYTHONPATH"})
        os.chdir(self.folder)
        try:
            code = compile("\n" * block.line + self.typed(block), block.page, "exec")
            exec(code, self.names)
        finally:
            os.chdir(place)
            os.environ.clear()
            os.environ.update(before)

    def bash(self, block: Block, *, limit: float = LIMIT) -> str:
        """Run a block to its end; what it says. What it exports, later blocks have. Fails unless it ends with 0."""
        kept = self.folder / ".environment"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{self.typed(block)}\nenv -0 > {kept}"],
            **self._place(),
            stdout=subprocess.PIPE,
            timeout=limit,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}"
        self.environment |= dict(pair.split("=", 1) for pair in kept.read_text().split("\0") if pair)
        return done.stdout

    def begin(self, block: Block) -> "subprocess.Popen[str]":
        """Start a block that goes on, and wait until it says that it is at work."""
        log = self.folder / f"block-{block.line}.log"
        command = ["bash", "-euo", "pipefail", "-c", self.typed(block)]
        with log.open("w") as output:
            process = subprocess.Popen(command, **self._place(), stdout=output, start_new_session=True)
        self._running.append(process)
        words = block.until
        assert words, f'{block}: its mark says no `until "…"`'
        until(lambda: words in log.read_text() or process.poll() is not None, seconds=3 * LIMIT)
        assert process.poll() is None, f"{block}\n{log.read_text()}"
        return process

    def end(self, process: "subprocess.Popen[str]", grace: float = 20.0) -> None:
        """End a block with all that it started, as closing its terminal would."""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _place(self) -> dict[str, Any]:
        return {"cwd": self.folder, "env": self.environment, "stderr": subprocess.STDOUT, "text": True}
