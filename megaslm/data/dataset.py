"""Batches of token windows for training and validation, read straight from memory-mapped token files.

Shapes: B samples, S = seq_length tokens.
"""

import os
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from megaslm.data.samples import MegatronSamples, WindowSamples
from megaslm.data.token_range import TokenRange, common_tokenizer, padding_share, positions_from
from megaslm.errors import UserError

IGNORED_TARGET = -100  # what torch's cross-entropy leaves out by default
# So many samples are located at once: the order's arithmetic costs the same for one as for a thousand.
LOCATED_SAMPLES = 1024


class Batch(NamedTuple):
    """Samples as they are stored; a copy of the caller's own."""

    tokens: np.ndarray  # [B, S + 1] stored width; columns 0..S-1 are the inputs, 1..S the targets
    positions: np.ndarray | None  # [B, S] int32, tokens since the start of the document; None: documents do not matter


class Located(NamedTuple):
    """Where the tokens of consecutive samples lie: pieces in the order of their places in the samples, back to back."""

    pieces: list[tuple[int, int, int, int]]  # dataset, first token, place, place behind its end
    first_pieces: list[int]  # of each sample, and the end: one more than the block has samples
    documents: np.ndarray | None  # places where a document starts, in samples of S tokens: the inputs
    first_documents: list[int]


class TrainingData:
    """The training samples: sample number -> S + 1 tokens, a pure function of the arguments.

    Args:
        datasets: (PREFIX, weight) of each token file; weights are relative shares of the samples.
        seq_length: tokens a sample trains on; each holds one more, so that every input has its target.
        seed: seed of the order.
        split: "a,b" or "a,b,c": train on the first part of each file's sequences. None: on all of it.
        vocab_size: ids from here on are a UserError, on opening by the manifest, else batch by batch.
        tokenizer_fingerprint: a file written with another tokenizer is a UserError; so are files of several.
        order: "windows", ours, or "megatron".
        num_samples: samples of the whole run, from sample 0 on, for which Megatron's order is made; the other one needs
            it not.
        mask_documents: batches tell the documents apart by positions that restart at each. A window starts at 0 too.

    Packed files (see packing.py) are read bin by bin; a bin must have S + 1 tokens, and pieces of documents count as
    documents. They are not blended with others, in which a repeated end-of-document token is no padding.

    Attributes:
        tokenizer_fingerprint: that of the tokenizer that wrote the files; None where no manifest names one.
        dtype: stored width of the ids, the widest of the files.
        samples_per_epoch: samples of one reading of all datasets with a weight above zero.
        tokens_per_epoch: samples_per_epoch * seq_length.
        ignore_repeated_eod: the end-of-document id of packed files: where input and target both are this id, the
            target is padding and not to be trained on. None: there is no padding.
        padding_share: share of padding in the tokens of the datasets with a weight above zero.
    """

    def __init__(
        self,
        datasets: Sequence[tuple[str | os.PathLike, float]],
        seq_length: int,
        seed: int,
        split: str | None = None,
        vocab_size: int | None = None,
        tokenizer_fingerprint: str | None = None,
        order: str = "windows",
        num_samples: int | None = None,
        mask_documents: bool = False,
    ):
        if not datasets:
            raise UserError("no training data: give token files (data.train) or raw text (data.input)")
        self.seq_length, self.seed, self.split, self.mask_documents = seq_length, seed, split, mask_documents
        self.weights = [float(weight) for _, weight in datasets]
        self.parts = [TokenRange(p, split, "train", vocab_size, tokenizer_fingerprint) for p, _ in datasets]
        self.tokenizer_fingerprint = common_tokenizer(self.parts)
        for part in self.parts:
            part.check_seq_length(seq_length)
        common = (self.parts, self.weights, seq_length, seed)
        self._order = MegatronSamples(*common, num_samples) if order == "megatron" else WindowSamples(*common)
        blended = [part for part, weight in zip(self.parts, self.weights, strict=True) if weight]
        self.ignore_repeated_eod = _padding_id(blended)
        self.padding_share = padding_share(blended)
        self.dtype = np.result_type(*(part.tokens.dtype for part in self.parts)).newbyteorder("=")
        self.samples_per_epoch = sum(
            count for count, weight in zip(self._order.samples_per_epoch, self.weights, strict=True) if weight
        )
        self.tokens_per_epoch = self.samples_per_epoch * seq_length
        self._located = lru_cache(maxsize=4)(self._locate)
        self._unchecked = vocab_size is not None and any(part.file.manifest is None for part in self.parts)

    @property
    def realised_weights(self) -> list[float]:
        """Shares of the datasets in the samples, as whole samples give them."""
        return self._order.realised_weights

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples first_sample .. first_sample + count - 1: B = count.

        UserError for an id outside the vocabulary, and for a sample that a Megatron order was not made for.
        """
        end = self._order.num_samples
        if end is not None and first_sample + count > end:
            raise UserError(
                f"sample {first_sample + count - 1:,} is not there: Megatron's order was made for a run of {end:,} "
                "samples; give the run its whole length at its start (train.max_steps)"
            )
        width = self.seq_length + 1
        tokens = np.empty((count, width), self.dtype)
        positions = np.empty((count, self.seq_length), np.int32) if self.mask_documents else None
        done = 0
        while done < count:
            block, row = divmod(first_sample + done, LOCATED_SAMPLES)
            rows = min(count - done, LOCATED_SAMPLES - row)
            located = self._located(block)
            self._copy(located, row, rows, tokens[done : done + rows].reshape(-1))
            if positions is not None:
                first, last = located.first_documents[row], located.first_documents[row + rows]
                starts = located.documents[first:last] - row * self.seq_length
                positions[done : done + rows] = positions_from(starts, rows, self.seq_length)
            done += rows
        return Batch(tokens, positions)

    def _copy(self, located: Located, row: int, rows: int, flat: np.ndarray) -> None:
        """Copy the tokens of `rows` samples from `row` on into `flat` [rows * (S + 1)]."""
        streams = [part.tokens for part in self.parts]
        shift = row * (self.seq_length + 1)
        pieces = located.pieces[located.first_pieces[row] : located.first_pieces[row + rows]]
        for dataset, start, place, end in pieces:
            flat[place - shift : end - shift] = streams[dataset][start : start + end - place]
        if self._unchecked:
            for dataset, start, place, end in pieces:
                self.parts[dataset].check_ids(start, flat[place - shift : end - shift])

    def _locate(self, block: int) -> Located:
        """Samples block * LOCATED_SAMPLES and following."""
        width, order = self.seq_length + 1, self._order
        samples = np.arange(block * LOCATED_SAMPLES, (block + 1) * LOCATED_SAMPLES)
        if order.num_samples is not None:
            samples = samples[samples < order.num_samples]
        datasets, numbers = order.locate(samples)
        pieces, documents = [], []
        for dataset in np.unique(datasets).tolist():
            rows = np.flatnonzero(datasets == dataset)
            found = order.pieces(dataset, numbers[rows])
            # The pieces of a sample have S + 1 tokens together.
            columns = np.cumsum(found.lengths) - found.lengths - found.samples * width
            places = rows[found.samples] * width + columns
            pieces.append(np.stack([np.full_like(places, dataset), found.starts, places, places + found.lengths]))
            if self.mask_documents:
                which, distances = order.documents_within(dataset, found)
                documents += [places, places[which] + distances]
        columns = np.concatenate(pieces, axis=1)
        columns = columns[:, np.argsort(columns[2])]
        first_pieces = np.searchsorted(columns[2], np.arange(len(samples) + 1) * width)
        located = Located(list(zip(*columns.tolist(), strict=True)), first_pieces.tolist(), None, [])
        if not self.mask_documents:
            return located
        rows, columns = np.divmod(np.sort(np.concatenate(documents)), width)
        # A document that starts with the last target falls on the first place of the next row, where one starts anyway.
        starts = rows * self.seq_length + columns
        first_documents = np.searchsorted(starts, np.arange(len(samples) + 1) * self.seq_length)
        return located._replace(documents=starts, first_documents=first_documents.tolist())

    def state(self) -> dict:
        """What a checkpoint keeps, as JSON: enough to refuse a resume on other data, and what the order needs."""
        return {
            "order": self._order.name,
            "order_version": self._order.version,
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
            **self._order.state(),
        }

    def load_state(self, state: dict, samples_consumed: int) -> None:
        """Continue a run whose checkpoint at `samples_consumed` holds `state`.

        The datasets must be the same, in the same order (a moved file is the same; new ones may follow at the end);
        else UserError. Weights that differ from the state's take effect from `samples_consumed` on, as a new segment.
        In Megatron's order weights and the number of datasets stay, and so must the number of epochs.
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
        self._order.load_state(state, samples_consumed)
        self._located.cache_clear()


class ValidationData:
    """Every target of the validation tokens exactly once: windows in order, the last of each file short and masked.

    Windows of a packed file are its bins, and the padding of a bin is masked.

    Args:
        prefixes: token files, read one after another; windows do not cross from one to the next.
        seq_length: S, tokens of a window.
        split: read the second part of each file's sequences; None: all of it.
        vocab_size, tokenizer_fingerprint, mask_documents: as in TrainingData.
        stride: tokens from the start of a window to that of the next, 1 to S. Below S they overlap, and only the
            targets that no window before has are read: all but the first S have S - stride or more tokens of context.
            Not of packed files, whose bins have nothing in common. None: S.

    Attributes:
        tokenizer_fingerprint: as in TrainingData.
        num_windows: windows of all files.
        num_targets: all tokens but the first of each file, or of each bin of a packed one, where padding counts.
        padding_share: share of padding in the tokens of the files.
    """

    def __init__(
        self,
        prefixes: Sequence[str | os.PathLike],
        seq_length: int,
        split: str | None = None,
        vocab_size: int | None = None,
        tokenizer_fingerprint: str | None = None,
        mask_documents: bool = False,
        stride: int | None = None,
    ):
        if not prefixes:
            raise UserError("no validation data: give token files (data.validation) or a split with a second part")
        self.seq_length, self.mask_documents = seq_length, mask_documents
        self.stride = seq_length if stride is None else stride
        if not 1 <= self.stride <= seq_length:
            raise UserError(f"stride {stride}: give 1 to {seq_length}, the tokens of a window")
        self.parts = [TokenRange(p, split, "validation", vocab_size, tokenizer_fingerprint) for p in prefixes]
        self.tokenizer_fingerprint = common_tokenizer(self.parts)
        for part in self.parts:
            part.check_seq_length(seq_length)
            if len(part) < 2:
                raise UserError(f"the validation part of {part.prefix} has {len(part)} token: two are the least")
            if part.bin_length and self.stride != seq_length:
                raise UserError(
                    f"stride {stride}: {part.prefix} is packed, and windows may not overlap over its bins; leave the "
                    "stride out, or give a file that is not packed"
                )
        self.padding_share = padding_share(self.parts)
        windows = [
            len(part) // part.bin_length
            if part.bin_length
            else 1 + max(0, -(-(len(part) - 1 - seq_length) // self.stride))
            for part in self.parts
        ]
        self._firsts = np.array([0, *accumulate(windows)], np.int64)
        self.num_windows = int(self._firsts[-1])
        self.num_targets = sum(
            count * seq_length if part.bin_length else len(part) - 1
            for part, count in zip(self.parts, windows, strict=True)
        )

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Tokens [B, S] and targets [B, S], int64, of windows first .. first + count - 1, and positions as in Batch.

        Where a window is short its tokens are 0 and its targets -100; windows from num_windows on are all so, so that
        every rank may run the same number of forward passes.
        """
        tokens = np.zeros((count, self.seq_length), np.int64)
        targets = np.full((count, self.seq_length), IGNORED_TARGET, np.int64)
        documents = np.arange(count) * self.seq_length  # every row starts one
        stop = max(first, min(first + count, self.num_windows))
        for index, part in enumerate(self.parts):
            low, high = (min(max(int(bound), first), stop) for bound in self._firsts[index : index + 2])
            starts = (np.arange(low, high) - self._firsts[index]) * (part.bin_length or self.stride)
            for row, start in enumerate(starts.tolist(), low - first):
                ids = part.tokens[start : start + self.seq_length + 1]
                part.check_ids(start, ids)
                tokens[row, : len(ids) - 1] = ids[:-1]
                targets[row, : len(ids) - 1] = ids[1:]
                if start:
                    targets[row, : self.seq_length - self.stride] = IGNORED_TARGET  # the window before has them
                if part.padding_id is not None:
                    targets[row, (tokens[row] == part.padding_id) & (targets[row] == part.padding_id)] = IGNORED_TARGET
            if self.mask_documents and low < high:
                # Past the end of the part every position will do: what is there is masked.
                lengths = np.full_like(starts, self.seq_length)
                rows, distances = part.documents.within(part.first + starts, lengths)
                documents = np.append(documents, (low - first + rows) * self.seq_length + distances)
        if not self.mask_documents:
            return tokens, targets, None
        return tokens, targets, positions_from(np.sort(documents), count, self.seq_length)


def _padding_id(parts: Sequence[TokenRange]) -> int | None:
    """The id that fills up the bins of packed files; None where no file is packed.

    UserError for a blend of packed files and others, and for two that are filled with different ids.
    """
    first = parts[0]
    for part in parts[1:]:
        if (part.padding_id is None) != (first.padding_id is None):
            packed, other = (first, part) if part.padding_id is None else (part, first)
            raise UserError(
                f"{packed.prefix} is packed and {other.prefix} is not, and the padding of the one may be text of the "
                "other: pack all files of a blend (tools/preprocess_data.py --pack), or none"
            )
        if part.padding_id != first.padding_id:
            raise UserError(
                f"{first.prefix} is padded with token {first.padding_id}, {part.prefix} with {part.padding_id}: "
                "pack both with the same tokenizer"
            )
    return first.padding_id
