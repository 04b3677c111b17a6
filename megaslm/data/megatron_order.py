"""Megatron's order of samples, for runs that move over: the same samples in the same order from the same files.

Of megatron/core/datasets: gpt_dataset.py, helpers.cpp and blended_dataset.py of Megatron-LM. One dataset: E epochs of
its sequences are shuffled as one list, which is read as one stream of tokens; sample j is the S + 1 tokens of the
stream from token j * S on, and the samples are shuffled in turn. Both shuffles are those of one NumPy
RandomState(seed), whose stream is frozen across NumPy versions. E follows from the number of samples of the whole run,
so the order depends on it; and all of it is built at start, in memory.

Memory of one dataset with n sequences, in bytes: 4 n (lengths), 4 E n (the list) and 12 for each sample; of a blend 6
for each sample; up to four times that while it is built, and twice that beyond 2^31 entries. Every rank has its own.
S is seq_length throughout.
"""

import math
from collections.abc import Sequence

import numpy as np

from megaslm.errors import UserError

MEGATRON_ORDER_VERSION = 1
LAST_EPOCH_SHARE = 0.80  # of an epoch's samples; a last epoch that supplies fewer is shuffled apart
SURPLUS = 1.005  # by which each dataset of a blend is built for more samples than its share
LANE_SAMPLES = 4096


def _index_dtype(count: int) -> np.dtype:
    return np.dtype(np.int32 if count < 2**31 else np.int64)


class MegatronOrder:
    """The order of one dataset.

    Args:
        lengths: [n] int32, tokens of each sequence.
        seq_length: S.
        num_samples: samples of the whole run, from which the number of epochs follows.
        name: of the dataset, for messages.

    Attributes:
        epochs: E, the smallest number whose tokens suffice: E * T >= num_samples * S + 1, T the sum of lengths.
        last_epoch_apart: the last epoch is shuffled by itself, both as sequences and as samples.
        sequences: [E n] the list: sequence numbers.
        first_entries, first_offsets: [samples + 1] the sample table: the entry of `sequences` that holds token j * S
            of the stream, and the place of that token in it.
        shuffle: [samples] which row of the table each sample is; `len` of the order is their number.

    UserError for a dataset without tokens. One of less than a sample is read over the epochs that a sample takes.
    """

    def __init__(self, lengths: np.ndarray, seq_length: int, num_samples: int, seed: int, name: str = "the corpus"):
        self.lengths, self.seq_length = lengths, seq_length
        tokens = int(lengths.sum(dtype=np.int64))
        if tokens == 0:
            raise UserError(f"{name} has no tokens to train on: give it text, or leave it out")
        per_epoch = (tokens - 1) // seq_length
        self.epochs = max(1, -(-(num_samples * seq_length + 1) // tokens))
        before_last = ((self.epochs - 1) * tokens - 1) // seq_length
        self.last_epoch_apart = self.epochs > 1 and num_samples - before_last < int(LAST_EPOCH_SHARE * per_epoch)
        random = np.random.RandomState(seed)
        self.sequences = self._shuffled_sequences(random)
        self.first_entries, self.first_offsets = self._sample_table((self.epochs * tokens - 1) // seq_length)
        self.shuffle = self._shuffled_samples(random, before_last)

    def __len__(self) -> int:
        return len(self.shuffle)

    def _shuffled_sequences(self, random: np.random.RandomState) -> np.ndarray:
        epoch = np.arange(len(self.lengths), dtype=_index_dtype(len(self.lengths)))
        sequences = np.tile(epoch, self.epochs)
        together = len(sequences) - len(epoch) if self.last_epoch_apart else len(sequences)
        random.shuffle(sequences[:together])
        if self.last_epoch_apart:
            random.shuffle(sequences[together:])
        return sequences

    def _sample_table(self, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
        ends = np.cumsum(self.lengths[self.sequences], dtype=np.int64)
        firsts = np.arange(num_samples + 1, dtype=np.int64) * self.seq_length
        # The first entry that ends behind a token holds it: empty ones end where the one before them does.
        entries = np.searchsorted(ends, firsts, side="right")
        offsets = firsts - (ends[entries] - self.lengths[self.sequences[entries]])
        # Megatron's first row names the first entry even where that is empty.
        entries[0] = offsets[0] = 0
        return entries.astype(_index_dtype(len(self.sequences))), offsets.astype(np.int32)

    def _shuffled_samples(self, random: np.random.RandomState, before_last: int) -> np.ndarray:
        count = len(self.first_entries) - 1
        samples = np.arange(count, dtype=_index_dtype(count))
        together = before_last if self.last_epoch_apart else count
        random.shuffle(samples[:together])
        if self.last_epoch_apart:
            random.shuffle(samples[together:])
        return samples

    def pieces(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of which pieces of sequences the samples `numbers` [N] consist, in order; none is empty.

        Returns four [P] arrays: which of the N samples (ascending), the sequence, the first token within it, and the
        number of tokens; those of one sample add up to S + 1.
        """
        rows = self.shuffle[numbers]
        first, last = self.first_entries[rows].astype(np.int64), self.first_entries[rows + 1].astype(np.int64)
        counts = last - first + 1
        samples = np.repeat(np.arange(len(rows)), counts)
        ranks = np.arange(len(samples)) - np.repeat(np.cumsum(counts) - counts, counts)
        sequences = self.sequences[first[samples] + ranks].astype(np.int64)
        starts = np.where(ranks == 0, self.first_offsets[rows][samples], 0)
        # The last token of a sample is the first of the next one in the stream.
        stops = np.where(
            ranks == counts[samples] - 1, self.first_offsets[rows + 1][samples] + 1, self.lengths[sequences]
        )
        full = stops > starts
        return samples[full], sequences[full], starts[full], (stops - starts)[full]


def normalized(weights: Sequence[float]) -> np.ndarray:
    """[datasets] float64: shares of 1, with the roundings of Megatron's normalize()."""
    weights = np.array(weights, np.float64)
    return weights / np.sum(weights)


def samples_to_build(num_samples: int, share: float) -> int:
    """For how many samples Megatron builds a dataset that has `share` of a blend of `num_samples`."""
    return math.ceil(math.ceil(num_samples * share) * SURPLUS)


def choose_datasets(shares: np.ndarray, num_samples: int) -> np.ndarray:
    """[num_samples] int16: the dataset that each sample of a blend comes from.

    Sample s comes from the dataset that lags most: the largest share * max(s, 1) - (its samples so far) in float64,
    the lowest index on ties.

    Each choice depends on the one before. But where a dataset stands at a given sample is all but fixed, whatever came
    before: so stretches of LANE_SAMPLES samples are run side by side, each from a guess, and each whose guess is not
    what the stretch before it ends with is run again from there; a stretch is seldom run more than twice. What is
    returned is what the plain loop gives, bit for bit, and so Megatron's on x86-64. (Its C++ may round less where the
    compiler fuses multiplication and subtraction, as for ARM.)
    """
    lane_samples = min(LANE_SAMPLES, num_samples)
    firsts = np.arange(0, num_samples, lane_samples, dtype=np.float64)
    # The guess: everybody has their share, rounded by the largest remainder.
    lags = firsts[:, None] * shares
    counts = np.floor(lags)
    missing = firsts - counts.sum(axis=1)
    ranks = np.argsort(np.argsort(counts - lags, axis=1, kind="stable"), axis=1)
    counts += ranks < missing[:, None]
    chosen = np.empty((len(firsts), lane_samples), np.int16)
    ends = np.empty_like(counts)
    lanes = np.arange(len(firsts))
    while len(lanes):
        chosen[lanes], ends[lanes] = _run_lanes(shares, firsts[lanes], counts[lanes], lane_samples)
        lanes = np.flatnonzero((counts[1:] != ends[:-1]).any(axis=1)) + 1
        counts[lanes] = ends[lanes - 1]
    return chosen.reshape(-1)[:num_samples]


def _run_lanes(
    shares: np.ndarray, firsts: np.ndarray, counts: np.ndarray, num_samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """The loop over `num_samples` samples, for each lane [L]: its choices [L, num_samples], and its counts [L, D]."""
    counts, lanes = counts.copy(), np.arange(len(firsts))
    chosen = np.empty((num_samples, len(firsts)), np.int16)
    for step in range(num_samples):
        samples = np.maximum(firsts + step, 1.0)
        choice = np.argmax(shares * samples[:, None] - counts, axis=1)
        counts[lanes, choice] += 1
        chosen[step] = choice
    return chosen.T, counts


def count_per_dataset(chosen: np.ndarray, num_datasets: int) -> tuple[np.ndarray, np.ndarray]:
    """How many samples come from each dataset [D], and of each sample, which of its dataset's it is [num_samples]."""
    counts = np.bincount(chosen, minlength=num_datasets)
    numbers = np.empty(len(chosen), _index_dtype(len(chosen)))
    # A stable sort lists each dataset's samples in order, one dataset after another.
    numbers[np.argsort(chosen, kind="stable")] = np.arange(len(chosen)) - np.repeat(np.cumsum(counts) - counts, counts)
    return counts, numbers
