"""What a compactor knows of a run: its anchors, folds and deltas, and which folds are called for. No I/O."""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise

from msgspec import UNSET

from deltawire.errors import Gap
from deltawire.runlog.planner import Edge
from deltawire.runlog.records import Link

LATE = 256
"""newest versions of which the hint names every fold, for those who are some way behind"""


class Inventory:
    """The anchors, folds and deltas of one run that a compactor knows of, and how far it has folded them."""

    def __init__(self, run: str) -> None:
        self.run, self.anchors, self.derived = run, dict[int, Edge](), False
        self._ahead: dict[int, dict[int, Edge]] = defaultdict(dict)
        self._versions: list[int] = []
        self._sizes: dict[int, int] = {}
        self._folded = -1

    @property
    def newest(self) -> int:
        """The newest version known of."""
        return self._versions[-1]

    def add(self, edge: Edge) -> None:
        """Take note of something that is there. Deltas come in order; after a gap, which a prune leaves above a tagged
        version, only what comes later is folded."""
        self.derived |= edge.derived
        begins = edge.end if edge.start is None else edge.start
        if edge.kind != "fold" and self._versions and begins > self._versions[-1]:
            self._versions = []
        for version in [edge.start, edge.end] if not edge.derived else []:
            if version is not None and (not self._versions or version > self._versions[-1]):
                self._versions.append(version)
        if edge.start is None:
            self.anchors[edge.end] = edge
            self._versions = self._versions or [edge.end]
        elif edge.end not in self._ahead[edge.start]:  # what stands in for one delta alone is no compactor's
            self._ahead[edge.start][edge.end] = edge
        if edge.kind == "delta":
            self._sizes[edge.end] = edge.size

    def drop(self, edge: Edge) -> None:
        """Forget a fold that cannot be read."""
        assert edge.start is not None
        del self._ahead[edge.start][edge.end]

    def due(self, levels: Iterable[int]) -> list[tuple[int, int]]:
        """The folds that are called for and not there, of what came since `folded_to`."""
        first = bisect_left(self._versions, min(self.anchors))
        found: set[tuple[int, int]] = set()
        for level in levels:
            if level > self.newest - self._versions[first]:
                break
            since = bisect_right(self._versions, self._folded // level * level) - 1
            found |= {*due(self._versions[max(first, since) :], level)}
        return [(start, end) for start, end in found if not self._is_fold(start, end)]

    def folded_to(self, version: int) -> None:
        """Every fold up to here was made, or is not worth it."""
        self._folded = version

    def parts(self, start: int, end: int) -> list[Edge]:
        """The longest folds and deltas that lead from one version to another, but not in one. Raises Gap."""
        found: list[Edge] = []
        here = start
        while here < end:
            ahead = self._ahead.get(here, {})
            there = max((stop for stop in ahead if stop <= end and (here, stop) != (start, end)), default=None)
            if there is None:
                there = end if end in ahead else None
            if there is None:
                raise Gap(f"run {self.run}: nothing leads from version {here} on to version {end}")
            found.append(ahead[there])
            here = there
        return found

    def delta_bytes(self, start: int, end: int) -> int:
        """Bytes of the deltas between two versions."""
        first, last = bisect_right(self._versions, start), bisect_right(self._versions, end)
        return sum(self._sizes.get(version, 0) for version in self._versions[first:last])

    def way(self) -> tuple[Link, ...]:
        """The newest anchor, what leads on from it in the longest strides, and every fold of late versions."""
        anchor = self.anchors[max(self.anchors)]
        late = self._versions[bisect_left(self._versions, self.newest - LATE) :]
        folds = [edge for version in late for edge in self._ahead.get(version, {}).values() if edge.derived]
        strides = self.parts(anchor.end, self.newest) if self.newest > anchor.end else []
        edges = dict.fromkeys([anchor, *strides, *folds])
        return tuple(_link(edge) for edge in edges)

    def _is_fold(self, start: int, end: int) -> bool:
        edge = self._ahead.get(start, {}).get(end)
        return edge is not None and edge.derived


def _link(edge: Edge) -> Link:
    return Link(edge.start, edge.end, edge.size, edge.record, edge.needs_weights or UNSET)


def due(versions: list[int], level: int) -> list[tuple[int, int]]:
    """The folds of a level that a chain of committed versions (ascending, from its start) calls for: between the last
    version up to each multiple of the level and the last up to the next one, where they span several commits."""
    following = [*versions[1:], versions[-1] + 1] if versions else []
    at = [number for number, version in enumerate(versions) if -(-version // level) * level < following[number]]
    return [(versions[start], versions[end]) for start, end in pairwise(at) if end - start > 1]
