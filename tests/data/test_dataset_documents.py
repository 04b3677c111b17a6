"""Documents in batches: positions that restart (mask_documents), files whose documents span sequences, packed files."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaslm.data import IGNORED_TARGET, MegatronOrder, TokenFileWriter, TrainingData, ValidationData
from megaslm.errors import UserError

EOD = 9
SEQ = 7


def write_documents(prefix, documents, vocab_size=60_000, **facts):
    """documents: lists of sequences. Token files with a document for each list."""
    with TokenFileWriter(str(prefix), vocab_size, boundaries=True) as writer:
        for sequences in documents:
            writer.add_tokens(np.concatenate([np.asarray(s, np.int64) for s in (*sequences, [])]))
            writer.add_sequences(np.array([len(s) for s in sequences], np.int64))
            writer.add_documents(np.array([len(sequences)]))
        writer.finish(**facts)
    return str(prefix)


def write_packed(prefix, bins):
    """bins: lists of pieces; filled up with EOD to SEQ + 1 tokens."""
    filled, padding = [], 0
    for pieces in bins:
        missing = SEQ + 1 - sum(map(len, pieces))
        filled.append([*pieces, [EOD] * missing] if missing else pieces)
        padding += missing
    packing = {"length": SEQ + 1, "bins": len(bins), "padding": padding, "eod_id": EOD}
    return write_documents(prefix, filled, packing=packing)


def positions_in(owners: np.ndarray) -> list[int]:
    """By hand: tokens since the owner changed."""
    found = [0]
    for before, owner in zip(owners[:-1], owners[1:], strict=True):
        found.append(found[-1] + 1 if owner == before else 0)
    return found


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=3), min_size=1, max_size=12),
    seq=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_positions_restart_at_every_document(tmp_path_factory, documents, seq, seed):
    """Documents of several sequences, of empty ones and of none; tokens are their own places in the stream."""
    sizes = [sum(document) for document in documents]
    total = sum(sizes)
    owners = np.repeat(np.arange(len(sizes)), sizes)
    if total < 2 * seq:
        return
    stream = iter(range(total))
    prefix = write_documents(
        tmp_path_factory.mktemp("documents") / "x",
        [[[next(stream) for _ in range(size)] for size in document] for document in documents],
    )
    training = TrainingData([(prefix, 1)], seq, seed, mask_documents=True)
    batch = training.batch(3, 2 * training.samples_per_epoch)
    assert batch.positions.dtype == np.int32 and batch.positions.shape == (2 * training.samples_per_epoch, seq)
    for window, positions in zip(batch.tokens, batch.positions, strict=True):
        assert positions.tolist() == positions_in(owners[window[:-1]])
    assert np.array_equal(TrainingData([(prefix, 1)], seq, seed).batch(3, len(batch.tokens)).tokens, batch.tokens)
    if total < 2:
        return
    validation = ValidationData([prefix, prefix], seq, mask_documents=True)
    tokens, targets, positions = validation.batch(1, validation.num_windows)
    for row in range(validation.num_windows - 1):
        count = int((targets[row] != IGNORED_TARGET).sum())
        assert positions[row, :count].tolist() == positions_in(owners[tokens[row, :count]])
    assert positions[-1].tolist() == list(range(seq))  # a row behind the last window


def test_positions_of_a_megatron_order_restart_at_every_sequence(tmp_path):
    """Those of one document are apart in it."""
    prefix = write_documents(tmp_path / "x", [[[1] * 3, [2] * 4], [[3] * 5], [[4], [5] * 9]])
    run = {"seq_length": 6, "seed": 1, "order": "megatron", "num_samples": 40}
    tokens, positions = TrainingData([(prefix, 1)], mask_documents=True, **run).batch(0, 40)
    samples, _, _, lengths = MegatronOrder(np.array([3, 4, 5, 1, 9], np.int32), 6, 40, 1).pieces(np.arange(40))
    for sample, found in enumerate(positions):
        pieces = [range(length) for length in lengths[samples == sample]]
        assert found.tolist() == [at for piece in pieces for at in piece][:6]
    assert np.array_equal(TrainingData([(prefix, 1)], **run).batch(0, 40).tokens, tokens)


BINS = [[[1, 2, 3, 9], [4, 5, 9]], [[6, 7, 8, 1, 2, 3, 4, 5]], [[2, 9], [3, 9], [4, 4, 9]], [[5, 5, 5, 5, 5, 5, 5, 9]]]


def test_windows_of_a_packed_file_are_its_bins(tmp_path):
    prefix = write_packed(tmp_path / "packed", BINS)
    rows = sorted((sum(bin, []) + [EOD] * 8)[:8] for bin in BINS)
    data = TrainingData([(prefix, 1)], SEQ, seed=3, mask_documents=True)
    assert data.samples_per_epoch == 4 and data.ignore_repeated_eod == EOD
    for epoch in range(3):
        tokens, positions = data.batch(epoch * 4, 4)
        assert sorted(tokens.tolist()) == rows
        by_row = dict(zip(map(tuple, tokens.tolist()), positions.tolist(), strict=True))
        assert by_row[1, 2, 3, 9, 4, 5, 9, 9] == [0, 1, 2, 3, 0, 1, 2]
        assert by_row[2, 9, 3, 9, 4, 4, 9, 9] == [0, 1, 0, 1, 0, 1, 2]
        assert by_row[6, 7, 8, 1, 2, 3, 4, 5] == list(range(7))


def test_validation_leaves_the_padding_of_a_packed_file_out(tmp_path):
    prefix = write_packed(tmp_path / "packed", BINS)
    data = ValidationData([prefix], SEQ, mask_documents=True)
    tokens, targets, positions = data.batch(0, 4)
    assert tokens.tolist() == [(sum(bin, []) + [EOD] * 8)[:7] for bin in BINS]
    assert (data.num_windows, data.num_targets, data.padding_share) == (4, 28, 2 / 32)
    ignored = targets == IGNORED_TARGET
    assert np.argwhere(ignored).tolist() == [[0, 6], [2, 6]]
    assert positions[2].tolist() == [0, 1, 0, 1, 0, 1, 2]
    part = ValidationData([prefix], SEQ, split="50,50")
    assert np.array_equal(part.batch(0, 2)[0], tokens[2:]) and part.num_windows == 2


def test_what_packed_files_refuse(tmp_path, write_tokens):
    prefix = write_packed(tmp_path / "packed", BINS)
    for wrong in (TrainingData, ValidationData):
        arguments = ([(prefix, 1)], 8, 0) if wrong is TrainingData else ([prefix], 8)
        with pytest.raises(UserError, match="packed for a seq_length of 7, this run has 8: set data.seq_length=7"):
            wrong(*arguments)
    with pytest.raises(UserError, match="packed, and Megatron's order would cut across its bins"):
        TrainingData([(prefix, 1)], SEQ, 0, order="megatron", num_samples=3)
    plain = write_tokens([range(100, 200)], "plain")
    for datasets in ([(prefix, 1), (plain, 1)], [(plain, 1), (prefix, 1)]):
        with pytest.raises(UserError, match="packed is packed and .*plain is not.*: pack all files of a blend"):
            TrainingData(datasets, SEQ, 0)
    assert TrainingData([(prefix, 0), (plain, 1)], SEQ, 0).ignore_repeated_eod is None
    assert TrainingData([(prefix, 1), (plain, 0)], SEQ, 0).ignore_repeated_eod == EOD
    other = write_packed(tmp_path / "other", BINS)
    manifest = Path(f"{other}.json")
    manifest.write_text(manifest.read_text().replace('"eod_id": 9', '"eod_id": 8'))
    with pytest.raises(UserError, match="packed is padded with token 9, .*other with 8: pack both"):
        TrainingData([(prefix, 1), (other, 1)], SEQ, 0)
    both = ValidationData([prefix, plain, other], SEQ)  # each with its own padding
    ignored = both.batch(0, both.num_windows)[1] == IGNORED_TARGET
    assert np.argwhere(ignored[:4]).tolist() == [[0, 6], [2, 6]] and ignored[-4:].sum() == 0
