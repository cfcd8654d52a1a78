"""What ranks say of a publish survives being added up as numbers."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deltawire.publish.sharded.ballot import Ballot, marks_of, numbers

WORDS = st.integers(0, 2**64 - 1)


@st.composite
def ballots(draw):
    """The ballots of two to four ranks about the same tensors."""
    ranks, tensors = draw(st.integers(2, 4)), draw(st.integers(0, 5))

    def column():
        return numbers(draw(st.lists(WORDS, min_size=tensors, max_size=tensors)))

    return [
        Ballot(
            marks=marks_of(rank, ranks, draw(WORDS)),
            changed=draw(st.integers(0, 2**40)),
            wire_bytes=draw(st.integers(0, 2**40)),
            cut=draw(st.integers(-1, 2**40)) if rank == 0 else -1,
            seeded=column(),
            owned=column(),
            copies=column(),
        )
        for rank in range(ranks)
    ]


@given(ballots())
def test_packed_ballots_add_up_to_the_ballot_of_all_ranks(said):
    ranks, tensors = len(said), said[0].seeded.size
    total = Ballot.unpack(np.sum([ballot.pack() for ballot in said], axis=0, dtype=np.uint64), ranks, tensors)
    assert total.marks.tolist() == [int(ballot.marks[rank]) for rank, ballot in enumerate(said)]
    assert total.changed == sum(ballot.changed for ballot in said)
    assert total.wire_bytes == sum(ballot.wire_bytes for ballot in said)
    assert total.cut == said[0].cut
    for column in ("seeded", "owned", "copies"):
        columns = [[int(number) for number in getattr(ballot, column)] for ballot in said]
        assert [int(number) for number in getattr(total, column)] == [
            sum(c) % 2**64 for c in zip(*columns, strict=True)
        ]


@given(st.integers(1, 4), st.integers(0, 5))
def test_a_blank_ballot_adds_nothing(ranks, tensors):
    assert not Ballot.blank(ranks, tensors).pack().any()
    assert Ballot.blank(ranks, tensors).cut == -1
