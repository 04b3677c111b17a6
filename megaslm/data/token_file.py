"""Token files: PREFIX.bin and PREFIX.idx in Megatron's indexed format, byte for byte, and our PREFIX.json beside them.

.bin holds the token ids back to back, C order, no header. .idx is little-endian without padding:

    offset          bytes   field
    0               9       MMIDIDX\\0\\0
    9               8       version, u64 = 1
    17              1       dtype code (DTYPES)
    18              8       S, number of sequences, u64
    26              8       D + 1, length of the document array, u64
    34              4 S     sequence lengths in tokens, int32
    34 +  4 S       8 S     byte offset of each sequence in .bin, int64
    34 + 12 S       8 (D+1) document boundaries as sequence numbers, int64; the first is 0, the last is S

PREFIX.json, the manifest, is optional for a reader: files of Megatron-LM and GPT-NeoX open without it. With it, a file
that was cut short, or tokenized with another tokenizer, is an error when it is opened instead of a strange loss later.
"""

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megaslm.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, S, D + 1
# Code 6 is float64 and 7 is float32: the format has them, tokens do not.
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
DTYPE_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
UINT16_VOCAB_LIMIT = 65_500  # Megatron's limit: vocabularies from here on are stored as int32

MANIFEST_FORMAT = "megaslm token file"
MANIFEST_VERSION = 1
TOKENIZER_SUFFIX = ".tokenizer"  # the folder PREFIX.tokenizer is a copy of the tokenizer, see builder.py
MANIFEST_FORM = {  # what readers rely on; a key with ? need not be there, and further ones may be
    "dtype": str,
    "documents": int,
    "tokens": int,
    "largest_id": int,
    "tokenizer": {"fingerprint": str | None, "vocab_size": int | None, "folder?": str | None},
    "bin_bytes": int,
    "idx_bytes": int,
    "bin_sha256?": str,
    "idx_sha256?": str,
    "fingerprint": str,
    "packing?": {"length": int, "bins": int, "padding": int, "eod_id": int},
    "options?": {"eod_id?": int | None},
    "sources?": [{"name": str, "bytes": int | None}],
    "merged?": [{"name": str}],
    "text_bytes?": int,
    "mapped_characters?": int,
}

CHUNK_ENTRIES = 1 << 20  # index entries handled at a time: 8 MiB of offsets
CHUNK_BYTES = 1 << 22
FINGERPRINT_BLOCKS = 64
FINGERPRINT_BLOCK_BYTES = 1 << 16


def token_dtype(vocab_size: int) -> np.dtype:
    """Width in which ids of this vocabulary are stored: uint16 below 65,500 tokens, else int32."""
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCAB_LIMIT else np.int32)


def file_paths(prefix: str | os.PathLike) -> tuple[Path, Path, Path]:
    """The .bin, .idx and .json of a PREFIX. (Appended, not with_suffix: a PREFIX may contain dots.)"""
    prefix = os.fspath(prefix)
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


def content_fingerprint(bin_path: Path, idx_path: Path) -> str:
    """A quick identity of the content: BLAKE2b over the sizes and up to 64 evenly spread blocks of 64 KiB of each file.

    It tells corpora apart in milliseconds at any size, with or without a manifest; every byte is `verify`'s business.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in (bin_path, idx_path):
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        last = max(size - FINGERPRINT_BLOCK_BYTES, 0)
        with open(path, "rb") as file:
            for offset in sorted({last * i // (FINGERPRINT_BLOCKS - 1) for i in range(FINGERPRINT_BLOCKS)}):
                file.seek(offset)
                digest.update(file.read(FINGERPRINT_BLOCK_BYTES))
    return digest.hexdigest()


def read_manifest(path: Path) -> dict | None:
    """The manifest at `path`, None if there is no such file; UserError if it is not one of ours or is incomplete."""
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as a manifest ({error}); build PREFIX again or move it away") from None
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise UserError(f'{path} is no manifest of ours (no "format": "{MANIFEST_FORMAT}"); move it away')
    if manifest.get("version") != MANIFEST_VERSION:
        raise UserError(
            f"{path} has manifest version {manifest.get('version')}, this megaslm reads {MANIFEST_VERSION}; "
            "build the token file again, or use the megaslm that wrote it"
        )
    if fault := _fault(manifest, MANIFEST_FORM):
        raise UserError(f"{path} {fault}; build the token file again")
    return manifest


def _fault(value: Any, form: Any, name: str = "") -> str | None:
    """What is wrong about a JSON value; None if it has the form: a type, {key: form} or [form]."""
    kind = form if not isinstance(form, dict | list) else type(form)
    if not isinstance(value, kind) or isinstance(value, bool):
        return f"says {name} {json.dumps(value)}, which is not of type {getattr(kind, '__name__', kind)}"
    faults: Iterator[str | None] = iter(())
    if isinstance(form, list):
        faults = (_fault(item, form[0], f"{name}[{number}]") for number, item in enumerate(value))
    elif isinstance(form, dict):
        faults = (_key_fault(value, key, inner, f"{name}." if name else "") for key, inner in form.items())
    return next(filter(None, faults), None)


def _key_fault(value: dict, key: str, form: Any, path: str) -> str | None:
    required, key = not key.endswith("?"), key.removesuffix("?")
    if key in value:
        return _fault(value[key], form, path + key)
    return f"lacks {path}{key}" if required else None


@contextlib.contextmanager
def read_errors(path: str | os.PathLike) -> Iterator[None]:
    """A file that may not be read, or a disk that fails, is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename or path}: {error.strerror or error}; mend that, or give another PREFIX"
        ) from error


class TokenFile:
    """A PREFIX opened for reading: everything is memory-mapped, and opening costs the same at any size.

    Checked on opening, each fault a UserError that names file and figure: header, version and dtype; the size of .idx
    against its counts; first and last index entries against the size of .bin; first and last document boundary;
    sizes and counts of the manifest, where there is one; and, where `tokenizer_fingerprint` is given and the manifest
    has one, that they are the same. `verify` reads everything.

    Attributes:
        tokens: [num_tokens] ids in their stored width, the whole stream.
        sequence_lengths: [num_sequences] int32, tokens.
        sequence_offsets: [num_sequences] int64, bytes into .bin.
        document_boundaries: [num_documents + 1] int64, sequence numbers.
        manifest: the content of PREFIX.json, or None.

    The arrays of the index are not aligned in the file: a slice of them is a view, but fancy indexing and functions
    such as np.searchsorted copy a misaligned array whole. `token_bounds` reads only what it needs.
    """

    def __init__(self, prefix: str | os.PathLike, tokenizer_fingerprint: str | None = None):
        self.prefix = os.fspath(prefix)
        self.bin_path, self.idx_path, self.manifest_path = file_paths(self.prefix)
        self._fingerprint: str | None = None
        with read_errors(self.prefix):
            for path in (self.bin_path, self.idx_path):
                if not path.is_file():
                    name, ending = os.path.splitext(self.prefix)
                    hint = f"; PREFIX has no ending: try {name}" if ending in (".bin", ".idx", ".json") else ""
                    raise UserError(
                        f"token file {path} does not exist; give the PREFIX of a .bin and an .idx, as written by "
                        f"tools/preprocess_data.py{hint}"
                    )
            self._open_index()
            self._open_tokens()
        self.manifest = read_manifest(self.manifest_path)
        if self.manifest is not None:
            self._check_manifest(self.manifest, tokenizer_fingerprint)

    def _open_index(self) -> None:
        path = self.idx_path
        size = path.stat().st_size
        if size < HEADER.size:
            raise UserError(f"{path} has {size} bytes, less than its header of {HEADER.size}: it is cut short")
        # Plain views, here and of the tokens: indexing an np.memmap itself is several times slower.
        buffer = np.asarray(np.memmap(path, mode="r", dtype=np.uint8))
        magic, version, code, num_sequences, num_boundaries = HEADER.unpack(buffer[: HEADER.size].tobytes())
        if magic != MAGIC:
            raise UserError(f"{path} is not a token index: it starts with {magic!r} instead of {MAGIC!r}")
        if version != VERSION:
            raise UserError(f"{path} has format version {version}; only version {VERSION} is known")
        if code not in DTYPES:
            raise UserError(f"{path} has dtype code {code}; token ids are stored as one of {sorted(DTYPES)}")
        expected = HEADER.size + 12 * num_sequences + 8 * num_boundaries
        if num_sequences and size == expected + num_sequences:
            raise UserError(f"{path} ends with modes: it is a multimodal file, and only text is trained on")
        if size != expected or num_boundaries < 1:
            raise UserError(
                f"{path} has {size:,} bytes, but {num_sequences:,} sequences and {num_boundaries:,} document "
                f"boundaries take {expected:,}: it is cut short or damaged"
            )
        self.dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        self.num_sequences, self.num_documents = num_sequences, num_boundaries - 1
        ends = [HEADER.size + size * num_sequences for size in (0, 4, 12)]
        self._columns = {  # type, number of entries, and the byte where they start
            "lengths": ("<i4", num_sequences, ends[0]),
            "offsets": ("<i8", num_sequences, ends[1]),
            "boundaries": ("<i8", num_boundaries, ends[2]),
        }
        self.sequence_lengths = np.frombuffer(buffer, *self._columns["lengths"])
        self.sequence_offsets = np.frombuffer(buffer, *self._columns["offsets"])
        self.document_boundaries = np.frombuffer(buffer, *self._columns["boundaries"])
        self._offset_bytes = buffer[ends[1] : ends[2]].reshape(-1, 8)
        first, last = int(self.document_boundaries[0]), int(self.document_boundaries[-1])
        if first != 0 or last != num_sequences:
            raise UserError(
                f"{path}: the document boundaries run from {first:,} to {last:,} instead of 0 to {num_sequences:,} "
                "sequences: it is damaged"
            )

    def _open_tokens(self) -> None:
        size, itemsize = self.bin_path.stat().st_size, self.dtype.itemsize
        end = 0
        if self.num_sequences:
            if int(self.sequence_offsets[0]) != 0:
                raise UserError(f"{self.idx_path}: the first sequence starts at byte {self.sequence_offsets[0]}, not 0")
            end = int(self.sequence_offsets[-1]) + int(self.sequence_lengths[-1]) * itemsize
        if size != end or size % itemsize:
            raise UserError(
                f"{self.bin_path} has {size:,} bytes, but by its index it ends at byte {end:,} ({itemsize} bytes a "
                "token): the one or the other is cut short or from another build"
            )
        self.num_tokens = size // itemsize
        # An empty file cannot be mapped.
        self.tokens = np.empty(0, self.dtype)
        if size:
            self.tokens = np.asarray(np.memmap(self.bin_path, mode="r", dtype=self.dtype))

    def _check_manifest(self, manifest: dict, tokenizer_fingerprint: str | None) -> None:
        figures = {
            "dtype": self.dtype.name,
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "bin_bytes": self.bin_path.stat().st_size,
            "idx_bytes": self.idx_path.stat().st_size,
        }
        for key, found in figures.items():
            if manifest[key] != found:
                raise UserError(
                    f"{self.manifest_path} says {key} {manifest[key]}, but {self.prefix}.bin and .idx have {found}: "
                    "they are from different builds or damaged; build the token file again"
                )
        if (packing := manifest.get("packing")) and packing["bins"] * packing["length"] != self.num_tokens:
            raise UserError(
                f"{self.manifest_path} says {packing['bins']} bins of {packing['length']} tokens, but {self.bin_path} "
                f"has {self.num_tokens} tokens; pack it again"
            )
        stored = self.tokenizer_fingerprint
        if tokenizer_fingerprint is not None and stored is not None and stored != tokenizer_fingerprint:
            raise UserError(
                f"{self.prefix} was tokenized with another tokenizer (fingerprint {stored}, yours is "
                f"{tokenizer_fingerprint}): give its tokenizer, or preprocess the text again"
            )

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Fingerprint of the tokenizer that wrote the file; None without a manifest, or where that names none."""
        return self.manifest["tokenizer"]["fingerprint"] if self.manifest else None

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where the manifest says that the tokenizer lies; None if it does not say. Nothing is checked."""
        folder = self.manifest["tokenizer"].get("folder") if self.manifest else None
        return None if folder is None else self.manifest_path.parent / folder

    @property
    def vocab_size(self) -> int | None:
        """Vocabulary of the tokenizer that wrote the file; None without a manifest."""
        return self.manifest["tokenizer"]["vocab_size"] if self.manifest else None

    @property
    def largest_id(self) -> int | None:
        """Largest token id in the file; None without a manifest."""
        return self.manifest["largest_id"] if self.manifest else None

    @property
    def packing(self) -> dict | None:
        """{"length": tokens of a bin, "bins", "padding" ...} where documents are bins of equal length, else None."""
        return self.manifest.get("packing") if self.manifest else None

    @property
    def fingerprint(self) -> str:
        """`content_fingerprint` of the files as they are now; UserError if the manifest has another."""
        if self._fingerprint is None:
            with read_errors(self.prefix):
                self._fingerprint = content_fingerprint(self.bin_path, self.idx_path)
            if self.manifest and self.manifest["fingerprint"] != self._fingerprint:
                raise UserError(
                    f"the content of {self.prefix}.bin and .idx (fingerprint {self._fingerprint}) is not what "
                    f"{self.manifest_path} describes ({self.manifest['fingerprint']}): build the token file again"
                )
        return self._fingerprint

    def token_bound(self, sequence: int) -> int:
        """Number of tokens that stand before sequence `sequence`; `num_sequences` gives `num_tokens`."""
        if sequence == self.num_sequences:
            return self.num_tokens
        return int(self.sequence_offsets[sequence]) // self.dtype.itemsize

    def token_bounds(self, sequences: np.ndarray) -> np.ndarray:
        """[n] int64: `token_bound` of each of `sequences` [n]."""
        sequences = np.asarray(sequences, np.int64)
        bounds = np.full(len(sequences), self.num_tokens, np.int64)
        inside = sequences < self.num_sequences
        # Bytes are always aligned, so that this gathers 8 bytes for each number and leaves the rest of the file alone.
        bounds[inside] = self._offset_bytes[sequences[inside]].view("<i8")[:, 0] // self.dtype.itemsize
        return bounds

    def read_index(self, column: str, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Entries [start, stop) of the "lengths", "offsets" or "boundaries", up to CHUNK_ENTRIES at a time.

        As `read_chunks` does: in order, in arrays that last until the next one, without mapping a page.
        """
        dtype, count, offset = self._columns[column]
        stop = count if stop is None else min(stop, count)
        return read_chunks(self.idx_path, np.dtype(dtype), start, stop, offset=offset, entries=CHUNK_ENTRIES)

    def sequence(self, index: int) -> np.ndarray:
        """Tokens of one sequence, a view."""
        start = self.token_bound(index)
        return self.tokens[start : start + int(self.sequence_lengths[index])]

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, which may span several sequences, a view."""
        first, last = (int(bound) for bound in self.document_boundaries[index : index + 2])
        return self.tokens[self.token_bound(first) : self.token_bound(last)]


def verify(
    prefix: str | os.PathLike,
    vocab_size: int | None = None,
    tokenizer_fingerprint: str | None = None,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> TokenFile:
    """Read all of a token file and check every figure: offsets, lengths, boundaries, ids, and the manifest's hashes.

    Ids must lie in [0, vocab_size); the vocabulary is the manifest's where `vocab_size` is not given. The tokenizer
    must be the one with `tokenizer_fingerprint`, where the manifest names one. `progress` is called with the number of
    bytes of .bin that were just read.

    Returns the opened file; the first fault found is a UserError that names file and figure. Runs at disk speed, in
    memory that does not grow with the file.
    """
    file = TokenFile(prefix, tokenizer_fingerprint)
    verify_index(file)
    sha256 = _verify_tokens(file, file.vocab_size if vocab_size is None else vocab_size, progress)
    if file.manifest is not None:
        check_sha256(file, file.bin_path, "bin_sha256", sha256)
        _ = file.fingerprint
    return file


def verify_index(file: TokenFile) -> None:
    """The part of `verify` that does not read the tokens: offsets, lengths, boundaries, and the hash of .idx."""
    _verify_sequences(file)
    _verify_documents(file)
    if file.manifest is not None:
        sha256 = hashlib.sha256()
        for chunk in read_chunks(file.idx_path, np.dtype(np.uint8)):
            sha256.update(chunk)
        check_sha256(file, file.idx_path, "idx_sha256", sha256.hexdigest())


def check_sha256(file: TokenFile, path: Path, key: str, found: str) -> None:
    """UserError if the manifest says another SHA-256 than was `found` of the file at `path`."""
    if found != file.manifest.get(key):
        raise UserError(
            f"{path} has SHA-256 {found}, the manifest says {file.manifest.get(key)}: its content was altered; "
            "build the token file again"
        )


def _verify_sequences(file: TokenFile) -> None:
    """Each sequence starts where the one before it ends."""
    first = end = 0
    for lengths, offsets in zip(file.read_index("lengths"), file.read_index("offsets"), strict=True):
        lengths = lengths.astype(np.int64)
        ends = end + np.cumsum(lengths) * file.dtype.itemsize
        starts = ends - lengths * file.dtype.itemsize
        wrong = np.flatnonzero((lengths < 0) | (offsets != starts))
        if wrong.size:
            i = wrong[0]
            raise UserError(
                f"{file.idx_path}: sequence {first + i} has {lengths[i]} tokens from byte {offsets[i]}; it should "
                f"start at byte {starts[i]}, where the one before it ends"
            )
        first, end = first + len(lengths), int(ends[-1])


def _verify_documents(file: TokenFile) -> None:
    """Boundaries never fall, and every bin of a packed file is full."""
    first = last = 0
    for ends in file.read_index("boundaries", 1):
        bounds = np.append(last, ends)
        wrong = np.flatnonzero(np.diff(bounds) < 0)
        if wrong.size:
            i = wrong[0]
            raise UserError(
                f"{file.idx_path}: document {first + i} runs from sequence {bounds[i]} back to {bounds[i + 1]}"
            )
        if file.packing:
            tokens = np.diff(tokens_before(file, bounds))
            wrong = np.flatnonzero(tokens != file.packing["length"])
            if wrong.size:
                i = wrong[0]
                raise UserError(
                    f"{file.idx_path}: bin {first + i} has {tokens[i]} tokens, but {file.manifest_path} says that the "
                    f"file is packed into bins of {file.packing['length']}; pack it again"
                )
        first, last = first + len(ends), int(ends[-1])


def tokens_before(file: TokenFile, sequences: np.ndarray) -> np.ndarray:
    """As `token_bounds` of ascending `sequences` [n], by reading all that lies between them in order."""
    tokens = np.full(len(sequences), file.num_tokens, np.int64)
    at = int(sequences[0])
    for offsets in file.read_index("offsets", at, int(sequences[-1]) + 1):
        here = slice(*np.searchsorted(sequences, [at, at + len(offsets)]))
        tokens[here] = offsets[sequences[here] - at] // file.dtype.itemsize
        at += len(offsets)
    return tokens


def _verify_tokens(file: TokenFile, vocab_size: int | None, progress: Callable[[int], None]) -> str:
    """Ids lie in the vocabulary, and the largest is the manifest's. Returns the SHA-256 of .bin."""
    sha256, start, largest = hashlib.sha256(), 0, -1
    for chunk in read_chunks(file.bin_path, file.dtype):
        sha256.update(chunk)
        low, high = int(chunk.min()), int(chunk.max())
        if low < 0:
            raise UserError(f"{file.bin_path}: token {start + int(chunk.argmin()):,} is {low}, below zero")
        if vocab_size is not None and high >= vocab_size:
            raise UserError(
                f"{file.bin_path}: token {start + int(chunk.argmax()):,} is {high}, outside the vocabulary of "
                f"{vocab_size:,} tokens: it was written with another tokenizer"
            )
        start, largest = start + chunk.size, max(largest, high)
        progress(chunk.nbytes)
    if file.largest_id not in (None, largest):
        raise UserError(
            f"{file.manifest_path} says largest_id {file.largest_id}, but that of {file.bin_path} is {largest}: the "
            "one or the other was altered; build the token file again"
        )
    return sha256.hexdigest()


def read_chunks(
    path: Path,
    dtype: np.dtype,
    start: int = 0,
    stop: int | None = None,
    *,
    offset: int = 0,
    entries: int | None = None,
) -> Iterator[np.ndarray]:
    """Entries [start, stop) of those that begin at byte `offset` of the file, in order.

    They come as arrays of `dtype` and up to `entries` of them (None: 4 MiB), which last until the next one. Read
    instead of mapped: pages of a mapped file count as memory of the process. UserError where the disk fails.
    """
    buffer = np.empty(entries or CHUNK_BYTES // dtype.itemsize, dtype)
    with read_errors(path), open(path, "rb") as file:
        file.seek(offset + start * dtype.itemsize)
        while stop is None or start < stop:
            size = file.readinto(buffer[: None if stop is None else stop - start].view(np.uint8))
            if not size:
                break
            start += size // dtype.itemsize
            yield buffer[: size // dtype.itemsize]
