import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaslm.data import ORDER_VERSION, Blend, Segment, WindowsOrder
from megaslm.data.order import BLOCK_SAMPLES, _derive_keys, block_counts, permute
from megaslm.errors import UserError


def test_golden_vector():
    """These numbers are the order: a change of any is a new ORDER_VERSION, and breaks the resume of every run."""
    assert ORDER_VERSION == 1
    order = WindowsOrder(1000 * 16 + 21, 16, seed=1234, dataset=0)
    samples = np.array([0, 1, 2, 3, 998, 999, 1000, 1001, 10**12])
    assert order.num_windows == 1000
    assert order.starts(samples).tolist() == [10144, 3616, 6448, 8736, 11408, 12768, 13745, 14289, 994]
    stored = WindowsOrder(100, 8, seed=1234, dataset=1)
    assert stored.num_windows == 11
    assert stored.starts(np.arange(13)).tolist() == [41, 81, 33, 65, 1, 49, 73, 25, 57, 9, 17, 79, 23]
    datasets, numbers = Blend.of_weights(1234, [0.5, 0.3, 0.2]).locate([*range(8), 65535, 65536, 65537, 10**9])
    assert datasets.tolist() == [0, 0, 0, 0, 1, 0, 2, 2, 0, 1, 0, 1]
    assert numbers.tolist() == [0, 1, 2, 3, 0, 4, 0, 1, 32767, 19661, 32768, 300003042]


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 5000), seed=st.integers(0, 2**32), epoch=st.integers(0, 9))
def test_permute_is_a_permutation(n, seed, epoch):
    keys = _derive_keys("test", seed, epoch)
    assert np.array_equal(np.sort(permute(np.arange(n), n, keys)), np.arange(n))


@pytest.mark.parametrize("n", [63, 64, 10**6 + 3, 2**40 + 1, 2**50])
def test_permute_of_large_domains(n):
    index = np.unique(np.linspace(0, n - 1, 1000).astype(np.int64))
    image = permute(index, n, _derive_keys("test", 1))
    assert image.min() >= 0 and image.max() < n and len(np.unique(image)) == len(index)


def test_permute_looks_random():
    """Chi-square of where 2000 keys send an element, and of the distance of neighbours: no visible pattern."""
    n = 64
    images = np.array([permute(np.arange(n), n, _derive_keys("test", key)) for key in range(2000)])
    for counts in (np.bincount(images[:, 0], minlength=n), np.bincount((images[:, 1] - images[:, 0]) % n)[1:]):
        expected = counts.sum() / len(counts)
        assert ((counts - expected) ** 2 / expected).sum() < 120  # 63 degrees of freedom: p below 1e-5


@settings(max_examples=60, deadline=None)
@given(seq_length=st.integers(1, 50), extra=st.integers(0, 60), windows=st.integers(1, 200), seed=st.integers(0, 99))
def test_windows_of_an_epoch(seq_length, extra, windows, seed):
    num_tokens = seq_length * (windows + 1) + min(extra, seq_length - 1)
    order = WindowsOrder(num_tokens, seq_length, seed)
    assert order.num_windows == windows
    for epoch in range(3):
        starts = np.sort(order.starts(np.arange(epoch * windows, (epoch + 1) * windows)))
        assert np.array_equal(starts, order.offset(epoch) + seq_length * np.arange(windows))
        assert 0 <= order.offset(epoch) < seq_length
        assert starts[-1] + seq_length + 1 <= num_tokens


def test_epochs_and_datasets_and_seeds_differ():
    orders = [WindowsOrder(10_000, 10, seed, dataset) for seed in (0, 1) for dataset in (0, 1)]
    epochs = [order.starts(np.arange(999) + 999 * epoch) for order in orders for epoch in (0, 1)]
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == len(epochs)


def test_too_short_for_a_window():
    assert WindowsOrder(20, 10, 0).num_windows == 1
    with pytest.raises(UserError, match="notes has 19 tokens to train on, too short .* 9 or less"):
        WindowsOrder(19, 10, 0, name="notes")


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([1], [65536]),
        ([0.5, 0.3, 0.2], [32768, 19661, 13107]),
        ([1, 1, 1], [21846, 21845, 21845]),
        ([1, 0, 1], [32768, 0, 32768]),
        ([1, 1e-9, 1], [32767, 1, 32768]),
        ([1e-9, 1e-12, 5], [1, 1, 65534]),
    ],
)
def test_block_counts(weights, counts):
    assert block_counts(weights).tolist() == counts


@pytest.mark.parametrize("weights", [[], [0.0], [1, -1], [float("nan")], [float("inf"), 1]])
def test_impossible_weights(weights):
    with pytest.raises(UserError, match="weights"):
        block_counts(weights)


@settings(max_examples=20, deadline=None)
@given(weights=st.lists(st.floats(0, 10), min_size=1, max_size=5).filter(any), start=st.integers(0, 3 * BLOCK_SAMPLES))
def test_blend_delivers_each_dataset_in_its_own_order(weights, start):
    blend = Blend.of_weights(7, weights)
    samples = np.arange(start, start + 2000)
    datasets, numbers = blend.locate(samples)
    before = blend.delivered(start)
    for dataset in range(len(weights)):
        mine = numbers[datasets == dataset]
        assert np.array_equal(mine, before[dataset] + np.arange(len(mine)))
    assert blend.delivered(start + 2000).sum() == start + 2000
    one_by_one = [blend.locate([sample]) for sample in samples[::97]]
    assert [int(d[0]) for d, _ in one_by_one] == datasets[::97].tolist()


def test_blend_counts_are_exact_per_block():
    blend = Blend.of_weights(7, [3, 1])
    datasets, _ = blend.locate(np.arange(2 * BLOCK_SAMPLES))
    assert (
        np.bincount(datasets[:BLOCK_SAMPLES]).tolist()
        == np.bincount(datasets[BLOCK_SAMPLES:]).tolist()
        == [49152, 16384]
    )
    assert not np.array_equal(datasets[:BLOCK_SAMPLES], datasets[BLOCK_SAMPLES:])
    assert blend.realised_weights == [0.75, 0.25]


def test_a_change_of_weights_starts_a_segment():
    old = Blend.of_weights(7, [3, 1])
    new = old.with_weights(70_001, [1, 1, 2])
    assert new.segments[1] == Segment(70_001, (1.0, 1.0, 2.0), (*old.delivered(70_001).tolist(), 0))
    before, after = np.arange(70_001), np.arange(70_001, 200_000)
    for ours, theirs in zip(new.locate(before), old.locate(before), strict=True):
        assert np.array_equal(ours, theirs)
    datasets, numbers = (np.concatenate(parts) for parts in zip(new.locate(before), new.locate(after), strict=True))
    for dataset in range(3):  # nothing is repeated or left out
        assert np.array_equal(numbers[datasets == dataset], np.arange((datasets == dataset).sum()))
    stored = json.loads(json.dumps([segment.to_json() for segment in new.segments]))
    again = Blend(7, [Segment.from_json(segment) for segment in stored])
    assert np.array_equal(again.locate(after)[0], datasets[70_001:])


def test_segments_that_change_nothing():
    blend = Blend.of_weights(7, [3, 1])
    assert len(blend.with_weights(100, [6, 2]).segments) == 1
    changed = blend.with_weights(100, [1, 1])
    assert changed.with_weights(50, [3, 1]).segments == blend.segments  # back to a checkpoint before the change
    assert changed.with_weights(0, [1, 1]).segments == [Segment(0, (1.0, 1.0), (0, 0))]
