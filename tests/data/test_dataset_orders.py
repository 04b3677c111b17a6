"""Both orders over token files: every window once in any layout, resumed at any step; blends; what a resume refuses."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaslm.config import BatchLayout
from megaslm.data import MegatronOrder, TokenFileWriter, TrainingData, dataset
from megaslm.data.megatron_order import choose_datasets
from megaslm.errors import UserError
from megaslm.training.batches import first_samples

SEQ = 5


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory) -> list[str]:
    """Three files of documents of 1 to 40 tokens; a token is its place, from 0, 10,000 and 20,000 on."""
    folder, random, prefixes = tmp_path_factory.mktemp("orders"), np.random.default_rng(0), []
    for number in range(3):
        prefixes.append(str(folder / f"d{number}"))
        with TokenFileWriter(prefixes[-1], 60_000) as writer:
            lengths = random.integers(1, 40, 30 + 10 * number)
            writer.extend_flat(np.arange(lengths.sum()) + 10_000 * number, lengths)
            writer.finish()
    return prefixes


def windows_of(data: TrainingData, first: int, count: int) -> list[bytes]:
    return [row.tobytes() for row in data.batch(first, count).tokens]


@pytest.mark.parametrize("order", ["windows", "megatron"])
@settings(max_examples=12, deadline=None)
@given(
    micro=st.integers(1, 9),
    accumulation=st.integers(1, 5),
    seed=st.integers(0, 99),
    block=st.sampled_from([8, 64, 1024]),
)
def test_every_window_once_for_every_layout_and_resume(prefixes, order, micro, accumulation, seed, block):
    """An epoch under 1 to 8 ranks, opened anew at some step (a resume): the same samples, whoever reads them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "LOCATED_SAMPLES", block)
        per_epoch = TrainingData([(prefixes[0], 1)], SEQ, seed).samples_per_epoch
        run = {"order": order, "num_samples": 4 * per_epoch if order == "megatron" else None}
        expected = windows_of(TrainingData([(prefixes[0], 1)], SEQ, seed, **run), 0, per_epoch)
        for ranks in range(1, 9):
            resumed = np.random.default_rng([seed, ranks]).integers(0, per_epoch)
            data, found, consumed = TrainingData([(prefixes[0], 1)], SEQ, seed, **run), {}, 0
            while consumed < per_epoch:
                step = micro * accumulation * ranks
                if consumed <= resumed < consumed + step:
                    data = TrainingData([(prefixes[0], 1)], SEQ, seed, **run)
                for rank in reversed(range(ranks)):
                    one = SimpleNamespace(data_parallel_rank=rank, data_parallel_size=ranks)
                    for first in first_samples(consumed, BatchLayout(micro, accumulation), one):
                        count = min(micro, max(0, per_epoch - first))
                        found |= zip(range(first, first + count), windows_of(data, first, count), strict=True)
                consumed += step
            assert [found[sample] for sample in range(per_epoch)] == expected
    if order == "windows":
        assert len(set(expected)) == per_epoch


def test_a_megatron_epoch_has_every_window_once(prefixes):
    """One epoch is one shuffle: its samples are cut from one stream, and every token but the last is an input once."""
    per_epoch = TrainingData([(prefixes[0], 1)], SEQ, 7, order="megatron", num_samples=1).samples_per_epoch
    data = TrainingData([(prefixes[0], 1)], SEQ, 7, order="megatron", num_samples=per_epoch)
    inputs = np.sort(data.batch(0, per_epoch).tokens[:, :-1].reshape(-1))
    assert len(np.unique(inputs)) == len(inputs) == per_epoch * SEQ


def test_a_blend_in_megatron_order(prefixes):
    """Against its parts: which dataset, and that dataset's own samples in turn."""
    weights = [2.0, 0.0, 1.0]
    data = TrainingData(list(zip(prefixes, weights, strict=True)), SEQ, 3, order="megatron", num_samples=400)
    rows = data.batch(0, 400).tokens.astype(int)
    chosen = choose_datasets(np.array([2 / 3, 1 / 3]), 400)
    assert (rows // 10_000 == np.array([0, 2])[chosen][:, None]).all()
    assert data.realised_weights == [267 / 400, 0.0, 133 / 400]
    for number, built in ((0, 269), (2, 135)):  # ceil(ceil(400 w) * 1.005)
        part = data.parts[number]
        order = MegatronOrder(part.file.sequence_lengths.copy(), SEQ, built, 3)
        mine = rows[rows[:, 0] // 10_000 == number]
        samples, sequences, starts, lengths = order.pieces(np.arange(len(mine)))
        pieces = [part.file.sequence(q)[s : s + n] for q, s, n in zip(sequences, starts, lengths, strict=True)]
        assert np.array_equal(np.concatenate(pieces).reshape(mine.shape), mine)


def test_a_short_file_in_megatron_order(write_tokens):
    """A sample of it takes more than one epoch."""
    data = TrainingData([(write_tokens([range(3)]), 1)], SEQ, 1, order="megatron", num_samples=20)
    assert (data.batch(0, 20).tokens == np.arange(6) % 3).all(axis=1).any()
    assert data.samples_per_epoch == 1


def test_integer_weights_of_a_blend_in_megatron_order(prefixes):
    """Shares that were normalized once would be others, and so would the third sample."""
    data = TrainingData(list(zip(prefixes, (1, 4, 1), strict=True)), SEQ, 3, order="megatron", num_samples=14)
    assert (data.batch(0, 14).tokens[:, 0] // 10_000).tolist() == [1, 0, 1, 2, 1, 1, 0, 1, 1, 2, 1, 1, 0, 1]


def test_split_in_megatron_order(prefixes):
    data = TrainingData([(prefixes[1], 1)], SEQ, 3, split="50,50", order="megatron", num_samples=200)
    file = data.parts[0].file
    assert data.parts[0].sequences == range(0, 20)
    seen = np.unique(data.batch(0, 200).tokens) - 10_000
    assert seen.max() < file.token_bound(20) and len(seen) > 0.95 * file.token_bound(20)


def test_the_end_of_a_megatron_order(prefixes):
    data = TrainingData([(prefixes[0], 1)], SEQ, 3, order="megatron", num_samples=20)
    data.batch(16, 4)
    with pytest.raises(UserError, match="sample 20 is not there: Megatron's order was made for a run of 20 samples"):
        data.batch(16, 5)


def test_what_megatron_order_refuses(prefixes, write_tokens):
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match=f"seed from 0 to 2.32 - 1, not {seed}"):
            TrainingData([(prefixes[0], 1)], SEQ, seed, order="megatron", num_samples=20)
    TrainingData([(prefixes[0], 1)], SEQ, 2**32 - 1, order="megatron", num_samples=20)
    with pytest.raises(UserError, match="weights of the datasets"):
        TrainingData([(prefixes[0], -1), (prefixes[1], 1)], SEQ, 1, order="megatron", num_samples=20)
    empty = write_tokens([[], []], "empty")
    with pytest.raises(UserError, match="empty has no tokens to train on"):
        TrainingData([(empty, 1)], SEQ, 1, order="megatron", num_samples=20)
    left_out = TrainingData([(prefixes[0], 1), (empty, 0)], SEQ, 1, order="megatron", num_samples=20)
    alone = TrainingData([(prefixes[0], 1)], SEQ, 1, order="megatron", num_samples=20)
    assert np.array_equal(left_out.batch(0, 20).tokens, alone.batch(0, 20).tokens)
    bad = write_tokens([range(20), [*range(7), 99, *range(4)]], "bad", manifest=False)
    data = TrainingData([(bad, 1)], SEQ, 1, vocab_size=50, order="megatron", num_samples=6)
    with pytest.raises(UserError, match="bad.bin: token 27 has id 99, outside the model's vocabulary of 50"):
        data.batch(0, 6)


def test_resume_of_a_megatron_order(prefixes):
    def open_data(num_samples, weights=(2, 1), seed=3, order="megatron", count=2):
        datasets = list(zip(prefixes[:count], weights, strict=False))
        return TrainingData(datasets, SEQ, seed, order=order, num_samples=num_samples)

    data = open_data(100)
    state = json.loads(json.dumps(data.state()))
    again = open_data(100, weights=(4, 2))  # the same shares
    again.load_state(state, 50)
    assert np.array_equal(again.batch(50, 50).tokens, data.batch(50, 50).tokens)
    longer = open_data(105)  # the same epochs: the samples go on
    longer.load_state(state, 50)
    assert np.array_equal(longer.batch(0, 100).tokens, data.batch(0, 100).tokens)
    for other, message in [
        (open_data(1000), "one of 100 samples, this one of 1,000: .* 1 epochs then and .* epochs"),
        (open_data(100, weights=(1, 1)), r"weights \[2.0, 1.0\], this run's \[1.0, 1.0\]"),
        (open_data(100, weights=(2, 1, 1), count=3), "laid out for one blend"),
        (open_data(None, order="windows"), "order megatron, this run has windows"),
        (open_data(100, seed=4), "seed 3, this run has 4"),
    ]:
        with pytest.raises(UserError, match=message):
            other.load_state(state, 50)
