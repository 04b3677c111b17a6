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
import secrets
import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megaslm.errors import UserError
from megaslm.files import sync_folder

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
MANIFEST_KEYS = ("dtype", "documents", "tokens", "largest_id", "tokenizer", "bin_bytes", "idx_bytes", "fingerprint")

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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


# --- writing ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _disk_errors(prefix: str) -> Iterator[None]:
    """A full disk or a forbidden folder is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write token files {prefix}.*: {error.strerror or error}") from error


class TokenFileWriter:
    """Writes PREFIX.bin, PREFIX.idx and PREFIX.json, one sequence per document.

    Tokens stream to hidden temporary files; memory grows by 4 bytes per document and not with the tokens. `finish`
    fsyncs, then renames .bin, .idx and, last, .json into place. Leaving the `with` block without it removes the
    temporary files and leaves an older finished PREFIX as it was.

        with TokenFileWriter("data/train", vocab_size=32000, tokenizer_fingerprint=tokenizer.fingerprint) as writer:
            writer.extend(list_of_arrays)
            manifest = writer.finish(text_bytes=12345)
    """

    def __init__(
        self,
        prefix: str | os.PathLike,
        vocab_size: int,
        tokenizer_fingerprint: str | None = None,
        tokenizer_folder: str | None = None,
    ):
        """`tokenizer_fingerprint` and `tokenizer_folder` (relative to the folder of PREFIX) go into the manifest."""
        self.prefix = os.fspath(prefix)
        self.vocab_size = vocab_size
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.tokenizer_folder = tokenizer_folder
        self.dtype = token_dtype(vocab_size)
        self.num_tokens = 0
        self.largest_id = -1
        self._lengths = array("i")  # int32, as in the file
        self._sha256 = hashlib.sha256()
        self._targets = file_paths(self.prefix)
        tag = secrets.token_hex(4)
        self._temps = [path.with_name(f".{path.name}.tmp-{tag}") for path in self._targets]
        _refuse_foreign_json(self._targets[2])
        with _disk_errors(self.prefix):
            self._targets[0].parent.mkdir(parents=True, exist_ok=True)
            self._bin = open(self._temps[0], "wb", buffering=CHUNK_BYTES)

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    def append(self, document: np.ndarray | Sequence[int]) -> None:
        """Append one document: a 1-D array of token ids."""
        self.extend([document])

    def extend(self, documents: Sequence[np.ndarray | Sequence[int]]) -> None:
        """Append documents in order. Ids outside [0, vocab_size) and documents past 2^31 - 1 tokens raise UserError."""
        if not documents:
            return
        arrays = [np.asarray(document) for document in documents]
        arrays = [ids if ids.size else np.empty(0, np.int64) for ids in arrays]  # np.asarray([]) is float64
        ids = np.concatenate(arrays)
        assert ids.ndim == 1 and ids.dtype.kind in "iu", f"token ids must be 1-D integers, not {ids.dtype} {ids.shape}"
        if ids.size:
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.vocab_size:
                raise UserError(
                    f"token id {low if low < 0 else high} among documents {self.num_documents} to "
                    f"{self.num_documents + len(arrays) - 1} of {self.prefix} is outside the vocabulary of "
                    f"{self.vocab_size} tokens"
                )
            self.largest_id = max(self.largest_id, high)
        try:
            self._lengths.extend(len(document) for document in arrays)
        except OverflowError:
            raise UserError(
                f"a document of {max(map(len, arrays)):,} tokens does not fit the format of {self.prefix}.idx, which "
                "counts a sequence's tokens in 31 bits; cut it into several documents"
            ) from None
        stored = np.ascontiguousarray(ids, dtype=self.dtype.newbyteorder("<")).view(np.uint8).data
        with _disk_errors(self.prefix):
            self._bin.write(stored)
        self._sha256.update(stored)
        self.num_tokens += ids.size

    def finish(self, **facts) -> dict:
        """Write the index and the manifest, put all three files in place and return the manifest.

        `facts` are further JSON values for the manifest (text_bytes, sources, options ...).
        """
        bin_temp, idx_temp, json_temp = self._temps
        with _disk_errors(self.prefix):
            self._bin.flush()
            os.fsync(self._bin.fileno())
            self._bin.close()
            idx_sha256 = self._write_index(idx_temp)
            manifest = {
                "format": MANIFEST_FORMAT,
                "version": MANIFEST_VERSION,
                "tokenizer": {
                    "fingerprint": self.tokenizer_fingerprint,
                    "vocab_size": self.vocab_size,
                    "folder": self.tokenizer_folder,
                },
                "dtype": self.dtype.name,
                "documents": self.num_documents,
                "tokens": self.num_tokens,
                "largest_id": self.largest_id,
                "bin_bytes": bin_temp.stat().st_size,
                "idx_bytes": idx_temp.stat().st_size,
                "bin_sha256": self._sha256.hexdigest(),
                "idx_sha256": idx_sha256,
                "fingerprint": content_fingerprint(bin_temp, idx_temp),
                **facts,
            }
            with open(json_temp, "w", encoding="utf-8") as file:
                json.dump(manifest, file, indent=2, ensure_ascii=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            for temp, target in zip(self._temps, self._targets, strict=True):
                os.replace(temp, target)
            sync_folder(self._targets[0].parent)
        return manifest

    def _write_index(self, path: Path) -> str:
        """Write the .idx, chunk by chunk, and return its SHA-256."""
        digest = hashlib.sha256()
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        count = len(lengths)

        with open(path, "wb") as file:

            def put(data) -> None:
                file.write(data)
                digest.update(data)

            put(HEADER.pack(MAGIC, VERSION, DTYPE_CODES[self.dtype], count, count + 1))
            put(lengths.astype("<i4", copy=False).tobytes())
            offset = 0  # a Python int: no overflow, however long the file
            for start in range(0, count, CHUNK_ENTRIES):
                sizes = lengths[start : start + CHUNK_ENTRIES].astype(np.int64) * self.dtype.itemsize
                ends = offset + np.cumsum(sizes)
                put((ends - sizes).astype("<i8").tobytes())
                offset = int(ends[-1])
            for start in range(0, count + 1, CHUNK_ENTRIES):
                put(np.arange(start, min(start + CHUNK_ENTRIES, count + 1), dtype="<i8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def __enter__(self) -> "TokenFileWriter":
        return self

    def __exit__(self, *exception) -> None:
        self._bin.close()
        for temp in self._temps:
            temp.unlink(missing_ok=True)  # nothing is left of them after finish


def _refuse_foreign_json(path: Path) -> None:
    """`--input corpus.json --output corpus` must not overwrite the input with the manifest."""
    if path.exists():
        try:
            read_manifest(path)
        except UserError:
            raise UserError(
                f"{path} exists and is not a manifest of ours: it would be overwritten; choose another output PREFIX"
            ) from None


# --- reading ----------------------------------------------------------------------------------------------------------


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
    if missing := [key for key in MANIFEST_KEYS if key not in manifest]:
        raise UserError(f"{path} lacks {', '.join(missing)}; build the token file again")
    return manifest


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
    """

    def __init__(self, prefix: str | os.PathLike, tokenizer_fingerprint: str | None = None):
        self.prefix = os.fspath(prefix)
        self.bin_path, self.idx_path, self.manifest_path = file_paths(self.prefix)
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                raise UserError(
                    f"token file {path} does not exist; give the PREFIX of a .bin and an .idx, as written by "
                    "tools/preprocess_data.py"
                )
        self._fingerprint: str | None = None
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
        buffer = np.memmap(path, mode="r", dtype=np.uint8)
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
        at = HEADER.size
        self.sequence_lengths = np.frombuffer(buffer, "<i4", num_sequences, at)
        self.sequence_offsets = np.frombuffer(buffer, "<i8", num_sequences, at + 4 * num_sequences)
        self.document_boundaries = np.frombuffer(buffer, "<i8", num_boundaries, at + 12 * num_sequences)
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
        self.tokens = np.memmap(self.bin_path, mode="r", dtype=self.dtype) if size else np.empty(0, self.dtype)

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
    def fingerprint(self) -> str:
        """`content_fingerprint` of the files as they are now; UserError if the manifest has another."""
        if self._fingerprint is None:
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

    def sequence(self, index: int) -> np.ndarray:
        """Tokens of one sequence, a view."""
        start = self.token_bound(index)
        return self.tokens[start : start + int(self.sequence_lengths[index])]

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, which may span several sequences, a view."""
        first, last = (int(bound) for bound in self.document_boundaries[index : index + 2])
        return self.tokens[self.token_bound(first) : self.token_bound(last)]


def verify(prefix: str | os.PathLike) -> TokenFile:
    """Read all of a token file and check every figure: offsets, lengths, boundaries, ids, and the manifest's hashes.

    Returns the opened file; the first fault found is a UserError that names file and figure. Runs at disk speed.
    """
    file = TokenFile(prefix)
    end = 0
    for start in range(0, file.num_sequences, CHUNK_ENTRIES):
        lengths = file.sequence_lengths[start : start + CHUNK_ENTRIES].astype(np.int64)
        offsets = file.sequence_offsets[start : start + CHUNK_ENTRIES]
        ends = end + np.cumsum(lengths) * file.dtype.itemsize
        starts = ends - lengths * file.dtype.itemsize
        wrong = np.flatnonzero((lengths < 0) | (offsets != starts))
        if wrong.size:
            i = wrong[0]
            raise UserError(
                f"{file.idx_path}: sequence {start + i} has {lengths[i]} tokens from byte {offsets[i]}; it should "
                f"start at byte {starts[i]}, where the one before it ends"
            )
        end = int(ends[-1])
    for start in range(0, file.num_documents, CHUNK_ENTRIES):
        bounds = file.document_boundaries[start : start + CHUNK_ENTRIES + 1]
        wrong = np.flatnonzero(np.diff(bounds) < 0)
        if wrong.size:
            i = wrong[0]
            raise UserError(
                f"{file.idx_path}: document {start + i} runs from sequence {bounds[i]} back to {bounds[i + 1]}"
            )
    for start in range(0, file.num_tokens, CHUNK_BYTES):
        chunk = file.tokens[start : start + CHUNK_BYTES]
        if chunk.min() < 0:
            at = int(chunk.argmin())
            raise UserError(f"{file.bin_path}: token {start + at} is {chunk[at]}, below zero")
        if file.largest_id is not None and chunk.max() > file.largest_id:
            at = int(chunk.argmax())
            raise UserError(
                f"{file.bin_path}: token {start + at} is {chunk[at]}, over the manifest's largest id {file.largest_id}"
            )
    if file.manifest is not None:
        for path, key in ((file.bin_path, "bin_sha256"), (file.idx_path, "idx_sha256")):
            if (found := _sha256(path)) != file.manifest.get(key):
                raise UserError(
                    f"{path} has SHA-256 {found}, the manifest says {file.manifest.get(key)}: its content was altered; "
                    "build the token file again"
                )
        _ = file.fingerprint
    return file
