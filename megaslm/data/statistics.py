"""What is in a token file: counts, lengths of documents, ids that occur, and documents as text."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megaslm.data.builder import find_tokenizer
from megaslm.data.token_file import TokenFile, read_chunks, tokens_before
from megaslm.data.tokenizer import Tokenizer, load_tokenizer
from megaslm.errors import UserError

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
MANTISSA_BITS = 15  # of a length in the count of lengths: exact below 2^16, within 1 in 32,768 above
NUM_LENGTH_BINS = 17 << MANTISSA_BITS
MAX_TOKENS_PER_CHARACTER = 4  # a token is at least a byte, a character of UTF-8 at most 4
LARGEST_VOCABULARY = 1 << 24  # what can be counted, and far more than any tokenizer has


@dataclass(frozen=True)
class LengthBin:
    """Documents of `low` to `high` tokens, both included, and the tokens in them."""

    low: int
    high: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Lengths:
    """Tokens per document (of a packed file: per piece, the padding of a bin counting as one), none left out.

    percentiles: nearest rank; exact below 65,536 tokens, within 0.003 % above. bins: powers of two.
    """

    number: int
    shortest: int
    mean: float
    longest: int
    percentiles: dict[int, int]
    bins: list[LengthBin]


@dataclass(frozen=True)
class DatasetStatistics:
    """Figures of a token file; None where neither a manifest nor a tokenizer tells, or the ids were not counted.

    bytes: of .bin and .idx. used_ids: ids that occur at least once. largest_id: -1 without tokens. eod_tokens: how
    often the end-of-document token occurs. bytes_per_token: UTF-8 bytes of the texts over all tokens. lengths: None
    where there are no documents.
    """

    prefix: str
    documents: int
    sequences: int
    tokens: int
    bytes: int
    dtype: str
    vocab_size: int | None
    used_ids: int | None
    largest_id: int | None
    eod_id: int | None
    eod_tokens: int | None
    bytes_per_token: float | None
    lengths: Lengths | None
    tokenizer_fingerprint: str | None
    tokenizer_folder: str | None
    manifest: dict | None


def tokenizer_of(prefix: str | os.PathLike, folder: str | None = None) -> Tokenizer | None:
    """The tokenizer in `folder`, which must be that of PREFIX, or the one that PREFIX names; None if there is none."""
    if folder is None:
        found = find_tokenizer(prefix)
        return None if found is None else load_tokenizer(found)
    tokenizer = load_tokenizer(folder)
    TokenFile(prefix, tokenizer_fingerprint=tokenizer.fingerprint)
    return tokenizer


def dataset_statistics(
    prefix: str | os.PathLike,
    tokenizer: Tokenizer | None = None,
    count_ids: bool = True,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> DatasetStatistics:
    """Read all of a token file and count; in memory that grows with the vocabulary alone.

    Without `count_ids` only the index is read, and what the ids tell is None. `progress` is called with the number of
    bytes of .bin that were just read. UserError for a file that does not open, and for ids that no vocabulary has.
    """
    file = TokenFile(prefix)
    lengths = _measure_lengths(file)
    counts = _count_ids(file, progress) if count_ids else None
    manifest = file.manifest or {}
    eod_id = manifest.get("options", {}).get("eod_id", tokenizer.eod_id if tokenizer else None)
    text_bytes = manifest.get("text_bytes")
    used_ids, largest_id, eod_tokens = None, file.largest_id, None
    if counts is not None:
        used = np.flatnonzero(counts)
        used_ids, largest_id = len(used), int(used[-1]) if len(used) else -1
        if eod_id is not None:
            eod_tokens = int(counts[eod_id]) if eod_id < len(counts) else 0
        if text_bytes is None and tokenizer:
            known = min(len(counts), tokenizer.vocab_size)
            text_bytes = int(tokenizer.token_bytes[:known].astype(np.int64) @ counts[:known])
    return DatasetStatistics(
        prefix=file.prefix,
        documents=file.num_documents,
        sequences=file.num_sequences,
        tokens=file.num_tokens,
        bytes=file.bin_path.stat().st_size + file.idx_path.stat().st_size,
        dtype=file.dtype.name,
        vocab_size=tokenizer.vocab_size if file.vocab_size is None and tokenizer else file.vocab_size,
        used_ids=used_ids,
        largest_id=largest_id,
        eod_id=eod_id,
        eod_tokens=eod_tokens,
        bytes_per_token=None if text_bytes is None or not file.num_tokens else text_bytes / file.num_tokens,
        lengths=lengths,
        tokenizer_fingerprint=file.tokenizer_fingerprint,
        tokenizer_folder=None if file.tokenizer_folder is None else str(file.tokenizer_folder),
        manifest=file.manifest,
    )


def _count_ids(file: TokenFile, progress: Callable[[int], None]) -> np.ndarray:
    """[largest id + 1] int64, how often each id occurs."""
    counts, start = np.zeros(0, np.int64), 0
    for chunk in read_chunks(file.bin_path, file.dtype):
        low, high = int(chunk.min()), int(chunk.max())
        if low < 0 or high >= LARGEST_VOCABULARY:
            at = int(chunk.argmin() if low < 0 else chunk.argmax())
            raise UserError(
                f"{file.bin_path}: token {start + at:,} is {chunk[at]}, which no vocabulary has: the file is damaged, "
                "or holds no token ids"
            )
        found = np.bincount(chunk, minlength=len(counts))
        found[: len(counts)] += counts
        counts, start = found, start + len(chunk)
        progress(chunk.nbytes)
    return counts


# --- lengths ----------------------------------------------------------------------------------------------------------


def _each_length(file: TokenFile) -> Iterator[np.ndarray]:
    """Tokens per document, [<= CHUNK_ENTRIES] int64 at a time; of a packed file tokens per piece."""
    if file.packing:
        yield from (lengths.astype(np.int64) for lengths in file.read_index("lengths"))
        return
    last = 0
    for ends in file.read_index("boundaries", 1):
        bounds = np.append(last, ends)
        last = int(ends[-1])
        if bounds.min() < 0 or bounds.max() > file.num_sequences or (np.diff(bounds) < 0).any():
            raise _damaged(file)
        yield np.diff(tokens_before(file, bounds))


def _damaged(file: TokenFile) -> UserError:
    return UserError(f"{file.idx_path} is damaged: see what tools/verify_dataset.py says")


def _measure_lengths(file: TokenFile) -> Lengths | None:
    """Counted in bins as a floating-point number has them, so that no length needs to be kept."""
    counts, tokens = np.zeros((2, NUM_LENGTH_BINS), np.int64)
    shortest, longest = None, 0
    for lengths in _each_length(file):
        if lengths.min() < 0 or lengths.max() >= 1 << 31:
            raise _damaged(file)
        shortest = int(lengths.min()) if shortest is None else min(shortest, int(lengths.min()))
        longest = max(longest, int(lengths.max()))
        bins = _bin_of(lengths)
        counts += np.bincount(bins, minlength=NUM_LENGTH_BINS)
        tokens += np.bincount(bins, weights=lengths, minlength=NUM_LENGTH_BINS).astype(np.int64)
    if shortest is None:
        return None
    number, cumulative = int(counts.sum()), np.cumsum(counts)
    percentiles = {}
    for percent in PERCENTILES:
        at = int(np.searchsorted(cumulative, -(-percent * number // 100)))
        percentiles[percent] = int(np.clip(_smallest_of_bin(at), shortest, longest))
    occupied = np.flatnonzero(counts)
    powers = np.frexp(_smallest_of_bin(occupied).astype(np.float64))[1]  # 0 for length 0, 1 for 1, 2 for 2 and 3 ...
    edges = [0, *(1 << power for power in range(32))]
    return Lengths(
        number=number,
        shortest=shortest,
        mean=float(tokens.sum() / number),
        longest=longest,
        percentiles=percentiles,
        bins=[
            LengthBin(
                low=edges[power],
                high=edges[power + 1] - 1,
                documents=int(counts[occupied[powers == power]].sum()),
                tokens=int(tokens[occupied[powers == power]].sum()),
            )
            for power in range(int(powers.min()), int(powers.max()) + 1)
        ],
    )


def _bin_of(lengths: np.ndarray) -> np.ndarray:
    """[n] int64: the bin of each of `lengths` [n], by the exponent and the leading bits of the mantissa."""
    exponents = np.maximum(np.frexp(lengths.astype(np.float64))[1].astype(np.int64) - MANTISSA_BITS - 1, 0)
    return (exponents << MANTISSA_BITS) + (lengths >> exponents)


def _smallest_of_bin(bins: np.ndarray | int) -> np.ndarray:
    """[n] int64: the smallest length of each of `bins` [n]; the inverse of `_bin_of`."""
    bins = np.asarray(bins, np.int64)
    exponents = np.maximum((bins >> MANTISSA_BITS) - 1, 0)
    return (bins - (exponents << MANTISSA_BITS)) << exponents


def plot_lengths(statistics: DatasetStatistics, path: str | os.PathLike) -> None:
    """Save the histogram of lengths as a PNG: documents, and the tokens in them, by powers of two."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bins = statistics.lengths.bins if statistics.lengths else []
    what = "pieces" if (statistics.manifest or {}).get("packing") else "documents"
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    positions = np.arange(len(bins))
    for values, label, shift in (
        ([one.documents for one in bins], what, -0.2),
        ([one.tokens for one in bins], "tokens in them", 0.2),
    ):
        shares = 100 * np.array(values, float) / max(sum(values), 1)
        axes.bar(positions + shift, shares, width=0.4, label=f"{label} ({sum(values):,})")
    axes.set_xticks(positions, [f"{one.low:,}" for one in bins], rotation=45, ha="right")
    axes.set_xlabel("tokens, from this number to the next")
    axes.set_ylabel("% of all")
    axes.set_title(f"Length of {what} in {Path(statistics.prefix).name}")
    axes.legend()
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise UserError(f"cannot write the histogram to {path}: {error.strerror or error}") from error
    finally:
        plt.close(figure)


# --- documents --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a document: its text, or its ids where there is no tokenizer. `cut`: there is more of it."""

    document: int
    tokens: int
    text: str
    cut: bool


def excerpts(
    prefix: str | os.PathLike, tokenizer: Tokenizer | None, count: int, at: int | None = None, characters: int = 400
) -> list[Excerpt]:
    """The beginnings of `count` documents: those from number `at` on, or, without it, spread evenly over the file.

    Up to `characters` characters of each; special tokens are spelled out, and ids that are none of the tokenizer's
    stand as <id 70000>. UserError for a document that is not there.
    """
    file = TokenFile(prefix)
    if at is not None and not 0 <= at < file.num_documents:
        there = f"0 to {file.num_documents - 1:,}" if file.num_documents else "none"
        raise UserError(f"there is no document {at} in {file.prefix}: it has {there}")
    if at is None:
        count = min(count, file.num_documents)
        numbers = [file.num_documents * i // count for i in range(count)]
    else:
        numbers = range(at, min(at + count, file.num_documents))
    found = []
    for number in numbers:
        ids = file.document(number)
        head = ids[: MAX_TOKENS_PER_CHARACTER * characters]
        text = _decode(tokenizer, head) if tokenizer else " ".join(map(str, head))
        found.append(Excerpt(number, len(ids), text[:characters], len(text) > characters or len(ids) > len(head)))
    return found


def _decode(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    known = (ids >= 0) & (ids < tokenizer.vocab_size)
    runs = np.split(ids, np.flatnonzero(known[1:] != known[:-1]) + 1)
    return "".join(
        tokenizer.decode(run.tolist(), skip_special=False)
        if 0 <= run[0] < tokenizer.vocab_size
        else "".join(f"<id {token}>" for token in run)
        for run in runs
        if run.size
    )
