"""The planner: fewest bytes, in either direction, O(log k) objects over folds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltawire.buckets import Stat
from deltawire.errors import Gap
from deltawire.runlog.planner import RECORD_COST, Edge, cheapest, survey

RUN = "0" * 16
H = "0123456789ab"


def chain(length, *, size=100_000, levels=(4, 16, 64)):
    """Deltas 0…length, and every full fold, each as large as the square root of what it replaces."""
    edges = [Edge(None, 0, 60 * size, "anchor")]
    edges += [Edge(n, n + 1, size, f"delta {n}") for n in range(length)]
    for level in levels:
        edges += [Edge(n, n + level, int(size * level**0.5), f"fold {n}") for n in range(0, length - level + 1, level)]
    return edges


def walk(path, since):
    for edge in path:
        if edge.start is None:
            since = edge.end
            continue
        assert since == (edge.end if edge.undo else edge.start)
        since = edge.target
    return since


@pytest.mark.parametrize("start", [0, 64])
def test_sixty_four_versions_are_one_fold_when_aligned(start):
    path = cheapest(chain(128), start, start + 64)
    assert [(edge.start, edge.end) for edge in path] == [(start, start + 64)]


@pytest.mark.parametrize("start", range(64))
def test_sixty_four_versions_are_at_most_ten_payloads_from_anywhere(start):
    path = cheapest(chain(192), start, start + 64)
    assert walk(path, start) == start + 64
    assert len(path) <= 10


def test_going_back_takes_the_same_things_the_other_way():
    there, back = cheapest(chain(64), 3, 40), cheapest(chain(64), 40, 3)
    assert [edge.record for edge in there] == [edge.record for edge in back][::-1]
    assert walk(back, 40) == 3


def test_an_anchor_is_taken_when_catching_up_costs_more():
    edges = [*chain(100, levels=()), Edge(None, 90, 300_000, "late anchor")]
    assert [edge.record for edge in cheapest(edges, 5, 91)] == ["late anchor", "delta 90"]
    assert [edge.record for edge in cheapest(edges, 88, 91)] == ["delta 88", "delta 89", "delta 90"]


def test_nothing_to_do_is_no_path_and_nowhere_is_a_gap():
    assert cheapest(chain(8), 5, 5) == []
    with pytest.raises(Gap, match="from version 5 to version 9"):
        cheapest(chain(8), 5, 9)
    with pytest.raises(Gap, match="from version none"):
        cheapest([], None, 0)


@given(st.integers(1, 40), st.data())
def test_no_path_is_cheaper_than_the_one_chosen(length, data):
    sizes = st.integers(0, 10_000)
    edges = [Edge(None, 0, data.draw(sizes), "a"), *(Edge(n, n + 1, data.draw(sizes), "d") for n in range(length))]
    for _ in range(data.draw(st.integers(0, 6))):
        first = data.draw(st.integers(0, length - 1))
        edges.append(Edge(first, data.draw(st.integers(first + 1, length)), data.draw(sizes), "f"))
    since, target = data.draw(st.integers(0, length)), data.draw(st.integers(0, length))
    cost = {since: 0, None: 0}
    for _ in range(len(edges) + 1):  # Bellman and Ford, the slow way
        for edge in edges:
            price = edge.size + RECORD_COST
            if edge.start in cost:
                cost[edge.end] = min(cost.get(edge.end, 1 << 60), cost[edge.start] + price)
            if edge.end in cost and edge.start is not None:
                cost[edge.start] = min(cost.get(edge.start, 1 << 60), cost[edge.end] + price)
    path = cheapest(edges, since, target)
    assert walk(path, since) == target
    assert sum(edge.size + RECORD_COST for edge in path) == cost[target]


def test_a_listing_shows_the_edges_of_what_is_committed_and_nothing_else():
    sizes = {
        "run.json": 9,
        "commits/000000.json": 1, "commits/000003.json": 1, "commits/000004.json": 1, "commits/4.json": 1,
        f"anchors/step_000000-{H}/config.json": 5, f"anchors/step_000000-{H}/model.safetensors": 50,
        f"anchors/step_000004-{H}/model.safetensors": 60,
        f"deltas/step_000003-{H}.safetensors": 7, f"deltas/step_000004.r000-{H}.safetensors": 3,
        f"deltas/step_000004.r001-{H}.safetensors": 4, f"deltas/step_000009-{H}.safetensors": 8,
        f"folds/step_000000-000004-{H}.safetensors": 11,
        f"derived/fold-000000-000004-{H}.json": 1, f"derived/anchor-000004-{H}.json": 1,
        f"derived/fold-000000-000009-{H}.json": 1, f"derived/anchor-000008-{H}.json": 1,
    }  # fmt: skip
    stats = [Stat(f"runs/{RUN}/{key}", size, "") for key, size in sizes.items()]
    found = {(edge.start, edge.end, edge.size) for edge in survey(stats, RUN, on_chain=list, whole=1000)}
    assert found == {(0, 3, 7), (3, 4, 7), (None, 0, 55), (0, 4, 11), (None, 4, 60)}
    by_reference = [stat for stat in stats if "step_000000-0123" not in stat.key]
    assert Edge(None, 0, 1000, f"runs/{RUN}/commits/000000.json") in survey(
        by_reference, RUN, on_chain=list, whole=1000
    )
