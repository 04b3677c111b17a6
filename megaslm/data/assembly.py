"""From the stream of encoded documents to token files: duplicates left out, split, shuffled, packed.

The stream is in the order of the inputs (work.py). Nothing here is random but the shuffle, which is keyed by a seed,
and nothing depends on the number of workers. Memory is bounded at any size: documents are handled in chunks, what is
known of each lies in files of the work folder, and all files are read, not mapped.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megaslm.data.order import FEISTEL_ROUNDS, permute
from megaslm.data.packing import PaddingCount, best_fit_decreasing
from megaslm.data.token_range import PARTS, split_bounds
from megaslm.data.token_writer import TokenFileWriter, commit
from megaslm.data.work import KEYS, LENGTHS, TEXT_BYTES, TokenStream, read_entries, work_errors
from megaslm.errors import UserError

CHUNK_DOCUMENTS = 1 << 18
PACK_BLOCK_DOCUMENTS = 1 << 20  # documents whose pieces are packed together
MAX_PACK = 1 << 24  # far beyond any model's context, and no trouble for memory
DEDUP_KEYS = 1 << 20  # keys compared at a time: about 150 MB
BUFFER_BYTES = 1 << 22
PADDING = -1  # a piece that ends here, before the stream begins, is padding
DIGIT_BITS = 16  # of a key, sorted out at a time to find where a split cuts
KEPT, LEFT_OUT = b"\0", b"\1"
DOCUMENT = np.dtype(("<i8", 2))  # where its tokens start in the stream, and how many they are
KEYED_DOCUMENT = np.dtype(("<u8", 3))  # its key, and its number in the stream


def split_prefixes(prefix: str | os.PathLike, split: str) -> dict[str, str]:
    """PREFIX_train, PREFIX_validation and PREFIX_test, as many as `split` has shares, by the names of the parts.

    UserError for anything but two or three shares above zero.
    """
    split_bounds(split, 0)  # UserError for what are no shares
    shares = [float(share) for share in split.split(",")]
    if len(shares) < 2 or not all(shares):
        raise UserError(f"split {split!r}: give two or three shares above zero, such as 98,2 or 90,5,5")
    return {name: f"{os.fspath(prefix)}_{name}" for name in PARTS[: len(shares)]}


@dataclass(frozen=True)
class Assembly:
    """What becomes of the documents between the stream and the outputs.

    Attributes:
        dedup: of documents with the same text only the first is kept.
        split: shares of two or three outputs, such as "90,5,5"; equal texts go to the same one, whatever their order.
        shuffle_seed: documents of each output in an order that this seed decides; None: in the order of the inputs.
        pack: sequence length S: documents packed into bins of S + 1 tokens; None: documents one after another.
    """

    dedup: bool = False
    split: str | None = None
    shuffle_seed: int | None = None
    pack: int | None = None

    def __post_init__(self):
        if self.split is not None:
            split_prefixes("", self.split)
        if self.pack is not None and not 1 <= self.pack <= MAX_PACK:
            raise UserError(f"documents can't be packed into sequences of {self.pack} tokens: give 1 to {MAX_PACK:,}")

    @property
    def identity(self) -> bool:
        """Whether the stream is the output as it is."""
        return self == Assembly()

    @property
    def needs_keys(self) -> bool:
        """Whether the stream must have a key for each document's text."""
        return self.dedup or self.split is not None

    def check_padding(self, eod_id: int | None) -> None:
        """UserError if documents are to be packed and there is nothing to fill sequences up with."""
        if self.pack is not None and eod_id is None:
            raise UserError(
                "packing fills sequences up with end-of-document tokens: the tokenizer needs one, and it must be "
                "appended"
            )

    def prefixes(self, prefix: str) -> list[str]:
        """PREFIX of each output: PREFIX_train, PREFIX_validation and PREFIX_test of a split, else PREFIX."""
        return [prefix] if self.split is None else list(split_prefixes(prefix, self.split).values())


def assemble(
    stream: TokenStream,
    assembly: Assembly,
    prefixes: Sequence[str],
    *,
    vocab_size: int,
    tokenizer: dict,
    eod_id: int | None,
    facts: dict,
    overwrite: bool = False,
    before_commit: Callable[[], None] = lambda: None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[dict]:
    """Write the outputs at `prefixes` (see `Assembly.prefixes`) from a finished stream; return their manifests.

    All outputs are on the disk, index and manifest too, before the first gets its final name. The stream is not
    changed: after a failure the same call starts over.

    Args:
        tokenizer: {"fingerprint", "vocab_size", "folder"} of the manifests.
        eod_id: the end-of-document token that stands behind every document; packing needs one, as padding.
        facts: for every manifest; `text_bytes` (where the stream has them) and `assembly` are those of the output.
        overwrite: replace token files at `prefixes`.
        before_commit: called once all is on the disk, before the first output gets its final name.
        progress: called with the number of tokens that were just written, some millions at a time.

    The caller holds the `output_lock` of the one output; those of a split are locked here. UserError if a part of the
    split is empty, or a disk refuses.
    """
    assembly.check_padding(eod_id)
    work = stream.tokens_path.parent
    folder = work / "assembly"
    with work_errors(work), contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        documents = _Documents(stream, folder)
        if assembly.dedup:
            documents.leave_out_duplicates()
        parts = documents.list_parts(assembly.split)
        tokens = stack.enter_context(open(stream.tokens_path, "rb", buffering=0))
        outputs = []
        for number, (prefix, part) in enumerate(zip(prefixes, parts, strict=True)):
            writer = stack.enter_context(
                TokenFileWriter(
                    prefix,
                    vocab_size,
                    tokenizer["fingerprint"],
                    tokenizer["folder"],
                    dtype=stream.dtype,
                    boundaries=assembly.pack is not None,
                    locked=assembly.split is None,
                    overwrite=overwrite,
                )
            )
            output = _Output(tokens, writer, eod_id, assembly.pack, progress)
            keys = None if assembly.shuffle_seed is None else _shuffle_keys(assembly.shuffle_seed, number)
            for chunk in part.in_order(keys):
                output.add(chunk[:, 0], chunk[:, 1])
            output.close()
            options = {
                "dedup": assembly.dedup,
                "duplicates": documents.num_left_out,
                "split": assembly.split,
                "part": part.name,
                "shuffle_seed": assembly.shuffle_seed,
                "pack": assembly.pack,
            }
            own = {"text_bytes": part.text_bytes, "packing": output.packing}
            own = {key: value for key, value in own.items() if value is not None}
            outputs.append((writer, {**facts, "assembly": options, **own}))
        files = [writer.prepare(**known) for writer, known in outputs]
        before_commit()
        commit(files)
    return [file.manifest for file in files]


def _shuffle_keys(seed: int, part: int) -> np.ndarray:
    """[FEISTEL_ROUNDS] uint64, as those of the orders of samples."""
    digest = hashlib.blake2b(f"megaslm documents/{seed}/{part}".encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


# --- which documents --------------------------------------------------------------------------------------------------


def _chunks(number: int, size: int | None = None) -> Iterator[tuple[int, int]]:
    size = size or CHUNK_DOCUMENTS
    return ((start, min(start + size, number)) for start in range(0, number, size))


@dataclass(frozen=True)
class _Part:
    """Documents of one output, in the order of the stream, in the file `path` of DOCUMENTs.

    name: of the part of the split, or None. text_bytes: UTF-8 bytes of all their texts; None: the stream has none.
    """

    path: Path
    name: str | None
    number: int
    text_bytes: int | None

    def in_order(self, keys: np.ndarray | None) -> Iterator[np.ndarray]:
        """[<= CHUNK_DOCUMENTS, 2] starts and lengths, in the order of the output: permuted by `keys`, or as listed."""
        with open(self.path, "rb", buffering=0) as file:
            for start, stop in _chunks(self.number):
                if keys is None:
                    yield read_entries(self.path, DOCUMENT, start, stop)
                else:
                    places = DOCUMENT.itemsize * permute(np.arange(start, stop), self.number, keys)
                    found = [os.pread(file.fileno(), DOCUMENT.itemsize, place) for place in places.tolist()]
                    yield np.frombuffer(b"".join(found), DOCUMENT)


class _Documents:
    """The documents of the stream, chunk by chunk; `folder` is for lists of them."""

    def __init__(self, stream: TokenStream, folder: Path):
        self.stream, self.folder = stream, folder
        self.num_left_out = 0
        self._marks = folder / "marks"  # a byte for each document, once duplicates are left out

    def leave_out_duplicates(self) -> None:
        """Leave out every document whose key has come before.

        Keys are hashes: buckets of those that begin alike hold about equally many distinct ones, DEDUP_KEYS at most,
        so that one bucket after another fits into memory.
        """
        number = self.stream.num_documents
        num_buckets = number // DEDUP_KEYS + 1
        buckets = [self.folder / f"bucket-{i}" for i in range(num_buckets)]
        with open(self._marks, "wb") as marks:
            for start, stop in _chunks(number):
                marks.write(KEPT * (stop - start))
                keys = self.stream.read(KEYS, start, stop)
                bucket = ((keys[:, 1] >> np.uint64(32)) * np.uint64(num_buckets) >> np.uint64(32)).astype(np.int64)
                keyed = np.column_stack([keys, np.arange(start, stop, dtype=np.uint64)])
                keyed = keyed[np.argsort(bucket, kind="stable")]
                ends = np.cumsum(np.bincount(bucket, minlength=num_buckets))
                # Opened again for each chunk: there may be more buckets than a process may have files open.
                for path, entries in zip(buckets, np.split(keyed, ends[:-1]), strict=True):
                    with open(path, "ab") as file:
                        file.write(entries.tobytes())
        with open(self._marks, "r+b", buffering=0) as marks:
            for path in filter(Path.exists, buckets):
                for repeated in _repeated(path):
                    for place in repeated.tolist():
                        os.pwrite(marks.fileno(), LEFT_OUT, place)
                    self.num_left_out += len(repeated)
                path.unlink()

    def _kept(self, start: int, stop: int) -> np.ndarray:
        """[stop - start] bool: which of the documents [start, stop) are not left out."""
        if not self.num_left_out:
            return np.ones(stop - start, bool)
        return read_entries(self._marks, np.dtype(np.uint8), start, stop) == ord(KEPT)

    def list_parts(self, split: str | None) -> list[_Part]:
        """The documents of each part of `split` that are not left out, or all these; UserError for an empty part."""
        names = [None] if split is None else list(split_prefixes("", split))
        cuts = np.array([] if split is None else self._find_cuts(split), np.uint64)
        paths = [self.folder / f"part-{number}" for number in range(len(names))]
        counts, text_bytes = [0] * len(names), [0] * len(names)
        has_text_bytes, end = self.stream.has(TEXT_BYTES), 0
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, "wb")) for path in paths]
            for start, stop in _chunks(self.stream.num_documents):
                lengths = self.stream.read(LENGTHS, start, stop).astype(np.int64)
                ends = end + np.cumsum(lengths)
                end = int(ends[-1])
                documents, kept = np.column_stack([ends - lengths, lengths]), self._kept(start, stop)
                part_of = np.zeros(stop - start, np.int64)
                if split is not None:
                    # The first key at or over a cut is the next part's; equal texts are never torn apart.
                    part_of = np.searchsorted(cuts, self.stream.read(KEYS, start, stop)[:, 0], side="right")
                sizes = self.stream.read(TEXT_BYTES, start, stop) if has_text_bytes else None
                for part, file in enumerate(files):
                    here = kept & (part_of == part)
                    file.write(documents[here].tobytes())
                    counts[part] += int(np.count_nonzero(here))
                    text_bytes[part] += int(sizes[here].sum(dtype=np.int64)) if has_text_bytes else 0
        assert end == self.stream.num_tokens, f"documents of {end} tokens in a stream of {self.stream.num_tokens}"
        if split is not None and not all(counts):
            raise UserError(
                f"the {names[counts.index(0)]} part of split {split} is empty: {sum(counts):,} documents are too few "
                "for it; give it a larger share, or more documents"
            )
        return [
            _Part(path, name, count, size if has_text_bytes else None)
            for path, name, count, size in zip(paths, names, counts, text_bytes, strict=True)
        ]

    def _find_cuts(self, split: str) -> list[int]:
        """First halves of the keys at which the parts behind the first begin, by the ranks of all that are kept."""
        kept = self.stream.num_documents - self.num_left_out
        return [self._key_at(bound) for bound in split_bounds(split, kept)[1:-1] if bound < kept]

    def _key_at(self, rank: int) -> int:
        """The first half of the key that has `rank` smaller ones, equal ones counted, among documents not left out.

        Found digit by digit, by counting, so that memory does not depend on how often a key is there.
        """
        found = 0
        for shift in range(64 - DIGIT_BITS, -1, -DIGIT_BITS):
            counts = np.zeros(1 << DIGIT_BITS, np.int64)
            for start, stop in _chunks(self.stream.num_documents):
                digits = self.stream.read(KEYS, start, stop)[self._kept(start, stop), 0] >> np.uint64(shift)
                digits = digits - np.uint64(found << DIGIT_BITS) if found else digits
                counts += np.bincount(digits[digits < len(counts)].astype(np.int64), minlength=len(counts))
            before = np.cumsum(counts) - counts
            digit = int(np.searchsorted(before, rank, side="right")) - 1
            rank -= int(before[digit])
            found = (found << DIGIT_BITS) + digit
        return found


def _repeated(path: Path) -> Iterator[np.ndarray]:
    """Numbers of the documents, of those in a file of KEYED_DOCUMENTs, ascending, whose key an earlier one has."""
    distinct = np.empty((0, 3), np.uint64)
    for start, stop in _chunks(path.stat().st_size // KEYED_DOCUMENT.itemsize, DEDUP_KEYS):
        entries = np.concatenate([distinct, read_entries(path, KEYED_DOCUMENT, start, stop)])
        order = np.lexsort((entries[:, 0], entries[:, 1]))  # stable: of equal keys the first document comes first
        repeated = np.zeros(len(entries), bool)
        repeated[order[1:]] = (entries[order[1:], :2] == entries[order[:-1], :2]).all(axis=1)
        yield entries[repeated, 2]
        distinct = entries[~repeated]


# --- their tokens -----------------------------------------------------------------------------------------------------


class _Output:
    """Documents to one token file, as they are or packed.

    Attributes:
        packing: for the manifest, after `close`; None where documents are not packed.
    """

    def __init__(
        self,
        tokens: BinaryIO,
        writer: TokenFileWriter,
        eod_id: int | None,
        pack: int | None,
        progress: Callable[[int], None],
    ):
        self.writer = writer
        self.packing: dict | None = None
        self._bin_length = None if pack is None else pack + 1
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []  # starts and lengths of documents to be packed
        self._num_waiting = self._num_documents = self._num_cut = 0
        padding = None if pack is None else PaddingCount(pack + 1, eod_id)
        self._copy = _PieceCopy(tokens, writer, eod_id, padding, progress)

    def add(self, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Documents of `lengths` [n] tokens from `starts` [n] in the stream."""
        self._num_documents += len(lengths)
        if self._bin_length is None:
            self._copy.pieces(starts, lengths)
            self.writer.add_sequences(lengths)
            return
        self._waiting.append((starts, lengths))
        self._num_waiting += len(lengths)
        if self._num_waiting >= PACK_BLOCK_DOCUMENTS:
            self._pack()

    def close(self) -> None:
        """What still waits is written."""
        if self._bin_length is not None:
            self._pack()
        self._copy.flush()
        if self._bin_length is not None:
            self.packing = {
                "length": self._bin_length,
                "bins": self.writer.num_documents,
                "padding": self._copy.padding.padding,
                "documents": self._num_documents,
                "cut_documents": self._num_cut,
                "eod_id": self._copy.eod_id,
            }

    def _pack(self) -> None:
        """Documents that wait become bins: full ones of those longer than a bin, then the rest, best fit."""
        if not self._waiting:
            return
        starts, lengths = (np.concatenate(column) for column in zip(*self._waiting, strict=True))
        self._waiting, self._num_waiting = [], 0
        length = self._bin_length
        full = lengths // length
        self._num_cut += int(np.count_nonzero(lengths > length))
        self._write_full(starts, full)
        rest = lengths - full * length
        short = np.flatnonzero(rest)
        starts, lengths = (starts + full * length)[short], rest[short]
        pieces, counts = best_fit_decreasing(lengths, length)
        starts, lengths = starts[pieces], lengths[pieces]
        ends = np.cumsum(counts)
        room = length - np.add.reduceat(lengths, ends - counts) if len(counts) else counts
        padded = np.flatnonzero(room)
        lengths = np.insert(lengths, ends[padded], room[padded])
        starts = np.insert(starts, ends[padded], PADDING - room[padded])
        self._copy.pieces(starts, lengths)
        self.writer.add_sequences(lengths)
        self.writer.add_documents(counts + (room > 0))

    def _write_full(self, starts: np.ndarray, full: np.ndarray) -> None:
        """`full` [n] bins of the tokens of each of the documents from `starts` [n]."""
        ends = np.cumsum(full)
        total = int(ends[-1])
        self._copy.pieces(starts[full > 0], full[full > 0] * self._bin_length)
        for first in range(0, total, CHUNK_DOCUMENTS):
            count = min(CHUNK_DOCUMENTS, total - first)
            self.writer.add_sequences(np.full(count, self._bin_length))
            self.writer.add_documents(np.ones(count, np.int64))


class _PieceCopy:
    """Pieces of the stream, whose tokens are in the file `tokens`, to a token file, through one buffer."""

    def __init__(
        self,
        tokens: BinaryIO,
        writer: TokenFileWriter,
        eod_id: int | None,
        padding: PaddingCount | None,
        progress: Callable[[int], None],
    ):
        self.writer, self.eod_id, self.padding, self._progress = writer, eod_id, padding, progress
        self._file = tokens
        self._buffer = np.empty(BUFFER_BYTES // writer.dtype.itemsize, writer.dtype)
        self._bytes = memoryview(self._buffer).cast("B")
        self._filled = 0

    def pieces(self, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Append `lengths` [n] tokens from `starts` [n]; a start below zero stands for padding."""
        if not len(starts):
            return
        # Pieces that adjoin in the stream are read at once.
        first = np.flatnonzero(np.append(True, starts[1:] != starts[:-1] + lengths[:-1]))
        for start, count in zip(starts[first].tolist(), np.add.reduceat(lengths, first).tolist(), strict=True):
            while count:
                tokens = min(count, len(self._buffer) - self._filled)
                self._read(start, tokens)
                start, count = start + tokens, count - tokens
                if self._filled == len(self._buffer):
                    self.flush()

    def _read(self, start: int, tokens: int) -> None:
        end = self._filled + tokens
        if start < 0:
            self._buffer[self._filled : end] = self.eod_id
        else:
            size = self._buffer.itemsize
            self._file.seek(start * size)
            at = self._filled * size
            while at < end * size:
                read = self._file.readinto(self._bytes[at : end * size])
                assert read, f"the stream ends before token {start + tokens}"
                at += read
        self._filled = end

    def flush(self) -> None:
        """What is still in the buffer is written."""
        ids = self._buffer[: self._filled]
        self.writer.add_tokens(ids)
        if self.padding:
            self.padding.add(ids)
        self._progress(len(ids))
        self._filled = 0
