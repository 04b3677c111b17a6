"""What the readers of all formats share: files, pieces of them, and what reading a piece gives.

A piece is a part of one file that any process can read by itself. Where its borders lie depends on the file alone.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from megaslm.data.sources.fields import RecordFault, RecordText
from megaslm.errors import UserError

EMPTY = "the document is empty"
LISTED_FAULTS = 10_000  # of a piece, which may have millions
# In names of files and fields: line ends, control characters, and surrogates (of bytes that are not UTF-8).
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class SourceFile(NamedTuple):
    """An input to read.

    Attributes:
        path: a str for what is no file.
        name: the path relative to the input it was found under.
        size: bytes, 0 where it is unknown.
        mtime_ns: 0 where there is none.
        location: what it is in this run and the next, as the absolute path.
        kind: "file", "dataset" (of Hugging Face) or "stdin".
        inode: of a file, (device, inode): the same for every path to it.
    """

    path: Path | str
    name: str
    size: int
    mtime_ns: int
    location: str
    kind: str = "file"
    inode: tuple[int, int] | None = None

    @property
    def key(self) -> object:
        """The same for what is the same file, however it was named."""
        return self.inode or self.location

    def place(self, number: int | None) -> str:
        """ "file" or "file:number", as messages name a record: one line of text, whatever the name."""
        return _place(self.path, number)


class Document(NamedTuple):
    """A text and where it stands; `str(document)` is "file" or "file:line"."""

    text: str
    path: Path | str
    line: int | None = None

    def __str__(self) -> str:
        return _place(self.path, self.line)


def _place(path: Path | str, number: int | None) -> str:
    name = printable(str(path))
    return name if number is None else f"{name}:{number}"


def printable(text: str) -> str:
    """A text of one line that every file and terminal takes."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class Piece(NamedTuple):
    """A part of one file, which a worker process reads by itself.

    Attributes:
        format: "jsonl", "text", "pdf", "parquet", "array", or "damaged" (see `damaged`).
        start, stop: what the format counts by: bytes (jsonl), rows (parquet, array), members of the archive (npz).
        data: what can only be read in order, and has been read: bytes (jsonl, text) or an Arrow stream (parquet). Of
            bytes, `stop - start - len(data)` more belong to the last line, which was too long to be kept.
        size: bytes of the input that the piece stands for; those of a file add up to its size at most, 0 if unknown.
        weight: bytes to hold and to encode, by which pieces are put together to units.
        reason: why it cannot be read (format "damaged").
    """

    file: SourceFile
    format: str
    start: int = 0
    stop: int | None = None
    data: bytes | None = None
    size: int = 0
    weight: int = 0
    reason: str | None = None


Unit = tuple[Piece, ...]


class Fault(NamedTuple):
    """A record that gives no document: its number within the piece, from 1 (None: all of the file), and why."""

    number: int | None
    reason: str


@dataclass(frozen=True)
class ReadOptions:
    """How records become documents. The limit holds for a line, a row or a file, whichever is a document.

    stop_at_fault: what comes behind the first record that gives no document need not be read.
    """

    record_text: RecordText
    max_document_bytes: int
    stop_at_fault: bool = False

    def fault_of(self, text: str) -> str | None:
        """Why a text is no document."""
        limit = self.max_document_bytes
        if not text or text.isspace():
            return EMPTY
        if len(text) * 4 > limit and (num_bytes := len(text.encode())) > limit:
            return self.too_large(num_bytes)
        return None

    def too_large(self, num_bytes: int) -> str:
        """The reason of a fault."""
        return (
            f"a document of {num_bytes:,} bytes is larger than the limit of {self.max_document_bytes:,}; split it, or "
            "raise the limit (--max_document_mb)"
        )


@dataclass
class PieceContent:
    """The documents of a piece.

    Attributes:
        texts, arrays: one of them has the documents: text, or token ids (format "array", each in its stored type).
        numbers: the record number of each document within the piece, from 1.
        num_records: records in the piece, blank lines counted, so that the next piece's numbers follow.
        faults: records that give no document, in order; an empty document has the reason EMPTY. Of those and of the
            others there are the first LISTED_FAULTS each.
        num_faults, num_empty: how many there are, listed or not; `num_faults` has the empty ones among them.
        numbered: a place is "file:number"; else the file is one document, and its place is "file".
    """

    texts: list[str] = field(default_factory=list)
    arrays: list[np.ndarray] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    num_records: int = 0
    faults: list[Fault] = field(default_factory=list)
    num_faults: int = 0
    num_empty: int = 0
    numbered: bool = True

    def add_text(self, text: str, options: ReadOptions) -> None:
        """The next record as a document, unless it is empty or too large."""
        if reason := options.fault_of(text):
            self.add_fault(reason)
        else:
            self.num_records += 1
            self.texts.append(text)
            self.numbers.append(self.num_records)

    def add_fault(self, reason: str) -> None:
        """The next record gives no document."""
        self.num_records += 1
        self.note_fault(self.num_records if self.numbered else None, reason)

    def note_fault(self, number: int | None, reason: str) -> None:
        """This record gives no document."""
        is_empty = reason == EMPTY
        self.num_faults += 1
        self.num_empty += is_empty
        if (self.num_empty if is_empty else self.num_faults - self.num_empty) <= LISTED_FAULTS:
            self.faults.append(Fault(number, reason))


def damaged(file: SourceFile, start: int, reason: str, size: int = 0) -> Piece:
    """The rest of a file, from `start` on, which cannot be read: no documents, and one fault without a number."""
    return Piece(file, "damaged", start, size=size, reason=reason)


def read_damaged(piece: Piece, options: ReadOptions) -> PieceContent:
    """The fault of a piece that `damaged` made."""
    content = PieceContent(numbered=False)
    content.note_fault(None, piece.reason)
    return content


def content_of(records: Iterable[object], options: ReadOptions) -> PieceContent:
    """The documents of records that have been read already."""
    content = PieceContent()
    texts, numbers = content.texts, content.numbers
    number = 0
    extract, surely_small = options.record_text.extract, options.max_document_bytes // 4
    for number, record in enumerate(records, 1):
        try:
            text = extract(record)
        except (ValueError, LookupError, TypeError):
            text = None
        if type(text) is str and text and len(text) <= surely_small and not text.isspace():
            reason = None
        else:
            try:
                reason = options.fault_of(options.record_text(record))
            except RecordFault as fault:
                reason = printable(str(fault))
        if reason is None:
            texts.append(text)
            numbers.append(number)
        else:
            content.note_fault(number, reason)
            if options.stop_at_fault:
                break
    content.num_records = number
    return content


@contextmanager
def open_file(file: SourceFile) -> Iterator[IO[bytes]]:
    """The file as it was found; UserError if it cannot be read or has changed since."""
    try:
        with open(file.path, "rb") as stream:
            status = os.fstat(stream.fileno())
            if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
                raise UserError(
                    f"{file.path} has changed since it was found; start again when nothing writes to it any more"
                )
            yield stream
    except OSError as error:
        raise UserError(f"cannot read {file.path}: {error.strerror or error}") from error
