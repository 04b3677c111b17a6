"""PREFIX.work/: what a build has done so far, so that a killed one goes on where it was.

    tokens.bin      ids of all documents so far, back to back in the stored width
    lengths.i4      tokens of each document, int32, end-of-document token included
    keys.u16        BLAKE2b-128 of each document's text, where the assembly asks for it
    text_bytes.i8   UTF-8 bytes of each document's text, int64, where the assembly asks for it
    skipped.jsonl   one line for each record that was left out
    journal.jsonl   what the files hold and how far they are whole

The files only grow. The journal's first line says what is built; then there is one line for each unit of the input that
was appended: its identity, the totals up to its end, and the size and running SHA-256 of every file. A torn last line,
or bytes behind what the journal says, come from a build that was killed, and are cut off. Nothing is synced to the disk
on the way: the digests find what a loss of power took.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaslm.data.sources import Unit
from megaslm.data.token_writer import disk_errors
from megaslm.errors import UserError

WORK_SUFFIX = ".work"
JOURNAL = "journal.jsonl"
JOURNAL_FORMAT = "megaslm work"
JOURNAL_VERSION = 1
TOKENS, LENGTHS, KEYS, TEXT_BYTES, SKIPPED = "tokens.bin", "lengths.i4", "keys.u16", "text_bytes.i8", "skipped.jsonl"
COLUMNS = {LENGTHS: np.dtype("<i4"), KEYS: np.dtype(("<u8", 2)), TEXT_BYTES: np.dtype("<i8")}
UNIT_SUFFIX = ".unit"  # what a worker process has encoded, until it is appended
CHUNK_BYTES = 1 << 20


@dataclass
class BuildProgress:
    """What has been written so far; `text_bytes` is UTF-8, without end-of-document tokens.

    input_bytes: of the files, as they are stored. filtered: documents that a filter of length left out. skipped:
    records that could not be used, `empty` ones among them. file, records: the file read last, and how many of its
    records have been read.
    """

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    mapped_characters: int = 0
    largest_id: int = -1
    units: int = 0
    input_bytes: int = 0
    filtered: int = 0
    skipped: int = 0
    empty: int = 0
    file: str | None = None
    records: int = 0


@dataclass(frozen=True)
class TokenStream:
    """All documents of a build in the order of the input, in the files of a work folder.

    Attributes:
        tokens_path: ids back to back, `dtype`, little-endian.
        sha256: of that file, hexadecimal.
    """

    tokens_path: Path
    dtype: np.dtype
    num_tokens: int
    num_documents: int
    sha256: str

    @property
    def lengths_path(self) -> Path:
        """[documents] int32, little-endian: tokens of each document, end-of-document token included."""
        return self.tokens_path.with_name(LENGTHS)

    def has(self, column: str) -> bool:
        """Whether there is this one of COLUMNS."""
        return self.tokens_path.with_name(column).exists()

    def read(self, column: str, start: int, stop: int) -> np.ndarray:
        """What one of COLUMNS says of documents [start, stop): [n], or [n, 2] of keys."""
        return read_entries(self.tokens_path.with_name(column), COLUMNS[column], start, stop)


def read_entries(path: Path, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
    """Entries [start, stop) of a file that has them all.

    Read, not mapped: pages of a mapped file count as memory of the process.
    """
    entries = np.fromfile(path, dtype, stop - start, offset=start * dtype.itemsize)
    assert len(entries) == stop - start, f"{path} ends before entry {stop}"
    return entries


class _GrowingFile:
    """A file that is appended to, with the SHA-256 of all that it holds."""

    def __init__(self, path: Path):
        self._file = open(path, "r+b" if path.exists() else "w+b", buffering=0)
        self.size = 0
        self.sha256 = hashlib.sha256()

    def append(self, data) -> None:
        self.sha256.update(data)
        self.size += write_all(self._file, data)

    def digest_at(self, size: int):
        """The running SHA-256 `size` bytes from the start, not before where it stands now; None if there are fewer."""
        digest, at = self.sha256.copy(), self.size
        with _named(self._file):
            self._file.seek(at)
            while at < size:
                chunk = self._file.read(min(CHUNK_BYTES, size - at))
                if not chunk:
                    return None
                digest.update(chunk)
                at += len(chunk)
        return digest if at == size else None

    def cut(self) -> None:
        """Drop what stands behind the part that was appended, or found whole."""
        with _named(self._file):
            self._file.truncate(self.size)
            self._file.seek(self.size)

    def sync(self) -> None:
        with _named(self._file):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Work:
    """The work folder, opened for one build; the caller holds the lock of its PREFIX.

    Attributes:
        found: totals of what a build before this one has recorded here, with the same options.
        done: totals of what is whole in the folder: zero until `resume`.
        replaced: options with other values in a build whose work was removed for this one.
    """

    def __init__(self, folder: Path, build: dict, columns: Iterable[str], overwrite: bool = False):
        """Open or make `folder`.

        Args:
            build: the values of the options that decide what the files hold, by their names. One that the build
                before did not have cannot have mattered to what it did.
            columns: the files that are written besides the tokens, lengths and skipped records.
            overwrite: remove the work of a build with other options; else it is a UserError, and stays.
        """
        self.folder = folder
        self.found, self.done = BuildProgress(), BuildProgress()
        self.replaced: list[str] = []
        with work_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob(f"*{UNIT_SUFFIX}"):
                path.unlink()
            self._prepare_journal({"version": JOURNAL_VERSION, **build}, overwrite)
            self._journal = open(folder / JOURNAL, "r+b", buffering=0)
            self._files = {name: _GrowingFile(folder / name) for name in (TOKENS, LENGTHS, SKIPPED, *columns)}

    def _prepare_journal(self, build: dict, overwrite: bool) -> None:
        """Leave a journal there whose first line has all of `build`: the one found, or else a new one."""
        journal, build = self.folder / JOURNAL, json.loads(json.dumps(build))
        before = self._read_journal()
        other = [name for name in build if before and name in before and before[name] != build[name]]
        if other and self.found.units:
            if not overwrite:
                raise UserError(
                    f"{self.folder} holds {self.found.units:,} units ({self.found.input_bytes / 1e6:,.1f} MB of input) "
                    f"of a build with another value of: {', '.join(other)}. Give it as before to go on with that "
                    "build, choose another output PREFIX, or start over with --overwrite"
                )
            self.replaced = other
        if before is None or other:
            self.found = BuildProgress()
            for path in self.folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            journal.write_bytes(_header(build))
        elif not build.keys() <= before.keys():
            new = journal.with_name(f"{JOURNAL}.new")
            with open(journal, "rb") as old, open(new, "wb") as file:
                old.readline()
                file.write(_header(before | build))
                shutil.copyfileobj(old, file)
            os.replace(new, journal)

    def _read_journal(self) -> dict | None:
        """The `build` of the journal's first line, None without one; and what was done by its last one, as `found`.

        UserError if the folder is none of ours.
        """
        header = b""
        with contextlib.suppress(FileNotFoundError), open(self.folder / JOURNAL, "rb") as file:
            header = file.readline()
            for entry in filter(None, map(_parse, file)):
                self.found = BuildProgress(**entry["done"])
        with contextlib.suppress(ValueError, LookupError, TypeError):
            found = json.loads(header)
            if found["format"] == JOURNAL_FORMAT:
                return dict(found["build"])
        # Alone, it is one that a full disk cut short.
        others = any(path.name != JOURNAL for path in self.folder.iterdir())
        if others and JOURNAL_FORMAT.encode() not in header:
            raise UserError(f"{self.folder} is not empty and is no work folder of ours: move it away")
        return None

    @property
    def size(self) -> int:
        """Bytes that a build before this one has left."""
        with work_errors(self.folder):
            return sum((self.folder / name).stat().st_size for name in self._files)

    def resume(
        self,
        units: Iterator[Unit],
        identity: Callable[[Unit], str],
        accepts: Callable[[dict], bool],
        progress: Callable[[int], None] = lambda size: None,
    ) -> Iterator[Unit]:
        """Compare the journal with the units of the input; return the units that are still to be done.

        The longest run of units from the start stays that has the same identity, whose `notes` the caller accepts, and
        whose bytes have the digests that the journal gives; what comes behind it is cut off. Whatever is raised before
        the end, by a callback too, leaves all as it was. `progress` is called with the bytes that were checked so far.
        """
        lines = self._lines()
        end = len(next(lines))
        for line in lines:
            unit = next(units, None)
            if unit is None:
                break
            entry = _parse(line)
            if not (entry and entry["unit"] == identity(unit) and accepts(entry["notes"]) and self._whole(entry)):
                units = itertools.chain([unit], units)
                break
            self.done = BuildProgress(**entry["done"])
            end += len(line)
            progress(sum(file.size for file in self._files.values()))
        lines.close()
        with work_errors(self.folder):
            self._journal.truncate(end)
            self._journal.seek(end)
            for file in self._files.values():
                file.cut()
        return units

    def _lines(self) -> Iterator[bytes]:
        with work_errors(self.folder), open(self.folder / JOURNAL, "rb") as file:
            yield from file

    def _whole(self, entry: dict) -> bool:
        """Whether every file holds what the journal says up to the end of this unit; if so, all move on to there."""
        digests = {}
        for name, file in self._files.items():
            size, expected = entry["files"][name]
            with work_errors(self.folder):
                digest = file.digest_at(size)
            if digest is None or digest.hexdigest() != expected:
                return False
            digests[name] = digest
        for name, file in self._files.items():
            file.sha256, file.size = digests[name], entry["files"][name][0]
        return True

    def commit(self, unit: str, columns: Iterable[tuple[str, Any]], done: BuildProgress, notes: dict) -> None:
        """Append a unit: pairs of a file's name and the bytes for it, then its line in the journal."""
        with work_errors(self.folder):
            for name, data in columns:
                self._files[name].append(data)
            sizes = {name: [file.size, file.sha256.hexdigest()] for name, file in self._files.items()}
            entry = {"unit": unit, "done": asdict(done), "files": sizes, "notes": notes}
            write_all(self._journal, (json.dumps({"check": _check(entry), **entry}) + "\n").encode())
        self.done = done

    def finish(self, dtype: np.dtype) -> TokenStream:
        """Put everything on the disk and give the stream."""
        with work_errors(self.folder):
            for file in self._files.values():
                file.sync()
        self.close()
        sha256 = self._files[TOKENS].sha256.hexdigest()
        return TokenStream(self.folder / TOKENS, np.dtype(dtype), self.done.tokens, self.done.documents, sha256)

    def close(self) -> None:
        self._journal.close()
        for file in self._files.values():
            file.close()


def _header(build: dict) -> bytes:
    """The first line of a journal."""
    return (json.dumps({"format": JOURNAL_FORMAT, "build": build}) + "\n").encode()


def _check(entry: dict) -> str:
    return hashlib.blake2b(json.dumps(entry).encode(), digest_size=8).hexdigest()


def _parse(line: bytes) -> dict | None:
    """A line of the journal; None for one that was torn or altered."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(entry, dict) and line.endswith(b"\n") and entry.pop("check", None) == _check(entry)
    return entry if whole else None


def write_all(file, data) -> int:
    """Write a buffer to an unbuffered file, which may take it in parts; return its size in bytes."""
    view = memoryview(data)
    size = view.nbytes
    view = view.cast("B") if size else view
    with _named(file):
        while view.nbytes:
            view = view[file.write(view) :]
    return size


@contextlib.contextmanager
def _named(file) -> Iterator[None]:
    """An OSError of an open file says which file it was, as one of opening does."""
    try:
        yield
    except OSError as error:
        error.filename = os.fspath(file.name)
        raise


def work_errors(folder: Path) -> contextlib.AbstractContextManager[None]:
    """`disk_errors` for a work folder: nothing that is done is lost."""
    return disk_errors(folder, "; the same command goes on from what is done")
