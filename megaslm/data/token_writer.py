"""Writing token files (the format stands in token_file.py): by a stream of documents, or around a finished .bin.

Nothing half-written ever bears its final name. First everything goes to hidden files beside it and is fsynced; then the
index of an older file is removed, .bin and .json are renamed, and, last, .idx, without which nothing opens.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from megaslm.data.token_file import (
    CHUNK_BYTES,
    CHUNK_ENTRIES,
    DTYPE_CODES,
    HEADER,
    MAGIC,
    MANIFEST_FORMAT,
    MANIFEST_VERSION,
    VERSION,
    content_fingerprint,
    file_paths,
    read_chunks,
    read_manifest,
    token_dtype,
)
from megaslm.errors import UserError
from megaslm.files import sole_writer, sync_folder

LENGTH_DTYPE, BOUNDARY_DTYPE = np.dtype("<i4"), np.dtype("<i8")  # as the format has them
LARGEST_LENGTH = (1 << 31) - 1  # tokens of a sequence
REMEDIES = {
    errno.ENOSPC: "; free some space, or write to another disk",
    errno.EDQUOT: "; free some space, or write to another disk",
    errno.EACCES: "; choose a folder that you may write to",
    errno.EPERM: "; choose a folder that you may write to",
    errno.EROFS: "; choose a folder that you may write to",
    errno.ENOTDIR: "; a part of its path is a file: choose another",
    errno.EEXIST: "; a part of its path is a file: choose another",
    errno.ENAMETOOLONG: "; choose a shorter name",
}
HIDDEN = ("bin", "idx", "json", "lengths", "boundaries")  # what stands beside PREFIX while it is written


@contextlib.contextmanager
def disk_errors(where: str | os.PathLike, remark: str = "") -> Iterator[None]:
    """A full disk or a forbidden folder is the user's to mend, with what is written `where`."""
    try:
        yield
    except BrokenPipeError:  # no file's: of what a callback prints to
        raise
    except OSError as error:
        path = error.filename2 or error.filename
        place = f"{where}: {path}" if path and os.fspath(path) != os.fspath(where) else where
        remedy = REMEDIES.get(error.errno, "")
        raise UserError(f"cannot write {place}: {error.strerror or error}{remedy}{remark}") from error


def check_prefix(prefix: str | os.PathLike) -> str:
    """The PREFIX of token files to be written, as it is; UserError if it has no name that endings could be put to."""
    prefix = os.fspath(prefix)
    if os.path.basename(prefix) in ("", ".", ".."):
        raise UserError(f"{prefix!r} is no PREFIX of token files: give a folder and a name, such as data/corpus")
    return prefix


def check_output(prefix: str | os.PathLike, overwrite: bool = False) -> None:
    """UserError unless token files may be written to PREFIX.

    What is there stays, unless `overwrite` is set; and folders, or a PREFIX.json that is not ours, stay always.
    """
    check_prefix(prefix)
    paths = file_paths(prefix)
    with disk_errors(prefix):
        for path in paths:
            if path.is_dir():
                raise UserError(f"{path} is a folder, and a file would go there: choose another output PREFIX")
        found = [path for path in paths if path.exists()]
    if paths[2] in found:  # `--input corpus.json --output corpus` must not overwrite the input with the manifest
        try:
            read_manifest(paths[2])
        except UserError:
            raise UserError(
                f"{paths[2]} exists and is not a manifest of ours: choose another output PREFIX, or move it away"
            ) from None
    if found and not overwrite:
        raise UserError(
            f"{found[0]} exists and would be overwritten: choose another output PREFIX, or replace it with --overwrite"
        )


@contextlib.contextmanager
def output_lock(prefix: str | os.PathLike) -> Iterator[None]:
    """One writer of PREFIX at a time: UserError naming the other process, which may be on another machine.

    The lock is the kernel's, on the hidden file `.NAME.lock` beside PREFIX: it ends with the process, however that
    ends, and the next one removes what that left. A file system without locks, or Windows, lets everyone pass.
    """
    prefix = Path(check_prefix(prefix))
    with contextlib.ExitStack() as held:
        with disk_errors(prefix):
            prefix.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(sole_writer(prefix, "PREFIX"))
        _remove(_hidden(prefix, kind) for kind in HIDDEN)
        yield


def _hidden(prefix: str | os.PathLike, kind: str) -> Path:
    """Where a part of PREFIX stands until it is whole."""
    return Path(prefix).with_name(f".{Path(prefix).name}.{kind}.tmp")


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # it is tidying up; what went wrong has been said
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class PreparedTokenFile:
    """A token file that is whole and on the disk, but under hidden names: `commit` gives it the final ones.

    Attributes:
        manifest: the content of PREFIX.json.
    """

    prefix: str
    manifest: dict
    bin_path: Path


@contextlib.contextmanager
def prepared_token_file(
    prefix: str | os.PathLike,
    bin_path: Path,
    lengths_path: Path,
    *,
    dtype: np.dtype,
    bin_sha256: str,
    largest_id: int,
    tokenizer: dict,
    boundaries_path: Path | None = None,
    facts: dict,
) -> Iterator[PreparedTokenFile]:
    """Index and manifest for a finished .bin at `bin_path`, on the file system of PREFIX, all three fsynced.

    In the `with` block `commit` gives them their names; left without that, index and manifest are removed again.

    Args:
        lengths_path: a file of [sequences] int32, little-endian: tokens of each.
        tokenizer: {"fingerprint", "vocab_size", "folder"} for the manifest; the folder is relative to PREFIX's.
        boundaries_path: a file of [documents + 1] int64 sequence numbers; None: every sequence is a document.
        facts: further JSON values for the manifest (text_bytes, sources, options ...).

    The caller holds the `output_lock`, and has asked `check_output`. UserError where the disk refuses; `bin_path` is
    then still there.
    """
    dtype = np.dtype(dtype)
    idx_path, json_path = _hidden(prefix, "idx"), _hidden(prefix, "json")
    try:
        with disk_errors(prefix):
            idx_sha256, num_documents, num_tokens = _write_index(idx_path, dtype, lengths_path, boundaries_path)
            bin_bytes = bin_path.stat().st_size
            assert bin_bytes == num_tokens * dtype.itemsize, f"{bin_bytes} bytes, but {num_tokens} tokens"
            manifest = {
                "format": MANIFEST_FORMAT,
                "version": MANIFEST_VERSION,
                "tokenizer": {key: tokenizer[key] for key in ("fingerprint", "vocab_size", "folder")},
                "dtype": dtype.name,
                "documents": num_documents,
                "tokens": num_tokens,
                "largest_id": largest_id,
                "bin_bytes": bin_bytes,
                "idx_bytes": idx_path.stat().st_size,
                "bin_sha256": bin_sha256,
                "idx_sha256": idx_sha256,
                "fingerprint": content_fingerprint(bin_path, idx_path),
            }
            assert not manifest.keys() & facts.keys(), f"{manifest.keys() & facts.keys()} are not for facts"
            manifest |= facts
            # File names may hold bytes that are not UTF-8: as \udc.., which JSON writes like Python.
            with open(json_path, "w", encoding="utf-8", errors="backslashreplace") as file:
                json.dump(manifest, file, indent=2, ensure_ascii=False)
                file.write("\n")
                _sync(file)
            with open(bin_path, "rb+") as file:
                _sync(file)
        yield PreparedTokenFile(os.fspath(prefix), manifest, bin_path)
    finally:
        _remove([idx_path, json_path])


def commit(files: Sequence[PreparedTokenFile]) -> None:
    """Give token files that belong together their final names, in place of older ones.

    The indexes of all older files go first, and the new ones come last: whenever this is stopped, what opens is new,
    and never a part of an older split stands beside one of the new.
    """
    targets = [file_paths(file.prefix) for file in files]
    folders = {paths[0].parent for paths in targets}
    with disk_errors(", ".join(file.prefix for file in files)):
        for _, idx_path, _ in targets:
            idx_path.unlink(missing_ok=True)
        for file, (bin_path, _, json_path) in zip(files, targets, strict=True):
            os.replace(file.bin_path, bin_path)
            os.replace(_hidden(file.prefix, "json"), json_path)
        for folder in folders:
            sync_folder(folder)
        for file, (_, idx_path, _) in zip(files, targets, strict=True):
            os.replace(_hidden(file.prefix, "idx"), idx_path)
        for folder in folders:
            sync_folder(folder)


def _sync(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write_index(path: Path, dtype: np.dtype, lengths: Path, boundaries: Path | None) -> tuple[str, int, int]:
    """Write the .idx, chunk by chunk; return its SHA-256 and the numbers of documents and tokens that it counts."""
    digest, count = hashlib.sha256(), lengths.stat().st_size // LENGTH_DTYPE.itemsize
    num_boundaries = count + 1 if boundaries is None else boundaries.stat().st_size // BOUNDARY_DTYPE.itemsize
    with open(path, "wb") as file:

        def put(data: bytes | np.ndarray) -> None:
            file.write(data)
            digest.update(data)

        put(HEADER.pack(MAGIC, VERSION, DTYPE_CODES[dtype], count, num_boundaries))
        for chunk in read_chunks(lengths, LENGTH_DTYPE, entries=CHUNK_ENTRIES):
            put(chunk)
        offset = 0  # a Python int: no overflow, however long the file
        for chunk in read_chunks(lengths, LENGTH_DTYPE, entries=CHUNK_ENTRIES):
            sizes = chunk.astype(np.int64) * dtype.itemsize
            ends = offset + np.cumsum(sizes)
            put((ends - sizes).astype("<i8"))
            offset = int(ends[-1])
        if boundaries is None:
            for start in range(0, num_boundaries, CHUNK_ENTRIES):
                put(np.arange(start, min(start + CHUNK_ENTRIES, num_boundaries), dtype=BOUNDARY_DTYPE))
        else:
            for chunk in read_chunks(boundaries, BOUNDARY_DTYPE, entries=CHUNK_ENTRIES):
                put(chunk)
        _sync(file)
    return digest.hexdigest(), num_boundaries - 1, offset // dtype.itemsize


class TokenFileWriter:
    """Writes PREFIX.bin, PREFIX.idx and PREFIX.json from a stream of documents.

    Tokens and lengths stream to hidden temporary files, so that memory grows with neither. `finish` puts all in place;
    `prepare` and `commit` do so for several writers at once. Leaving the `with` block without it removes the temporary
    files and leaves an older finished PREFIX as it was.

        with TokenFileWriter("data/train", vocab_size=32000, tokenizer_fingerprint=tokenizer.fingerprint) as writer:
            writer.extend(list_of_arrays)
            manifest = writer.finish(text_bytes=12345)

    Attributes:
        num_tokens, num_sequences, num_documents: written so far.
        largest_id: largest id written so far; -1 before the first.
        bin_sha256: SHA-256 of the tokens written so far.
    """

    def __init__(
        self,
        prefix: str | os.PathLike,
        vocab_size: int | None,
        tokenizer_fingerprint: str | None = None,
        tokenizer_folder: str | None = None,
        *,
        dtype: np.dtype | None = None,
        boundaries: bool = False,
        locked: bool = False,
        overwrite: bool = False,
    ):
        """`tokenizer_fingerprint` and `tokenizer_folder` (relative to the folder of PREFIX) go into the manifest.

        Args:
            vocab_size: ids must lie below it; None: unknown, ids must be 0 or more, and `dtype` is needed.
            dtype: width in which ids are stored; None: as the vocabulary asks for.
            boundaries: a document may have several sequences, see `add_documents`; else each sequence is a document.
            locked: the caller holds the `output_lock` of PREFIX; else the writer takes it.
            overwrite: replace a token file at PREFIX; else it is a UserError, see `check_output`.
        """
        self.prefix = os.fspath(prefix)
        self.tokenizer = {
            "fingerprint": tokenizer_fingerprint,
            "vocab_size": vocab_size,
            "folder": tokenizer_folder,
        }
        self.dtype = np.dtype(dtype) if dtype is not None else token_dtype(vocab_size)
        # Where the vocabulary is not known, ids must at least survive the width they are stored in.
        self.num_ids = int(np.iinfo(self.dtype).max) + 1 if vocab_size is None else vocab_size
        self.num_tokens = self.num_sequences = 0
        self.largest_id = -1
        self._num_documents = self._documents_end = 0
        self._sha256 = hashlib.sha256()
        check_prefix(self.prefix)
        kinds = ("bin", "lengths", *(("boundaries",) if boundaries else ()))
        self._temps = {kind: _hidden(self.prefix, kind) for kind in kinds}
        with contextlib.ExitStack() as stack:
            if not locked:
                stack.enter_context(output_lock(self.prefix))
            check_output(self.prefix, overwrite)
            self._files: dict[str, BinaryIO] = {}
            stack.callback(self._discard)
            with disk_errors(self.prefix):
                Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
                for kind, path in self._temps.items():
                    self._files[kind] = open(path, "wb", buffering=CHUNK_BYTES)
                if boundaries:
                    self._files["boundaries"].write(np.zeros(1, BOUNDARY_DTYPE).data)
            self._open = stack.pop_all()

    @property
    def num_documents(self) -> int:
        return self._num_documents if "boundaries" in self._files else self.num_sequences

    @property
    def bin_sha256(self) -> str:
        return self._sha256.hexdigest()

    def append(self, document: np.ndarray | Sequence[int]) -> None:
        """Append one document: a 1-D array of token ids."""
        self.extend([document])

    def extend(self, documents: Sequence[np.ndarray | Sequence[int]]) -> None:
        """Append documents in order, one sequence each. UserError as for `add_tokens` and `add_sequences`."""
        if not documents:
            return
        arrays = [np.asarray(document) for document in documents]
        arrays = [ids if ids.size else np.empty(0, np.int64) for ids in arrays]  # np.asarray([]) is float64
        self.extend_flat(np.concatenate(arrays), np.array([len(ids) for ids in arrays], np.int64))

    def extend_flat(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents of one sequence each that stand back to back in `ids`, `lengths` [documents] tokens long."""
        assert lengths.sum() == ids.size, f"{lengths.sum()} tokens in lengths, {ids.size} ids"
        self.add_tokens(ids)
        self.add_sequences(lengths)
        if "boundaries" in self._files:
            self.add_documents(np.ones(len(lengths), np.int64))

    def add_tokens(self, ids: np.ndarray) -> None:
        """Append to the stream alone; sequences and documents follow by themselves, at any time before `finish`.

        Ids outside [0, vocab_size) raise UserError.
        """
        assert ids.ndim == 1 and ids.dtype.kind in "iu", f"token ids must be 1-D integers, not {ids.dtype} {ids.shape}"
        if not ids.size:
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.num_ids:
            raise UserError(
                f"token id {low if low < 0 else high} behind document {self.num_documents:,} of {self.prefix} is "
                f"outside the vocabulary of {self.num_ids:,} tokens: give the tokenizer that made the ids"
            )
        self.largest_id = max(self.largest_id, high)
        stored = np.ascontiguousarray(ids, dtype=self.dtype.newbyteorder("<")).view(np.uint8).data
        with disk_errors(self.prefix):
            self._files["bin"].write(stored)
        self._sha256.update(stored)
        self.num_tokens += ids.size

    def add_sequences(self, lengths: np.ndarray) -> None:
        """Append sequences of `lengths` [n] tokens. UserError for one past 2^31 - 1 tokens."""
        if not len(lengths):
            return
        longest = int(lengths.max())
        if longest > LARGEST_LENGTH:
            raise UserError(
                f"a document of {longest:,} tokens does not fit the format of {self.prefix}.idx, which counts a "
                "sequence's tokens in 31 bits; cut it into several documents"
            )
        with disk_errors(self.prefix):
            self._files["lengths"].write(np.ascontiguousarray(lengths, LENGTH_DTYPE).data)
        self.num_sequences += len(lengths)

    def add_documents(self, counts: np.ndarray) -> None:
        """Append documents of `counts` [n] sequences each, where the writer was opened with `boundaries`."""
        ends = self._documents_end + np.cumsum(counts, dtype=np.int64)
        with disk_errors(self.prefix):
            self._files["boundaries"].write(np.ascontiguousarray(ends, BOUNDARY_DTYPE).data)
        self._num_documents += len(counts)
        self._documents_end = int(ends[-1]) if len(ends) else self._documents_end

    def finish(self, **facts) -> dict:
        """Write the index and the manifest, put all three files in place and return the manifest.

        `facts` are further JSON values for the manifest (text_bytes, sources, options ...).
        """
        file = self.prepare(**facts)
        commit([file])
        self._open.close()
        return file.manifest

    def prepare(self, **facts) -> PreparedTokenFile:
        """As `finish`, up to the final names: those are given by `commit`, within the `with` block."""
        with disk_errors(self.prefix):
            for file in self._files.values():
                file.close()
        sequences = self._documents_end if "boundaries" in self._files else self.num_sequences
        assert sequences == self.num_sequences, f"documents of {sequences} sequences, but {self.num_sequences}"
        return self._open.enter_context(
            prepared_token_file(
                self.prefix,
                self._temps["bin"],
                self._temps["lengths"],
                dtype=self.dtype,
                bin_sha256=self.bin_sha256,
                largest_id=self.largest_id,
                tokenizer=self.tokenizer,
                boundaries_path=self._temps.get("boundaries"),
                facts=facts,
            )
        )

    def _discard(self) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk has been reported already
                file.close()
        _remove(self._temps.values())

    def __enter__(self) -> "TokenFileWriter":
        return self

    def __exit__(self, *exception) -> None:
        self._open.close()
