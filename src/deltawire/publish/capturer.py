"""What captures: the next version of the weights, from the tensors that a trainer gives. Needs no network once open."""

import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from deltawire.publish.baseline import Own
from deltawire.publish.choice import Choice
from deltawire.publish.devices import Asked, Cuda, Devices, Lies
from deltawire.publish.pending import Captured
from deltawire.publish.sender import Tip
from deltawire.publish.tracker import Transition
from deltawire.weights.bits import Bits


def random_run_id() -> str:
    """The id of a run that begins: 16 hex digits, which no other run will have."""
    return secrets.token_hex(8)


@dataclass(frozen=True, slots=True)
class CaptureOptions:
    """How a run is opened or begun, as `Publisher` explains it.

    With `supersede` a new run begins whatever is there. `compactors` are public keys, `clock` gives seconds since 1970,
    and `new_run_id` the id of a run that begins: 16 hex digits. `codecs` are what such a run lists. `own` says
    where a baseline on the host lies, `baseline` whether it lies there, and `devices` which tensors lie on a device.
    `choose` says what a version that is captured now is encoded in, as far as its run lists that.
    """

    base: str | Path | None
    dtype: str | Mapping[str, str]
    assets: Path | None
    clock: Callable[[], float]
    supersede: bool = False
    compactors: tuple[str, ...] = ()
    new_run_id: Callable[[], str] = random_run_id
    codecs: tuple[str, ...] = ()
    own: Own = Bits.copy
    baseline: Asked = "auto"
    devices: Devices = field(default_factory=Cuda)
    choose: Callable[[], Choice] = Choice


@dataclass(frozen=True, slots=True)
class About:
    """What a trainer says of a version: its optimizer step, and metrics."""

    step: int | None
    metrics: Mapping[str, float]

    @classmethod
    def of(cls, step: int | None, metrics: Mapping[str, float] | None) -> "About":
        """The same as numbers of our own. Raises ValueError, TypeError where something cannot become a number."""
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        return cls(None if step is None else int(step), numbers)


@dataclass(frozen=True, slots=True)
class Capture:
    """What one publish captured.

    `versions` holds the next version; a run's first capture on a base can make two. `compare_seconds` were spent
    comparing, and encoding what was found. `changed` elements changed, and the newest version's files have
    `wire_bytes`, on all ranks together; None while they are to be made.

    Of a sharded job's capture, `cut` is the newest version that rank 0 has begun to send, as all ranks know it by now.
    Nothing folds into it any more.
    """

    versions: tuple[Captured, ...]
    compare_seconds: float
    changed: int
    wire_bytes: int | None
    cut: int = -1


class Capturer(Protocol):
    """Holds the baseline and the change that no version covers yet; every capture moves both or neither.

    It opens where the bucket stands: a run that is already there is continued from its last commit.
    """

    transition: Transition
    """open while the state is between two that agree with themselves"""

    @property
    def resumed(self) -> Tip | None:
        """The commit that a continued run stood at; None for a run that begins."""

    @property
    def next_version(self) -> int:
        """The number that the next version will have."""

    @property
    def total(self) -> int:
        """Elements in the tensor table."""

    @property
    def model_bytes(self) -> int:
        """Bytes of one whole version."""

    @property
    def held_bytes(self) -> int:
        """The most memory that waiting changes can take, once folded: an increment for every element that is ours."""

    @property
    def baseline(self) -> Lies:
        """Where the baseline lies."""

    def capture(
        self,
        pairs: Iterable[tuple[str, Any]],
        *,
        step: int | None,
        metrics: Mapping[str, float] | None,
        cut: int = -1,
        stay: bool = False,
    ) -> Capture:
        """Compare, and number what changed. `cut` is the newest version that nothing folds into, as known here. `stay`
        says that tensors keep their values when the next is asked for, so that many are compared at once.

        The `transition` that it begins is the caller's to end, once it has what was captured. Raises UnknownTensor,
        MissingTensor, ShapeMismatch, DtypeMismatch, OutOfSpace. A change captured before the error stays in the
        baseline and in what the next version covers.
        """

    def close(self) -> None:
        """Remove what was downloaded."""
