"""Batches of token windows for training and validation, read straight from memory-mapped token files.

Shapes: B samples, S = seq_length tokens.
"""

import math
import os
from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np

from megaslm.data.order import ORDER_VERSION, Blend, Segment, WindowsOrder
from megaslm.data.token_file import TokenFile
from megaslm.errors import UserError

IGNORED_TARGET = -100  # what torch's cross-entropy leaves out by default
PARTS = ("train", "validation", "test")


def split_bounds(split: str, num_sequences: int) -> list[int]:
    """Bounds of the parts of `split` in sequences: "98,2" of 1000 gives [0, 980, 1000].

    Shares are relative; bound i is int(round(fraction * num_sequences)) of the cumulative fraction, as in Megatron.
    """
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= len(PARTS) or not all(math.isfinite(s) and s >= 0 for s in shares) or not sum(shares):
        raise UserError(
            f"split {split!r} is not understood; give the shares of train, validation and test, such as 98,2 or 90,5,5"
        )
    total = sum(shares)
    return [0] + [int(round(part / total * num_sequences)) for part in accumulate(shares)]


class TokenRange:
    """A contiguous part of a token file: all of it, or one part of a split by sequences.

    Attributes:
        tokens: [num_tokens] the ids of the part, a view in stored width.
        first: where the part starts in the file, in tokens.
    """

    def __init__(
        self,
        prefix: str | os.PathLike,
        split: str | None,
        part: str,
        vocab_size: int | None = None,
        tokenizer_fingerprint: str | None = None,
    ):
        self.file = TokenFile(prefix, tokenizer_fingerprint)
        self.prefix = self.file.prefix
        self.vocab_size = vocab_size
        first, last = 0, self.file.num_sequences
        if split is not None:
            bounds = split_bounds(split, self.file.num_sequences)
            index = PARTS.index(part)
            first, last = bounds[index : index + 2] if index + 1 < len(bounds) else (0, 0)
        if first == last:
            raise UserError(
                f"the {part} part of {self.prefix} is empty: "
                + (f"split {split} of {self.file.num_sequences} sequences" if split else "the file has no sequences")
                + "; give it a larger share, or token files of its own"
            )
        self.first = self.file.token_bound(first)
        self.tokens = self.file.tokens[self.first : self.file.token_bound(last)]
        largest = self.file.largest_id
        if vocab_size is not None and largest is not None and largest >= vocab_size:
            raise UserError(
                f"{self.prefix} holds token id {largest}, but the model's vocabulary has {vocab_size} tokens: use the "
                "tokenizer the file was built with, or a larger vocabulary"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    def check_ids(self, start: int, ids: np.ndarray) -> None:
        """Without a manifest nobody has looked at the ids yet: UserError for one outside the vocabulary."""
        if self.file.manifest is not None or self.vocab_size is None or not ids.size:
            return
        if ids.max() >= self.vocab_size or ids.min() < 0:
            at = int(np.flatnonzero((ids >= self.vocab_size) | (ids < 0))[0])
            raise UserError(
                f"{self.file.bin_path}: token {self.first + start + at:,} has id {ids[at]}, outside the model's "
                f"vocabulary of {self.vocab_size} tokens: use the tokenizer the file was built with, or a larger "
                "vocabulary"
            )


def common_tokenizer(parts: Iterable[TokenRange]) -> str | None:
    """Fingerprint of the tokenizer that wrote all of `parts`; None where no manifest names one.

    UserError if manifests name two, with a file of each; files whose manifest names none pass.
    """
    first: TokenRange | None = None
    for part in parts:
        if part.file.tokenizer_fingerprint is None:
            continue
        first = first or part
        mine, other = first.file.tokenizer_fingerprint, part.file.tokenizer_fingerprint
        if mine != other:
            raise UserError(
                f"{first.prefix} and {part.prefix} were tokenized with different tokenizers (fingerprints {mine} and "
                f"{other}), so that one id means two texts: tokenize both with the same"
            )
    return first.file.tokenizer_fingerprint if first else None


class TrainingData:
    """The training samples: sample number -> S + 1 tokens, a pure function of (datasets, split, seq_length, seed).

    Args:
        datasets: (PREFIX, weight) of each token file; weights are relative shares of the samples.
        seq_length: tokens a sample trains on; each holds one more, so that every input has its target.
        seed: seed of the order.
        split: "a,b" or "a,b,c": train on the first part of each file's sequences. None: on all of it.
        vocab_size: ids from here on are a UserError, on opening by the manifest, else batch by batch.
        tokenizer_fingerprint: a file written with another tokenizer is a UserError; so are files of several.

    Attributes:
        tokenizer_fingerprint: that of the tokenizer that wrote the files; None where no manifest names one.
        dtype: stored width of the ids, the widest of the files.
        samples_per_epoch: windows of all datasets with a weight above zero.
        tokens_per_epoch: samples_per_epoch * seq_length.
    """

    def __init__(
        self,
        datasets: Sequence[tuple[str | os.PathLike, float]],
        seq_length: int,
        seed: int,
        split: str | None = None,
        vocab_size: int | None = None,
        tokenizer_fingerprint: str | None = None,
    ):
        if not datasets:
            raise UserError("no training data: give token files (data.train) or raw text (data.input)")
        self.seq_length, self.seed, self.split = seq_length, seed, split
        self.weights = [float(weight) for _, weight in datasets]
        self.blend = Blend.of_weights(seed, self.weights)
        self.parts = [TokenRange(p, split, "train", vocab_size, tokenizer_fingerprint) for p, _ in datasets]
        self.tokenizer_fingerprint = common_tokenizer(self.parts)
        self.orders = [
            WindowsOrder(len(part), seq_length, seed, index, part.prefix) for index, part in enumerate(self.parts)
        ]
        self.dtype = np.result_type(*(part.tokens.dtype for part in self.parts)).newbyteorder("=")
        self.samples_per_epoch = sum(
            order.num_windows for order, weight in zip(self.orders, self.weights, strict=True) if weight
        )
        self.tokens_per_epoch = self.samples_per_epoch * seq_length

    @property
    def realised_weights(self) -> list[float]:
        """Shares of the datasets as whole slots of a block give them."""
        return self.blend.realised_weights

    def batch(self, first_sample: int, count: int) -> np.ndarray:
        """[B, S + 1] ids of samples first_sample .. first_sample + count - 1, a copy of our own in `dtype`.

        Columns 0..S-1 are the inputs, 1..S the targets.
        """
        datasets, numbers = self.blend.locate(np.arange(first_sample, first_sample + count))
        batch = np.empty((count, self.seq_length + 1), self.dtype)
        for dataset in np.unique(datasets).tolist():
            part, (rows,) = self.parts[dataset], np.nonzero(datasets == dataset)
            starts = self.orders[dataset].starts(numbers[rows])
            for row, start in zip(rows.tolist(), starts.tolist(), strict=True):
                window = part.tokens[start : start + self.seq_length + 1]
                part.check_ids(start, window)
                batch[row] = window
        return batch

    def state(self) -> dict:
        """What a checkpoint keeps, as JSON: enough to refuse a resume on other data, and the segments of the blend."""
        return {
            "order": "windows",
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            "seq_length": self.seq_length,
            "datasets": [
                {
                    "prefix": part.prefix,
                    "weight": weight,
                    "fingerprint": part.file.fingerprint,
                    "first_token": part.first,
                    "tokens": len(part),
                }
                for part, weight in zip(self.parts, self.weights, strict=True)
            ],
            "segments": [segment.to_json() for segment in self.blend.segments],
        }

    def load_state(self, state: dict, samples_consumed: int) -> None:
        """Continue a run whose checkpoint at `samples_consumed` holds `state`.

        The datasets must be the same, in the same order (a moved file is the same; new ones may follow at the end);
        else UserError. Weights that differ from the state's take effect from `samples_consumed` on, as a new segment.
        """
        mine = self.state()
        for key in ("order", "order_version", "seed", "seq_length"):
            if state[key] != mine[key]:
                raise UserError(
                    f"the checkpoint's data has {key} {state[key]}, this run has {mine[key]}: the sample order would "
                    "not go on; set it back, or start a new run from the checkpoint's weights"
                )
        saved = state["datasets"]
        if len(saved) > len(self.parts):
            raise UserError(
                f"the checkpoint was trained on {len(saved)} datasets, this run has {len(self.parts)}: keep them all, "
                "in their order (weight 0 retires one), and add new ones at the end"
            )
        for index, (old, new) in enumerate(zip(saved, mine["datasets"], strict=False)):
            for key in ("fingerprint", "first_token", "tokens"):
                if old[key] != new[key]:
                    raise UserError(
                        f"dataset {index}, {new['prefix']}, is not what the checkpoint was trained on "
                        f"({old['prefix']}): its {key} is {new[key]}, was {old[key]}; give the same files and "
                        "split, or start a new run from the checkpoint's weights"
                    )
        segments = [Segment.from_json(segment) for segment in state["segments"]]
        self.blend = Blend(self.seed, segments).with_weights(samples_consumed, self.weights)


class ValidationData:
    """Every target of the validation tokens exactly once: windows in order, the last of each file short and masked.

    Args:
        prefixes: token files, read one after another; windows do not cross from one to the next.
        seq_length: S, tokens of a window.
        split: read the second part of each file's sequences; None: all of it.
        vocab_size, tokenizer_fingerprint: as in TrainingData.

    Attributes:
        tokenizer_fingerprint: as in TrainingData.
        num_windows: windows of all files.
        num_targets: tokens predicted: all but the first of each file.
    """

    def __init__(
        self,
        prefixes: Sequence[str | os.PathLike],
        seq_length: int,
        split: str | None = None,
        vocab_size: int | None = None,
        tokenizer_fingerprint: str | None = None,
    ):
        if not prefixes:
            raise UserError("no validation data: give token files (data.validation) or a split with a second part")
        self.seq_length = seq_length
        self.parts = [TokenRange(p, split, "validation", vocab_size, tokenizer_fingerprint) for p in prefixes]
        self.tokenizer_fingerprint = common_tokenizer(self.parts)
        for part in self.parts:
            if len(part) < 2:
                raise UserError(f"the validation part of {part.prefix} has {len(part)} token: two are the least")
        windows = [-(-(len(part) - 1) // seq_length) for part in self.parts]
        self._firsts = np.array([0, *accumulate(windows)], np.int64)
        self.num_windows = int(self._firsts[-1])
        self.num_targets = sum(len(part) - 1 for part in self.parts)

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [B, S] and targets [B, S], int64, of windows first .. first + count - 1.

        Where a window is short its tokens are 0 and its targets -100; windows from num_windows on are all so, so that
        every rank may run the same number of forward passes.
        """
        tokens = np.zeros((count, self.seq_length), np.int64)
        targets = np.full((count, self.seq_length), IGNORED_TARGET, np.int64)
        for row, window in enumerate(range(first, min(first + count, self.num_windows))):
            index = int(np.searchsorted(self._firsts, window, side="right")) - 1
            part = self.parts[index]
            start = (window - int(self._firsts[index])) * self.seq_length
            ids = part.tokens[start : start + self.seq_length + 1]
            part.check_ids(start, ids)
            tokens[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = ids[1:]
        return tokens, targets
