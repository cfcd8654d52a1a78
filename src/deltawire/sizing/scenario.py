"""What a forecast is asked about: a model, how much of it changes, the links, and the fleet."""

import itertools
import math
import re
from dataclasses import dataclass

from deltawire.errors import FormatError
from deltawire.sizing.constants import (
    BYTES_A_CHANGE,
    FABRIC_BYTES_PER_SECOND,
    HUB_LIMITS,
    HUB_POLL,
    ROUND_TRIP,
)

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMBT])?", re.IGNORECASE)
FEWEST = 1e3
"""weights of a model that is named by a number alone; a smaller number lacks its unit"""
_FACTORS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True, slots=True)
class Scenario:
    """A run to be. Raises FormatError for numbers that no run has.

    `weights` is a count, `width` bytes of each on the server, `density` the share that changes in a version. `up` and
    `down` are bits a second of the trainer's link and of each replica's; `region` those that all replicas of one region
    share, 0 for no limit. `cadence` is seconds between versions. `tokens` is how many Hub tokens the fleet has.
    """

    weights: float
    width: float = 2.0
    density: float = 0.01
    bytes_a_change: float | None = None
    """None: what codec subset takes at this density"""
    up: float = 1e9
    down: float = 1e9
    region: float = 0.0
    cadence: float = 60.0
    replicas: int = 1
    regions: int = 1
    workers: int = 1
    """GPUs of one replica, which share the work of an update"""
    ranks: int = 1
    """processes of a sharded trainer, which share the work of a publish"""
    poll: float = HUB_POLL
    round_trip: float = ROUND_TRIP
    plan: str = "free"
    tokens: int = 1
    fabric: float = FABRIC_BYTES_PER_SECOND
    """bytes a second of a broadcast inside one cluster"""

    def __post_init__(self) -> None:
        positive = {"weights": self.weights, "width": self.width, "up": self.up, "down": self.down}
        positive |= {"cadence": self.cadence, "poll": self.poll, "fabric": self.fabric, "workers": self.workers}
        positive |= {"ranks": self.ranks}
        positive |= {"replicas": self.replicas, "regions": self.regions, "tokens": self.tokens}
        if wrong := [name for name, value in positive.items() if not 0 < value < math.inf]:
            raise FormatError(f"{wrong[0]} is {positive[wrong[0]]}: it must be above 0")
        if not 0 < self.density <= 1:
            raise FormatError(f"density is {self.density}: a share above 0 and up to 1, as 0.01 for one percent")
        if self.plan not in HUB_LIMITS:
            raise FormatError(f"plan {self.plan!r} of the Hub is not known; there are {', '.join(HUB_LIMITS)}")

    @property
    def checkpoint_bytes(self) -> float:
        """Bytes of everything."""
        return self.weights * self.width

    def changed(self, versions: float = 1.0) -> float:
        """Weights that differ after so many versions. Which ones change is taken to be independent from version to
        version, so it is not underestimated."""
        return self.weights * (1.0 - math.pow(1.0 - self.density, versions))

    def delta_bytes(self, versions: float = 1.0) -> float:
        """Bytes of the change over so many versions, folded into one; never more than everything."""
        changed = self.changed(versions)
        each = bytes_a_change(changed / self.weights) if self.bytes_a_change is None else self.bytes_a_change
        return min(each * changed, self.checkpoint_bytes)

    @property
    def replicas_of_a_region(self) -> int:
        """Replicas in the fullest region."""
        return math.ceil(self.replicas / self.regions)

    @property
    def download_bytes_per_second(self) -> float:
        """What each replica gets while all of its region fetch at once."""
        shared = self.region / self.replicas_of_a_region if self.region else math.inf
        return min(self.down, shared) / 8


def bytes_a_change(density: float) -> float:
    """Bytes of codec subset for each changed weight, read off the measured points."""
    points = [(math.log(share), each) for share, each in BYTES_A_CHANGE]
    at = math.log(min(max(density, BYTES_A_CHANGE[0][0]), BYTES_A_CHANGE[-1][0]))
    for (left, low), (right, high) in itertools.pairwise(points):
        if at <= right:
            return low + (high - low) * (at - left) / (right - left)
    return points[-1][1]


def parse_count(text: str) -> float:
    """A number of weights as people write it: 0.6B, 7B, 405B, 1T; digits alone where they are all of them, 7000000000.

    Raises FormatError, also for a bare number that no model has: 7 means 7B to people.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise FormatError(
            f"{text!r} is no number of weights: write it as 0.6B, 7B or 1T, or name a folder or config.json"
        )
    number, unit = found[1], (found[2] or "").upper()
    if not unit and float(number) < FEWEST:
        raise FormatError(f"{text!r} is no number of weights: write {number}B for billions, or {number}M for millions")
    return float(number) * _FACTORS[unit]
