"""What a publisher reports: one frozen record for each version captured, and one for each commit uploaded."""

from dataclasses import dataclass

from deltawire.runlog.figures import PREFIX, figures
from deltawire.runlog.records import Position


@dataclass(frozen=True, slots=True)
class PublishReport:
    """What one `publish` captured.

    `wire_bytes` is the size of this version's own file (the anchor's, for a run's first version). Versions that wait
    for the network are folded, so fewer bytes may be sent. Of a change that was found on a device the uploader's thread
    makes the file: then `is_encoded` is False, `wire_bytes` is 0, and the UploadReport has the bytes. `compare_seconds`
    is part of `seconds`; the upload is in neither, it goes on behind. `codec` is that of this version's file as it was
    captured, and `reason` why, where there was a choice. `waiting` versions were captured and are not committed yet.
    They take `waiting_bytes` of memory, and never more than `waiting_bound`: an increment for every element, beside the
    upload under way. `problem` is the last upload error, None while all is well. The `baseline` lies in "host", "file",
    "device", or "device and host". It takes `baseline_bytes`, and `baseline_device_bytes` of these on devices.

    In a sharded job every rank gets one. `changed`, `total`, `wire_bytes` and `model_bytes` are of all ranks together,
    and the same on each; seconds, what waits, the baseline, and `problem` are the rank's own.
    """

    run: str
    version: int
    step: int | None
    changed: int
    total: int
    wire_bytes: int
    model_bytes: int
    seconds: float
    compare_seconds: float
    waiting: int
    waiting_bytes: int
    waiting_bound: int
    problem: str | None
    codec: str = "subset"
    is_encoded: bool = True
    baseline: str = "host"
    baseline_bytes: int = 0
    baseline_device_bytes: int = 0
    reason: str = ""

    @property
    def density(self) -> float:
        """Share of elements that changed, 0 to 1."""
        return self.changed / self.total if self.total else 0.0

    def as_metrics(self) -> dict[str, float]:
        """Its numbers as `deltawire/…`, for a trainer's logs; `deltawire/failing` is 1 while uploads fail."""
        numbers = figures(self, density=self.density, failing=float(self.problem is not None))
        left_out = {f"{PREFIX}is_encoded"} | ({f"{PREFIX}wire_bytes"} if not self.is_encoded else set())
        return {name: number for name, number in numbers.items() if name not in left_out}


@dataclass(frozen=True, slots=True)
class UploadReport:
    """What one commit put into the bucket: `versions` captured versions folded into one, bytes and seconds."""

    position: Position
    parent: int | None
    versions: int
    wire_bytes: int
    seconds: float
    attempts: int

    def as_metrics(self) -> dict[str, float]:
        """Its numbers as `deltawire/…`, for a trainer's logs."""
        return figures(self)
