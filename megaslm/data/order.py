"""The order of samples: pure functions from a sample's number to a dataset and a window of its tokens.

Nothing is built, stored or shuffled up front, and the state of the data is one number: samples consumed.

Windows: sample k of a dataset is a window of seq_length + 1 tokens. With n windows an epoch, epoch = k // n, and the
window's number is a keyed permutation of k % n: a Feistel network over the domain a x b >= n with a, b near sqrt(n)
(Black and Rogaway 2002, "Ciphers with arbitrary finite domains": generalised Feistel and cycle walking). Every epoch
has its own keys, and its own offset in [0, seq_length - 1], so that cuts fall elsewhere.

Blend: samples come in blocks of 65,536, in each of which a dataset holds the same whole number of slots; the block's
slots are permuted by key. Each dataset is delivered in its own order, whatever the others' weights.

Everything is integer arithmetic on our own hash, so that the order is the same on every machine and NumPy version.
Sample numbers and starts are int64 arrays of any shape [...]; ORDER_VERSION changes when the order does.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from megaslm.errors import UserError

ORDER_VERSION = 1
BLOCK_SAMPLES = 65_536
FEISTEL_ROUNDS = 8
STORED_SHUFFLE_LIMIT = 64  # below it a shuffle is stored: a Feistel network over a few elements is a poor permutation


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that spreads every input bit: the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=4096)
def _derive_keys(purpose: str, *numbers: int) -> np.ndarray:
    """[FEISTEL_ROUNDS] uint64 keys from BLAKE2b of the purpose and the numbers (seed, dataset, epoch ...)."""
    message = "/".join(["megaslm order", str(ORDER_VERSION), purpose, *map(str, numbers)])
    digest = hashlib.blake2b(message.encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def _keyed_shuffle(n: int, key: np.uint64) -> np.ndarray:
    """[n] int64, a permutation of 0..n-1: the order of n distinct hashes (distinct, since `_mix` is a bijection)."""
    return np.argsort(_mix(np.arange(n, dtype=np.uint64) ^ key))


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """[...] int64: where the permutation of 0..n-1 under `keys` takes each of `index` [...], in O(1) memory each."""
    if n < STORED_SHUFFLE_LIMIT:
        return _keyed_shuffle(n, keys[0])[index]
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)  # rows * columns exceeds n by less than rows: walking on is rare
    a, b = np.uint64(rows), np.uint64(columns)

    def encrypt(x: np.ndarray) -> np.ndarray:
        left, right = x // b, x % b
        for i in range(0, FEISTEL_ROUNDS, 2):
            left = (left + _mix(right ^ keys[i]) % a) % a
            right = (right + _mix(left ^ keys[i + 1]) % b) % b
        return left * b + right

    x = encrypt(index.astype(np.uint64))
    while (outside := x >= n).any():  # cycle walking: apply again until the result lies in the domain
        x[outside] = encrypt(x[outside])
    return x.astype(np.int64)


class WindowsOrder:
    """Order of the windows of one dataset of `num_tokens` tokens; `dataset` is its place in the blend.

    packed: the tokens come in bins of seq_length + 1, and the windows are the bins, in every epoch.

    Attributes:
        stride: tokens from the start of one window to that of the next: seq_length, in a packed dataset seq_length + 1.
        offsets: at how many tokens the first window may start: seq_length, in a packed dataset 1.
        num_windows: windows per epoch, (num_tokens - seq_length) // seq_length, the same for every offset; the bins of
            a packed dataset.

    UserError for a corpus too short for one window at every offset (2 * seq_length tokens).
    """

    def __init__(
        self,
        num_tokens: int,
        seq_length: int,
        seed: int,
        dataset: int = 0,
        name: str = "the corpus",
        packed: bool = False,
    ):
        self.num_tokens, self.seq_length, self.seed, self.dataset = num_tokens, seq_length, seed, dataset
        self.stride, self.offsets = (seq_length + 1, 1) if packed else (seq_length, seq_length)
        self.num_windows = num_tokens // self.stride if packed else (num_tokens - seq_length) // seq_length
        if self.num_windows < 1:
            raise UserError(
                f"{name} has {num_tokens:,} tokens to train on, too short for one window of seq_length {seq_length:,}: "
                f"shorten seq_length to {num_tokens // 2:,} or less, or give it more text"
            )

    def offset(self, epoch: int) -> int:
        """Token at which the first window of the epoch starts, in [0, seq_length - 1]; 0 in a packed dataset."""
        return int(_derive_keys("offset", self.seed, self.dataset, epoch)[0]) % self.offsets

    def starts(self, numbers: np.ndarray) -> np.ndarray:
        """[...] int64: first token of the window of each sample number [...] of this dataset."""
        numbers = np.asarray(numbers, np.int64)
        epochs, index = np.divmod(numbers, self.num_windows)
        starts = np.empty_like(numbers)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            keys = _derive_keys("windows", self.seed, self.dataset, epoch)
            starts[here] = self.offset(epoch) + permute(index[here], self.num_windows, keys) * self.stride
        return starts


def block_counts(weights: Sequence[float]) -> np.ndarray:
    """[datasets] int64: slots of each dataset in a block of 65,536, by the largest remainder.

    A dataset with a weight above zero gets at least one, given up by the largest; ties go to the lowest index.
    UserError for weights that are negative or not finite, or all zero.
    """
    if any(not math.isfinite(w) or w < 0 for w in weights) or not any(weights):
        raise UserError(f"weights of the datasets are {list(weights)}: they must be 0 or more, and one above 0")
    # Exact fractions: a remainder must not depend on how a sum of floats was rounded.
    total = sum(map(Fraction, weights))
    shares = [Fraction(w) / total * BLOCK_SAMPLES for w in weights]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: BLOCK_SAMPLES - sum(counts)]:
        counts[i] += 1
    for i, weight in enumerate(weights):
        if weight > 0 and counts[i] == 0:
            counts[counts.index(max(counts))] -= 1
            counts[i] = 1
    return np.array(counts, np.int64)


@dataclass(frozen=True)
class Segment:
    """Weights in force from `start_sample` on, and how many samples each dataset had delivered by then."""

    start_sample: int
    weights: tuple[float, ...]
    delivered: tuple[int, ...]

    def to_json(self) -> dict:
        return {"start_sample": self.start_sample, "weights": list(self.weights), "delivered": list(self.delivered)}

    @classmethod
    def from_json(cls, content: dict) -> "Segment":
        return cls(content["start_sample"], tuple(content["weights"]), tuple(content["delivered"]))


class Blend:
    """Which dataset a sample comes from, and which of that dataset's samples it is.

    A change of weights starts a new segment at any sample; earlier samples keep their place. The segments are all there
    is to store.
    """

    def __init__(self, seed: int, segments: Sequence[Segment]):
        self.seed = seed
        self.segments = list(segments)
        starts = [segment.start_sample for segment in self.segments]
        assert starts and starts[0] == 0 and starts == sorted(set(starts)), f"segments start at {starts}"
        self._starts = np.array(starts, np.int64)
        self._counts = [block_counts(segment.weights) for segment in self.segments]
        # Two blocks cover a batch that straddles them; each takes about 1 MB.
        self._block = lru_cache(maxsize=4)(self._compute_block)

    @classmethod
    def of_weights(cls, seed: int, weights: Sequence[float]) -> "Blend":
        """A blend with the same weights throughout."""
        return cls(seed, [Segment(0, tuple(map(float, weights)), (0,) * len(weights))])

    @property
    def realised_weights(self) -> list[float]:
        """Shares of the datasets in the current segment, exact over every block."""
        return (self._counts[-1] / BLOCK_SAMPLES).tolist()

    def _compute_block(self, segment: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Dataset of each slot of a block, and how many of the block's earlier slots went to it: [65536] int64 both."""
        counts = self._counts[segment]
        key = _derive_keys("blend", self.seed, self.segments[segment].start_sample, block)[0]
        datasets = np.repeat(np.arange(len(counts)), counts)[_keyed_shuffle(BLOCK_SAMPLES, key)]
        # A stable sort lists each dataset's slots in order, one dataset after another.
        ranks = np.empty(BLOCK_SAMPLES, np.int64)
        firsts = np.cumsum(counts) - counts
        ranks[np.argsort(datasets, kind="stable")] = np.arange(BLOCK_SAMPLES) - np.repeat(firsts, counts)
        return datasets, ranks

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Dataset and number within the dataset of each sample [N]: two int64 arrays [N]."""
        samples = np.asarray(samples, np.int64)
        segments = np.searchsorted(self._starts, samples, side="right") - 1
        blocks, slots = np.divmod(samples - self._starts[segments], BLOCK_SAMPLES)
        datasets, numbers = np.empty_like(samples), np.empty_like(samples)
        for segment, block in np.unique(np.stack([segments, blocks], axis=-1), axis=0).tolist():
            here = (segments == segment) & (blocks == block)
            slot_datasets, ranks = self._block(segment, block)
            chosen = slot_datasets[slots[here]]
            before = np.array(self.segments[segment].delivered) + block * self._counts[segment]
            datasets[here], numbers[here] = chosen, before[chosen] + ranks[slots[here]]
        return datasets, numbers

    def delivered(self, samples: int) -> np.ndarray:
        """[datasets] int64: how many of the first `samples` samples came from each dataset."""
        segment = int(np.searchsorted(self._starts, samples, side="right")) - 1
        block, slot = divmod(samples - self.segments[segment].start_sample, BLOCK_SAMPLES)
        part = np.bincount(self._block(segment, block)[0][:slot], minlength=len(self._counts[segment]))
        return np.array(self.segments[segment].delivered) + block * self._counts[segment] + part

    def with_weights(self, start_sample: int, weights: Sequence[float]) -> "Blend":
        """This blend up to `start_sample`, and `weights` from there on; itself where that changes no slot.

        Segments that would have begun later are dropped. There may be more weights than before: datasets added last.
        """
        added = len(weights) - len(self.segments[-1].weights)
        assert added >= 0, "datasets are never taken out of a blend: give them weight 0"
        kept = [
            Segment(s.start_sample, s.weights + (0.0,) * added, s.delivered + (0,) * added)
            for s in self.segments
            if s.start_sample < start_sample or s.start_sample == 0
        ]
        before = Blend(self.seed, kept)
        if np.array_equal(before._counts[-1], block_counts(weights)):
            return before
        segment = Segment(start_sample, tuple(map(float, weights)), tuple(before.delivered(start_sample).tolist()))
        return Blend(self.seed, [*kept, segment] if start_sample else [segment])
