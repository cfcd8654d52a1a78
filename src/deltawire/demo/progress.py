"""What is known so far about a running demo: the state of each process and every report heard. No I/O, no clock."""

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from deltawire.demo.games import Game
from deltawire.demo.summary import Exam, Served, Step
from deltawire.errors import FormatError

Light = Literal["waiting", "starting", "ready", "ended", "failed"]
PROCESSES = ("bucket-server", "environment", "vllm", "follower", "trainer")


@dataclass(slots=True)
class Progress:
    """Grows by `hear`; the screens draw it."""

    game: Game
    lights: dict[str, Light] = field(default_factory=lambda: dict.fromkeys(PROCESSES, "waiting"))
    steps: list[Step] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    urls: dict[str, str] = field(default_factory=dict)
    """where the processes that said so are ready"""
    doing: dict[str, str] = field(default_factory=dict)
    """what the processes that said so are at"""
    exams: list[Exam] = field(default_factory=list)
    """what vLLM answered before the first step, and after the last"""
    published: int | None = None
    """the version the trainer published last"""
    finished: int | None = None
    """its last version, once it said that it is the last"""
    upload_seconds: float | None = None
    """what its last upload took"""
    problem: str | None = None
    """what the follower could not do last, until it could"""

    def hear(self, name: str, record: dict[str, object]) -> None:
        """Take in one record of one process; events nobody draws are ignored. Raises FormatError."""
        try:
            match name, record.get("event"):
                case _, "ready" | "page":
                    self.urls[name] = str(record.get("url"))
                case _, "doing":
                    self.doing[name] = str(record.get("what"))
                case _, "exam":
                    self.exams.append(msgspec.convert(record, Exam))
                case "trainer", "start":
                    self.published = msgspec.convert(record["version"], int)
                case "trainer", "done":
                    self.finished = msgspec.convert(record["version"], int)
                case "trainer", "step":
                    self.steps.append(msgspec.convert(record, Step))
                    self.published = self.steps[-1].version
                case "trainer", "upload":
                    self.upload_seconds = msgspec.convert(record["seconds"], float)
                case "follower", "update":
                    self.served.append(msgspec.convert(record, Served))
                    self.problem = None
                case "follower", "current":
                    self.problem = None
                case "follower", "problem":
                    self.problem = str(record["error"])
        except (KeyError, msgspec.ValidationError) as error:
            raise FormatError(f"the {name} of this demo speaks another language: {error} in {record}") from None

    def has_said_ready(self, name: str) -> bool:
        """Whether a process has said that it is ready, in a way of its own."""
        said = {"follower": self.served_version, "trainer": self.published}
        return said.get(name, self.urls.get(name)) is not None

    @property
    def total_steps(self) -> int:
        """Steps of all acts together."""
        return sum(act.steps for act in self.game.acts)

    @property
    def served_version(self) -> int | None:
        """The version vLLM serves, None before its first update."""
        return self.served[-1].version if self.served else None
