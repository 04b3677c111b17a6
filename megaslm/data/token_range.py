"""A part of a token file, as training and validation read it: which tokens, and where documents start in them."""

import math
import os
from collections.abc import Iterable
from itertools import accumulate

import numpy as np

from megaslm.data.token_file import TokenFile
from megaslm.errors import UserError

PARTS = ("train", "validation", "test")


def split_bounds(split: str, num_sequences: int) -> list[int]:
    """Bounds of the parts of `split` in sequences: "98,2" of 1000 gives [0, 980, 1000].

    Shares are relative; bound i is int(round(fraction * num_sequences)) of the sum of the first i fractions, with the
    roundings of Megatron's: "90,5,5" of 30 gives [0, 27, 29, 30], since 0.9 + 0.05 is a little above 0.95.
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
    return [0] + [int(round(part * num_sequences)) for part in accumulate(share / total for share in shares)]


class DocumentStarts:
    """At which tokens of a file documents start. In a packed file, the pieces of documents count as documents."""

    def __init__(self, file: TokenFile, packed: bool):
        self.file, self.packed = file, packed
        self.count = file.num_sequences if packed else file.num_documents

    def starts(self, documents: np.ndarray) -> np.ndarray:
        """[N] int64: the first token of each of `documents` [N]."""
        if self.packed:
            return self.file.token_bounds(documents)
        # As bytes, which are aligned: NumPy copies all of a misaligned array before it indexes it.
        boundaries = self.file.document_boundaries.view(np.uint8).reshape(-1, 8)[documents].view("<i8")
        return self.file.token_bounds(boundaries[:, 0])

    def holding(self, tokens: np.ndarray) -> np.ndarray:
        """[N] int64: the document that holds each of `tokens` [N]: the last that starts there or before."""
        found = np.zeros_like(tokens)
        for bit in reversed(range((self.count - 1).bit_length())):
            further = found + (1 << bit)
            inside = np.minimum(further, self.count - 1)
            found = np.where((further < self.count) & (self.starts(inside) <= tokens), further, found)
        return found

    def within(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Documents that start behind the first token of each stretch of `lengths` [N] tokens from `starts` [N].

        Returns which stretch [M], in order, and the document's first token, counted from that of the stretch [M].
        """
        first, last = self.holding(starts), self.holding(starts + lengths - 1)
        counts = last - first
        stretches = np.repeat(np.arange(len(starts)), counts)
        ranks = np.arange(len(stretches)) - np.repeat(np.cumsum(counts) - counts, counts)
        return stretches, self.starts(first[stretches] + 1 + ranks) - starts[stretches]


class TokenRange:
    """A contiguous part of a token file: all of it, or one part of a split by sequences (of a packed file: by bins).

    Attributes:
        tokens: [num_tokens] the ids of the part, a view in stored width.
        first: where the part starts in the file, in tokens.
        sequences: the part's sequence numbers in the file.
        bin_length: tokens of each bin of a packed file; None of a file that is not packed.
        padding_id: of a packed file the end-of-document id that fills up its bins; else None.
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
        packing = self.file.packing
        self.bin_length = packing["length"] if packing else None
        self.padding_id = packing["eod_id"] if packing else None
        self.documents = DocumentStarts(self.file, packed=packing is not None)
        self.sequences = self._choose(split, part)
        self.first = self.file.token_bound(self.sequences.start)
        self.tokens = self.file.tokens[self.first : self.file.token_bound(self.sequences.stop)].view(np.ndarray)
        largest = self.file.largest_id
        if vocab_size is not None and largest is not None and largest >= vocab_size:
            raise UserError(
                f"{self.prefix} holds token id {largest}, but the model's vocabulary has {vocab_size} tokens: use the "
                "tokenizer the file was built with, or a larger vocabulary"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    def _choose(self, split: str | None, part: str) -> range:
        file, unit = self.file, "sequences" if self.bin_length is None else "bins"
        count = file.num_sequences if self.bin_length is None else file.num_documents
        first, last = 0, count
        if split is not None:
            bounds = split_bounds(split, count)
            index = PARTS.index(part)
            first, last = bounds[index : index + 2] if index + 1 < len(bounds) else (0, 0)
        if first == last:
            raise UserError(
                f"the {part} part of {self.prefix} is empty: "
                + (f"split {split} of {count} {unit}" if split else f"the file has no {unit}")
                + "; give it a larger share, or token files of its own"
            )
        if self.bin_length is None:
            return range(first, last)
        return range(int(file.document_boundaries[first]), int(file.document_boundaries[last]))

    def check_seq_length(self, seq_length: int) -> None:
        """UserError for a packed file whose bins do not hold one window of seq_length + 1 tokens each."""
        if self.bin_length is not None and self.bin_length != seq_length + 1:
            raise UserError(
                f"{self.prefix} is packed for a seq_length of {self.bin_length - 1}, this run has {seq_length}: set "
                f"data.seq_length={self.bin_length - 1}, or pack the text again for {seq_length}"
            )

    def check_ids(self, start: int, ids: np.ndarray) -> None:
        """Without a manifest nobody has looked at the ids yet: UserError for one outside the vocabulary.

        ids: those of the part from its token `start` on.
        """
        if self.file.manifest is not None or self.vocab_size is None or not ids.size:
            return
        if ids.max() >= self.vocab_size or ids.min() < 0:
            at = int(np.flatnonzero((ids >= self.vocab_size) | (ids < 0))[0])
            raise UserError(
                f"{self.file.bin_path}: token {self.first + start + at:,} has id {ids[at]}, outside the model's "
                f"vocabulary of {self.vocab_size} tokens: use the tokenizer the file was built with, or a larger "
                "vocabulary"
            )


def padding_share(parts: Iterable[TokenRange]) -> float:
    """Share of padding in the tokens of the files of `parts`, whole files also where a part is less."""
    files = [part.file for part in parts]
    return sum((file.packing or {"padding": 0})["padding"] for file in files) / sum(len(file.tokens) for file in files)


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


def positions_from(starts: np.ndarray, count: int, length: int) -> np.ndarray:
    """[count, length] int32: of each place the distance from the last of `starts` at or before it.

    starts: [M] places in the flattened result, ascending; every row's first place is among them.
    """
    runs = np.diff(starts, append=count * length)
    return (np.arange(count * length, dtype=np.int32) - np.repeat(starts.astype(np.int32), runs)).reshape(count, length)
