import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaslm.data import MEGATRON_ORDER_VERSION, MegatronOrder, megatron_order
from megaslm.data.megatron_order import choose_datasets, count_per_dataset, normalized, samples_to_build
from megaslm.errors import UserError

SEED = 1234
GOLDEN = [
    (
        ([7, 3, 9, 4, 6, 2], 8, 9),
        [5, 3, 5, 4, 1, 2, 0, 2, 4, 1, 1, 3, 2, 4, 0, 5, 0, 3],
        [[0, 0], [3, 0], [4, 2], [5, 7], [6, 6], [7, 7], [9, 0], [11, 2], [12, 6], [13, 5], [15, 0], [16, 6]],
        [8, 1, 7, 10, 9, 5, 4, 3, 0, 2, 6],
    ),
    (
        ([3, 1, 5, 2], 4, 5),
        [2, 1, 2, 0, 0, 1, 3, 3],
        [[0, 0], [0, 4], [2, 2], [3, 1], [4, 2], [7, 0]],
        [2, 0, 4, 3, 1],
    ),
    (  # the last epoch is kept apart
        ([7, 3, 9, 4, 6, 2], 8, 4),
        [2, 1, 5, 0, 4, 3, 0, 4, 3, 2, 5, 1],
        [[0, 0], [0, 8], [3, 2], [4, 3], [6, 1], [7, 2], [9, 0], [9, 8]],
        [1, 0, 2, 4, 6, 5, 3],
    ),
    (  # it supplies 3 of 5 samples: fewer than int(0.80 * 5), not fewer than int(0.75 * 5)
        ([3, 1, 5, 2], 2, 8),
        [0, 1, 2, 3, 1, 2, 3, 0],
        [[0, 0], [0, 2], [2, 0], [2, 2], [2, 4], [3, 1], [5, 0], [5, 2], [5, 4], [6, 1], [7, 1]],
        [0, 2, 4, 3, 1, 5, 9, 8, 7, 6],
    ),
    (  # a sample takes two epochs
        ([2, 1], 5, 3),
        [1, 0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 1],
        [[0, 0], [3, 1], [7, 0], [10, 0]],
        [1, 0, 2],
    ),
]


@pytest.mark.parametrize(("arguments", "sequences", "table", "shuffle"), GOLDEN)
def test_golden_vectors(arguments, sequences, table, shuffle):
    """What Megatron-LM builds for these; a change of any is a new MEGATRON_ORDER_VERSION."""
    assert MEGATRON_ORDER_VERSION == 1
    lengths, seq_length, num_samples = arguments
    order = MegatronOrder(np.array(lengths, np.int32), seq_length, num_samples, SEED)
    assert order.sequences.tolist() == sequences
    assert np.stack([order.first_entries, order.first_offsets], axis=1).tolist() == table
    assert order.shuffle.tolist() == shuffle and len(order) == len(shuffle)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    seq_length=st.integers(1, 15),
    num_samples=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
)
def test_samples_are_cut_from_one_stream(lengths, seq_length, num_samples, seed):
    """Against the stream itself, token by token; every token of an epoch is a target once, but the ends."""
    tokens = sum(lengths)
    if tokens == 0:
        with pytest.raises(UserError, match="has no tokens to train on"):
            MegatronOrder(np.array(lengths, np.int32), seq_length, num_samples, seed)
        return
    order = MegatronOrder(np.array(lengths, np.int32), seq_length, num_samples, seed)
    assert order.epochs * tokens >= num_samples * seq_length + 1
    assert order.epochs == 1 or (order.epochs - 1) * tokens < num_samples * seq_length + 1
    assert len(order) == (order.epochs * tokens - 1) // seq_length >= num_samples
    assert sorted(order.sequences.tolist()) == sorted(list(range(len(lengths))) * order.epochs)
    assert sorted(order.shuffle.tolist()) == list(range(len(order)))
    assert (order.first_entries[0], order.first_offsets[0]) == (0, 0)  # though the first sequences be empty
    stream = [(sequence, at) for sequence in order.sequences.tolist() for at in range(lengths[sequence])]
    samples, sequences, starts, sizes = order.pieces(np.arange(len(order)))
    assert sizes.min() > 0 and (np.diff(samples) >= 0).all()
    found = [[] for _ in range(len(order))]
    for sample, sequence, start, size in zip(samples, sequences, starts, sizes, strict=True):
        found[sample] += [(sequence, start + i) for i in range(size)]
    for sample, row in zip(found, order.shuffle.tolist(), strict=True):
        assert sample == stream[row * seq_length : row * seq_length + seq_length + 1]
    if order.last_epoch_apart:
        before = ((order.epochs - 1) * tokens - 1) // seq_length
        assert sorted(order.shuffle[:before].tolist()) == list(range(before))
        assert sorted(order.sequences[: -len(lengths)]) == sorted(list(range(len(lengths))) * (order.epochs - 1))


def plain_choice(shares, num_samples):
    counts, chosen = [0.0] * len(shares), []
    for sample in range(num_samples):
        lags = [share * max(float(sample), 1.0) - count for share, count in zip(shares, counts, strict=True)]
        chosen.append(lags.index(max(lags)))
        counts[chosen[-1]] += 1
    return chosen


def test_golden_blend():
    assert choose_datasets(np.array([0.5, 0.3, 0.2]), 12).tolist() == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0, 0, 1]


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.one_of(st.integers(1, 9), st.floats(1e-4, 1)), min_size=1, max_size=6),
    num_samples=st.integers(1, 3000),
    lane=st.sampled_from([16, 100, 4096]),
)
def test_blend_is_the_plain_loop(weights, num_samples, lane):
    shares = normalized(normalized(weights))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_order, "LANE_SAMPLES", lane)
        chosen = choose_datasets(shares, num_samples)
    assert chosen.tolist() == plain_choice(shares.tolist(), num_samples)
    counts, numbers = count_per_dataset(chosen, len(weights))
    for dataset, count in enumerate(counts):
        assert numbers[chosen == dataset].tolist() == list(range(count))
        assert count <= samples_to_build(num_samples, float(normalized(weights)[dataset]))


def test_what_a_blend_builds():
    assert [samples_to_build(1000, share) for share in (0.5, 0.3, 0.2, 0.0001)] == [503, 302, 201, 2]
