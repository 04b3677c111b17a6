import copy
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaslm.data import (
    IGNORED_TARGET,
    TokenFileWriter,
    TrainingData,
    ValidationData,
    common_tokenizer,
    split_bounds,
)
from megaslm.errors import UserError


@pytest.mark.parametrize(
    ("split", "size", "bounds"),
    [
        ("98,2", 1000, [0, 980, 1000]),
        ("90,5,5", 101, [0, 91, 96, 101]),
        ("1", 7, [0, 7]),
        ("1,0", 7, [0, 7, 7]),
        ("90,5,5", 30, [0, 27, 29, 30]),  # 0.9 + 0.05 in float64 is above 0.95, as in Megatron
        ("0.5,0.5", 5, [0, 2, 5]),  # int(round(2.5)) is 2, as in Megatron
    ],
)
def test_split_bounds(split, size, bounds):
    assert split_bounds(split, size) == bounds


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "0,0", "-1,2", "nan,1", "98;2"])
def test_splits_that_are_none(split):
    with pytest.raises(UserError, match="split"):
        split_bounds(split, 10)


@pytest.mark.parametrize("dp", [1, 2, 3, 5])
def test_every_window_once_an_epoch_for_any_number_of_ranks(write_tokens, dp):
    prefix = write_tokens([range(1000)])
    data = TrainingData([(prefix, 1)], seq_length=8, seed=3)
    assert data.samples_per_epoch == 124 and data.tokens_per_epoch == 992
    rows, micro, consumed = [], 2, 0
    while consumed < 124 * 2:
        for rank in range(dp):
            rows.append((consumed + rank * micro, data.batch(consumed + rank * micro, micro).tokens))
        consumed += dp * micro
    by_sample = {first + i: row for first, batch in rows for i, row in enumerate(batch)}
    for epoch in range(2):
        starts = sorted(int(by_sample[k][0]) for k in range(epoch * 124, epoch * 124 + 124))
        assert np.array_equal(np.diff(starts), [8] * 123)
    assert all(np.array_equal(row, np.arange(row[0], row[0] + 9)) for row in by_sample.values())
    whole = data.batch(0, len(by_sample)).tokens
    assert all(np.array_equal(whole[k], row) for k, row in by_sample.items())


def test_batches_are_copies_in_stored_width(write_tokens):
    narrow, wide = write_tokens([range(100)]), write_tokens([range(100)], "wide", vocab_size=100_000)
    batch, positions = TrainingData([(narrow, 1)], 8, 0).batch(0, 4)
    assert positions is None
    assert batch.dtype == np.uint16 and batch.shape == (4, 9) and batch.flags.c_contiguous and batch.flags.writeable
    assert TrainingData([(narrow, 1), (wide, 1)], 8, 0).batch(0, 4).tokens.dtype == np.int32


def test_split_keeps_training_and_validation_apart(write_tokens):
    prefix = write_tokens([range(i * 10, i * 10 + 10) for i in range(100)])
    train = TrainingData([(prefix, 1)], 10, 0, split="90,10")
    seen = train.batch(0, 5 * train.samples_per_epoch).tokens
    assert seen.max() < 900 and len(np.unique(seen)) > 880
    validation = ValidationData([prefix], 10, split="90,10")
    tokens, targets, positions = validation.batch(0, validation.num_windows)
    assert positions is None
    assert tokens[0, 0] == 900 and targets.max() == 999 and validation.num_targets == 99


def test_blend_of_datasets(write_tokens):
    datasets = [
        (write_tokens([range(i * 1000, i * 1000 + 500)], f"d{i}"), weight) for i, weight in enumerate((3, 1, 0))
    ]
    data = TrainingData(datasets, 9, seed=5)
    batch = data.batch(0, 8192).tokens
    assert np.array_equal(np.diff(batch.astype(int)), np.ones((8192, 9), int))  # no row crosses from one to another
    share = np.bincount(batch[:, 0] // 1000, minlength=3) / 8192
    assert abs(share[0] - 0.75) < 0.02 and share[2] == 0
    assert data.realised_weights == [0.75, 0.25, 0.0]
    assert data.samples_per_epoch == 2 * ((500 - 9) // 9)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 60), min_size=1, max_size=3),
    seq=st.integers(1, 20),
    batch=st.integers(1, 7),
    stride=st.none() | st.integers(1, 20),
)
def test_validation_reads_every_target_once(tmp_path_factory, sizes, seq, batch, stride):
    folder = tmp_path_factory.mktemp("validation")
    prefixes = []
    for i, size in enumerate(sizes):
        prefixes.append(folder / str(i))
        with TokenFileWriter(prefixes[-1], 1000) as writer:
            writer.append(np.arange(size) + 100 * i + 1)
            writer.finish()
    stride = None if stride is None else min(stride, seq)
    data = ValidationData(prefixes, seq, stride=stride)
    found = []
    for first in range(0, data.num_windows + 2 * batch, batch):
        tokens, targets, _ = data.batch(first, batch)
        assert tokens.shape == targets.shape == (batch, seq) and tokens.dtype == targets.dtype == np.int64
        kept = targets != IGNORED_TARGET
        assert np.array_equal(tokens[kept] + 1, targets[kept]) and (stride or not tokens[~kept].any())
        for row, scored in zip(tokens, kept, strict=True):
            context = np.flatnonzero(scored)[:1]  # tokens before the first that is scored with its own target
            start_of_file = context.size and row[0] % 100 == 1
            assert start_of_file or not context.size or context[0] >= seq - (stride or seq)
        found += targets[kept].tolist()
    assert found == [100 * i + 1 + t for i, size in enumerate(sizes) for t in range(1, size)]
    assert data.num_targets == len(found)


def test_too_little_data(write_tokens):
    prefix = write_tokens([range(30)])
    with pytest.raises(UserError, match="too short for one window of seq_length 16"):
        TrainingData([(prefix, 1)], 16, 0)
    with pytest.raises(UserError, match="the validation part of .* is empty: split 98,2 of 1 sequences"):
        ValidationData([prefix], 8, split="98,2")
    with pytest.raises(UserError, match="the validation part of .* is empty"):
        ValidationData([prefix], 8, split="1")
    with pytest.raises(UserError, match="two are the least"):
        ValidationData([write_tokens([[1]], "one")], 8)
    for nothing in (lambda: TrainingData([], 8, 0), lambda: ValidationData([], 8)):
        with pytest.raises(UserError, match="no .* data"):
            nothing()


def test_files_of_different_tokenizers(write_tokens):
    first, same = write_tokens([range(100)], "first"), write_tokens([range(100)], "same")
    foreign, other = (
        write_tokens([range(100)], "foreign", manifest=False),
        write_tokens([range(100)], "other", tokenizer="beef"),
    )
    training = TrainingData([(foreign, 1), (first, 1), (same, 0)], 8, 0)
    validation = ValidationData([other, foreign], 8)
    assert (training.tokenizer_fingerprint, validation.tokenizer_fingerprint) == ("f00d", "beef")
    assert TrainingData([(foreign, 1)], 8, 0).tokenizer_fingerprint is None
    for opened in (
        lambda: TrainingData([(foreign, 1), (first, 1), (other, 1)], 8, 0),
        lambda: ValidationData([first, same, other], 8),
        lambda: common_tokenizer([*training.parts, *validation.parts]),
    ):
        with pytest.raises(UserError, match=r"/first and .*/other were tokenized with different .*f00d and beef"):
            opened()


def test_ids_over_the_vocabulary(write_tokens):
    ids = np.arange(100) % 50
    ids[77] = 99
    prefix = write_tokens([ids[:50], ids[50:]])
    TrainingData([(prefix, 1)], 8, 0, vocab_size=100)
    with pytest.raises(UserError, match="holds token id 99, but the model's vocabulary has 50"):
        TrainingData([(prefix, 1)], 8, 0, vocab_size=50)
    Path(f"{prefix}.json").unlink()
    data = TrainingData([(prefix, 1)], 8, 0, vocab_size=50)
    with pytest.raises(UserError, match=r"corpus.bin: token 77 has id 99, outside the model's vocabulary of 50"):
        data.batch(0, data.samples_per_epoch)
    with pytest.raises(UserError, match=r"corpus.bin: token 77 has id 99"):
        ValidationData([prefix], 8, split="50,50", vocab_size=50).batch(0, 20)


def test_negative_ids_of_other_writers(write_tokens):
    prefix = write_tokens([range(100)], vocab_size=100_000, manifest=False)
    tokens = np.fromfile(f"{prefix}.bin", np.int32)
    tokens[5] = -3
    tokens.tofile(f"{prefix}.bin")
    data = TrainingData([(prefix, 1)], 4, 0, vocab_size=100)
    with pytest.raises(UserError, match="token 5 has id -3"):
        data.batch(0, 2 * data.samples_per_epoch)


def test_state_refuses_other_data(write_tokens):
    prefix, other = write_tokens([range(200)]), write_tokens([range(1, 201)], "other")
    data = TrainingData([(prefix, 1), (other, 1)], 8, seed=3)
    state = json.loads(json.dumps(data.state()))
    expected = data.batch(100, 50).tokens
    TrainingData([(prefix, 1), (other, 1)], 8, seed=3).load_state(state, 100)
    for changed, message in [
        (TrainingData([(prefix, 1), (other, 1)], 8, seed=4), "seed 3, this run has 4"),
        (TrainingData([(prefix, 1), (other, 1)], 4, seed=3), "seq_length"),
        (TrainingData([(other, 1), (prefix, 1)], 8, seed=3), "dataset 0, .*other, is not what"),
        (TrainingData([(prefix, 1)], 8, seed=3), "trained on 2 datasets, this run has 1"),
    ]:
        with pytest.raises(UserError, match=message):
            changed.load_state(state, 100)
    newer = copy.deepcopy(state) | {"order_version": 2}
    with pytest.raises(UserError, match="order_version 2, this run has 1"):
        data.load_state(newer, 100)
    data.load_state(state, 100)
    assert np.array_equal(data.batch(100, 50).tokens, expected)


def test_weights_may_change_and_datasets_be_added_on_resume(write_tokens):
    prefixes = [write_tokens([np.arange(300) + 1000 * i], f"d{i}") for i in range(3)]
    old = TrainingData([(prefixes[0], 1), (prefixes[1], 1)], 8, seed=3)
    new = TrainingData([(prefixes[0], 1), (prefixes[1], 0), (prefixes[2], 1)], 8, seed=3)
    new.batch(1000, 500)  # of no consequence
    new.load_state(old.state(), 1000)
    assert np.array_equal(new.batch(0, 1000).tokens, old.batch(0, 1000).tokens)
    assert set(np.unique(new.batch(1000, 500).tokens[:, 0] // 1000)) == {0, 2}
    assert [segment["start_sample"] for segment in new.state()["segments"]] == [0, 1000]
    again = TrainingData([(prefixes[0], 1), (prefixes[1], 0), (prefixes[2], 1)], 8, seed=3)
    again.load_state(json.loads(json.dumps(new.state())), 1200)
    assert np.array_equal(again.batch(900, 600).tokens, new.batch(900, 600).tokens)
