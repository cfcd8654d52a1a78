"""The cheapest way from one version to another, over anchors, folds and deltas, from a listing alone. Pure functions.

A delta can be undone, so every fold and delta is a way in both directions: rolling back is a path like any other. Only
one of codec `class` leads forward alone, and only those who have the weights before it.
"""

import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from deltawire.buckets.base import Stat
from deltawire.errors import Gap
from deltawire.runlog.keys import CommitKey, Kind, listed

RECORD_COST = 2048
"""bytes that reading one more object counts for: its record, beside its payload"""


@dataclass(frozen=True, slots=True)
class Edge:
    """One thing to fetch: it leads from `start` (None: from nothing, an anchor) to `end`, or (`undo`) back.

    `record` is the key of the commit or manifest that describes it; `size` the bytes of its payloads, as listed. One
    that `needs_weights` is read against those at `start`, so nothing is taken back by it.
    """

    start: int | None
    end: int
    size: int
    record: str
    undo: bool = False
    needs_weights: bool = False

    @property
    def derived(self) -> bool:
        """Whether a compactor's manifest describes it; else a commit does."""
        return "/derived/" in self.record

    @property
    def kind(self) -> Literal["delta", "fold", "anchor"]:
        """A commit's own delta, several of them folded, or a whole checkpoint (a run's base counts as one)."""
        if self.start is None:
            return "anchor"
        return "fold" if self.derived else "delta"

    @property
    def target(self) -> int:
        """The version this edge arrives at."""
        return self.start if self.undo and self.start is not None else self.end


def survey(
    stats: Iterable[Stat], run: str, *, whole: int, on_chain: Callable[[list[CommitKey]], list[CommitKey]]
) -> list[Edge]:
    """Every edge that a listing of `runs/<run>/` shows. `whole` is the size of a checkpoint, in bytes: what version 0
    counts for when it is a reference. Sizes come from the keys, and decide nothing but the way taken. `on_chain` picks
    the commits that count where two writers left two of a version."""
    found = [(name, stat) for stat in stats if (name := listed(run, stat.key)) is not None]
    sizes: dict[tuple[Kind, int | None, int], int] = defaultdict(int)
    for name, stat in found:
        sizes[name.kind, name.start, name.end] += stat.size
    commits = sorted(CommitKey(name.end, stat.key) for name, stat in found if name.kind == "commit")
    committed = {version for version, _ in commits}
    if len(committed) < len(commits):
        commits = on_chain(commits)
    needing = {name.end for name, _ in found if name.needs_weights}
    edges = [
        Edge(start, end, sizes.get(("delta", None, end), 0), key, needs_weights=end in needing)
        for (start, _), (end, key) in itertools.pairwise(commits)
    ]
    if commits and commits[0][0] == 0:
        edges.append(Edge(None, 0, sizes.get(("anchor", None, 0), whole), commits[0][1]))
    for name, stat in found:
        if name.kind == "fold record" and {name.start, name.end} <= committed:
            edges.append(Edge(name.start, name.end, sizes.get(("fold", name.start, name.end), 0), stat.key))
        elif name.kind == "anchor record" and name.end in committed:
            edges.append(Edge(None, name.end, sizes.get(("anchor", None, name.end), whole), stat.key))
    return edges


def cheapest(
    edges: Iterable[Edge], since: int | None, target: int, *, forward: bool = False, weights: bool = True
) -> list[Edge]:
    """The edges from `since` (None: from nothing) to `target` that take the fewest bytes; an anchor may be the cheapest
    even for someone who stands somewhere. `forward` takes no edge back. Without the `weights` at `since`, what needs
    any is taken only behind an anchor, which has them. Raises Gap when none lead there."""
    usable = [*edges]
    if weights or since is None:
        return _cheapest(usable, since, target, forward=forward)
    found = []
    for start, own in (
        (since, [edge for edge in usable if edge.start is not None and not edge.needs_weights]),
        (None, usable),
    ):
        with suppress(Gap):
            found.append(_cheapest(own, start, target, forward=forward))
    if not found:
        raise Gap(f"nothing leads from version {since} to version {target} without the weights at {since}")
    return min(found, key=lambda path: sum(edge.size + RECORD_COST for edge in path))


def _cheapest(edges: Iterable[Edge], since: int | None, target: int, *, forward: bool) -> list[Edge]:
    ways: dict[int | None, list[Edge]] = defaultdict(list)
    for edge in edges:
        ways[edge.start].append(edge)
        if edge.start is not None and not forward and not edge.needs_weights:
            ways[edge.end].append(replace(edge, undo=True))
    best: dict[int | None, int] = {None: 0, since: 0}
    came: dict[int, Edge] = {}
    queue: list[tuple[int, int, int | None]] = [(0, 0, since), (0, 1, None)]
    number = 1
    while queue:
        cost, _, node = heapq.heappop(queue)
        if node == target:
            return _trace(came, since, target)
        if cost > best[node]:
            continue
        for edge in ways[node]:
            further, there = cost + edge.size + RECORD_COST, edge.target
            if there not in best or further < best[there]:
                best[there], came[there], number = further, edge, number + 1
                heapq.heappush(queue, (further, number, there))
    raise Gap(f"nothing leads from version {'none' if since is None else since} to version {target}")


def _trace(came: dict[int, Edge], since: int | None, target: int) -> list[Edge]:
    path: list[Edge] = []
    node: int | None = target
    while node is not None and node != since:
        edge = came[node]
        path.append(edge)
        node = edge.end if edge.undo else edge.start
    return path[::-1]
