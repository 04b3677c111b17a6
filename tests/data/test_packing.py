import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megaslm.data.packing import PaddingCount, best_fit_decreasing


def piece_by_piece(lengths, capacity):
    """Best-fit decreasing as the paper has it: the bins as lists of lengths."""
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [b for b in bins if sum(b) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            bins.append([length])
    return bins


@st.composite
def problems(draw):
    capacity = draw(st.integers(1, 40))
    few = draw(st.lists(st.integers(1, capacity), min_size=1, max_size=4))  # many pieces of the same length, too
    length = st.integers(1, capacity) | st.sampled_from(few)
    return draw(st.lists(length, max_size=60)), capacity


@settings(max_examples=120, deadline=None)
@given(problems())
def test_bins_are_those_of_the_paper(problem):
    lengths, capacity = problem
    pieces, counts = best_fit_decreasing(np.array(lengths, np.int64), capacity)
    assert sorted(pieces.tolist()) == list(range(len(lengths)))
    bins = np.split(pieces, np.cumsum(counts)[:-1]) if len(counts) else []
    contents = [[lengths[piece] for piece in one] for one in bins]
    assert all(0 < sum(one) <= capacity and one == sorted(one, reverse=True) for one in contents)
    # Of bins that are equally full any may be taken: what is in them may differ, how full they are may not.
    assert sorted(map(sum, contents)) == sorted(map(sum, piece_by_piece(lengths, capacity)))
    for one in bins:
        same = [(lengths[a], a) for a in one.tolist()]
        assert same == sorted(same, key=lambda pair: (-pair[0], pair[1]))


def test_a_block_of_documents_is_packed_tightly():
    lengths = np.minimum(np.random.default_rng(0).lognormal(6, 1.2, 100_000).astype(np.int64) + 1, 2049)
    pieces, counts = best_fit_decreasing(lengths, 2049)
    used = np.add.reduceat(lengths[pieces], np.cumsum(counts) - counts)
    assert used.max() <= 2049
    assert len(counts) <= 1.001 * lengths.sum() / 2049


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(1, 6),
    ids=st.lists(st.sampled_from([0, 0, 1]), max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=4),
)
def test_padding_is_counted_across_chunks(length, ids, cuts):
    counter = PaddingCount(length, eod_id=0)
    for chunk in np.split(np.array(ids, np.uint16), sorted(min(cut, len(ids)) for cut in cuts)):
        counter.add(chunk)
    expected = sum(ids[i] == ids[i - 1] == 0 and i % length != 0 for i in range(1, len(ids)))
    assert counter.padding == expected
