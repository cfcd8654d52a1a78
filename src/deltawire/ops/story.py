"""What is known so far about a running demo: the state of each process and every report heard. No I/O, no clock."""

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from deltawire.errors import FormatError
from deltawire.ops.cast import Act
from deltawire.ops.summary import Served, Step

Light = Literal["waiting", "starting", "ready", "ended", "failed"]
PROCESSES = ("bucket-server", "environment", "vllm", "follower", "trainer")


@dataclass(slots=True)
class Story:
    """Grows by `hear`; the screens draw it."""

    acts: tuple[Act, ...]
    lights: dict[str, Light] = field(default_factory=lambda: dict.fromkeys(PROCESSES, "waiting"))
    steps: list[Step] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    published: int | None = None
    """the version the trainer published last"""
    upload_seconds: float | None = None
    """what its last upload took"""
    problem: str | None = None
    """what the follower could not do last, until it could"""

    def hear(self, name: str, record: dict[str, object]) -> None:
        """Take in one record of one process; events nobody draws are ignored. Raises FormatError."""
        try:
            match name, record.get("event"):
                case "trainer", "start" | "done":
                    self.published = msgspec.convert(record["version"], int)
                case "trainer", "step":
                    self.steps.append(msgspec.convert(record, Step))
                    self.published = self.steps[-1].version
                case "trainer", "upload":
                    self.upload_seconds = msgspec.convert(record["seconds"], float)
                case "follower", "update":
                    self.served.append(msgspec.convert(record, Served))
                    self.problem = None
                case "follower", "problem":
                    self.problem = str(record["error"])
        except (KeyError, msgspec.ValidationError) as error:
            raise FormatError(f"the {name} of this demo speaks another language: {error} in {record}") from None

    @property
    def total_steps(self) -> int:
        """Steps of all acts together."""
        return sum(act.steps for act in self.acts)

    @property
    def served_version(self) -> int | None:
        """The version vLLM serves, None before its first update."""
        return self.served[-1].version if self.served else None
