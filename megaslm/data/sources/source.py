"""The documents of all inputs: one after the other, or in units of work for many processes."""

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from megaslm.data.sources import arrays, files, huggingface, jsonl, parquet, pdf, streams, text
from megaslm.data.sources.fields import RecordText
from megaslm.data.sources.records import (
    EMPTY,
    Document,
    Piece,
    PieceContent,
    ReadOptions,
    SourceFile,
    Unit,
    read_damaged,
)
from megaslm.errors import UserError

UNIT_BYTES = 8 << 20
PIECE_BYTES = 1 << 12  # what a piece counts for at least, so that a unit has some thousand small files at most
RECORD_FORMATS = ("jsonl", "parquet")
FORMATS = {"jsonl": jsonl, "text": text, "pdf": pdf, "parquet": parquet, "array": arrays}
READERS = {name: form.read for name, form in FORMATS.items()} | {"damaged": read_damaged}
STDIN = "-"
STDIN_FILE = SourceFile("standard input", STDIN, 0, 0, STDIN, "stdin")
STDIN_FORMATS = ("jsonl", "text")


@dataclass
class TextSource:
    """The documents of `inputs` (one, or several); files are found once.

    Attributes:
        text_key: the field of a record that holds its text.
        template: several fields instead, as in "Q: {question}\\nA: {answer}".
        stdin_format: what standard input is, "jsonl" (None: that) or "text" (one document).
        max_document_bytes: a line, row or file beyond it gives no document. Reading one takes several times its size
            of memory.
        options: how records become documents, made of the above.
        files: what is read, in order.
        num_other_files: what was left out of folders: files of other endings, second names (links) of a file, broken
            links, and what is no file.
        num_empty_files: text files of no bytes, which were left out.
        num_empty: documents without a visible character that the last complete iteration skipped.

    UserError on construction where an input gives no file or an option is wrong, and while units are made or read where
    a file cannot be opened or has changed. What of a file is damaged gives a fault in its place; iteration raises
    UserError for it, as for a record that gives no document, naming file and record.
    """

    inputs: Sequence[str | os.PathLike] | str | os.PathLike
    text_key: str = "text"
    template: str | None = None
    stdin_format: str | None = None
    max_document_bytes: int = 64 << 20
    options: ReadOptions = field(init=False, repr=False)
    files: list[SourceFile] = field(init=False, repr=False)
    num_other_files: int = field(init=False, default=0)
    num_empty_files: int = field(init=False, default=0)
    num_empty: int = field(init=False, default=0)
    _stdin_is_read: bool = field(init=False, default=False, repr=False)

    def __post_init__(self):
        inputs = [self.inputs] if isinstance(self.inputs, str | os.PathLike) else self.inputs
        inputs = list(map(os.fspath, inputs))
        if self.stdin_format is None:
            self.stdin_format = STDIN_FORMATS[0]
        elif self.stdin_format not in STDIN_FORMATS:
            raise UserError(f"stdin_format {self.stdin_format!r} is none of {', '.join(STDIN_FORMATS)}")
        elif STDIN not in inputs:
            raise UserError(
                f"stdin_format {self.stdin_format} is given, but standard input is not among the inputs: name it as "
                f"{STDIN}, or leave stdin_format out"
            )
        if self.max_document_bytes < 1:
            raise UserError(f"max_document_bytes {self.max_document_bytes} must be at least 1")
        self.options = ReadOptions(RecordText(self.text_key, self.template), self.max_document_bytes)
        found: list[SourceFile] = []
        for given in inputs:
            if given == STDIN:
                found.append(STDIN_FILE)
            elif given.startswith(huggingface.PREFIX):
                found.append(huggingface.find(given))
            else:
                in_input, others = files.find(given)
                found += in_input
                self.num_other_files += others
        if not found:
            raise UserError("no input was given; name files, folders, globs, or python-stdlib")
        self.files = files.in_order(filter(_has_content, found))
        self.num_empty_files = len(found) - len(self.files)
        if not self.files:
            raise UserError(f"the input is empty: all {len(found):,} files of it have no bytes")

    def __getstate__(self) -> dict:
        """Without the files, of which there may be millions: `read` needs the options alone."""
        return vars(self) | {"inputs": (), "files": []}

    @property
    def num_bytes(self) -> int:
        """Size of all files, as far as it is known."""
        return sum(file.size for file in self.files)

    @property
    def record_options(self) -> dict[str, str | None]:
        """Of the options above those on which the documents of these files depend, by their names."""
        options = {}
        if any(map(self._has_records, self.files)):
            options |= {"text_key": self.text_key, "template": self.template}
        if any(file.kind == "stdin" for file in self.files):
            options["stdin_format"] = self.stdin_format
        return options

    def _has_records(self, file: SourceFile) -> bool:
        if file.kind == "file":
            return files.format_of(file.path)[0] in RECORD_FORMATS
        return file.kind == "dataset" or self.stdin_format == "jsonl"

    def units(self, files: Sequence[SourceFile] | None = None) -> Iterator[Unit]:
        """All pieces of the files (None: of all) in order, put together to units of about UNIT_BYTES."""
        unit: list[Piece] = []
        weight = 0
        for file in self.files if files is None else files:
            for piece in self._plan(file):
                of_piece = max(piece.weight, PIECE_BYTES)
                if unit and weight + of_piece > UNIT_BYTES:
                    yield tuple(unit)
                    unit, weight = [], 0
                unit.append(piece)
                weight += of_piece
        if unit:
            yield tuple(unit)

    def read(self, piece: Piece, stop_at_fault: bool = False) -> PieceContent:
        """The documents of one piece; depends on the piece and the options alone.

        stop_at_fault: for a caller who goes no further than the first record that gives no document.
        """
        options = replace(self.options, stop_at_fault=True) if stop_at_fault else self.options
        return READERS[piece.format](piece, options)

    def identity(self, unit: Unit) -> str:
        """Hash of what the unit reads: the same in a later run on the same files."""
        digest = hashlib.blake2b(digest_size=16)
        for piece in unit:
            file = piece.file
            parts = (file.location, file.name, file.size, file.mtime_ns, piece.format, piece.start, piece.stop)
            digest.update(repr(parts).encode())
            if piece.data is not None and not file.mtime_ns:  # only the content tells whether it is the same
                digest.update(piece.data)
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Document]:
        empty = 0
        pieces = itertools.chain.from_iterable(self.units())
        for file, of_file in itertools.groupby(pieces, key=lambda piece: piece.file):
            before = 0  # records in the pieces of this file so far
            for piece in of_file:
                content = self.read(piece)
                empty += content.num_empty
                yield from _documents(file, content, before)
                before += content.num_records
        self.num_empty = empty

    def _plan(self, file: SourceFile) -> Iterator[Piece]:
        if file.kind == "stdin":
            if self._stdin_is_read:
                raise UserError("standard input can be read only once; write it to a file, and give that")
            self._stdin_is_read = True
            return streams.plan_stdin(file, self.stdin_format, self.options, UNIT_BYTES)
        if file.kind == "dataset":
            return huggingface.plan(file, self.options, UNIT_BYTES)
        form, compression = files.format_of(file.path)
        if form == "jsonl" and compression:
            return streams.plan(file, self.options, UNIT_BYTES)
        return FORMATS[form].plan(file, self.options, UNIT_BYTES)


def _has_content(file: SourceFile) -> bool:
    """Of an empty text file nothing is left to say; of other formats it is for the reader."""
    return file.size > 0 or file.kind != "file" or files.format_of(file.path) != ("text", None)


def _documents(file: SourceFile, content: PieceContent, before: int) -> Iterator[Document]:
    """Up to the first fault, which is raised; empty documents are none."""
    if content.arrays:
        raise UserError(f"{file.path} holds token ids, and this needs text")
    fault = next((fault for fault in content.faults if fault.reason != EMPTY), None)
    for number, document in zip(content.numbers, content.texts, strict=True):
        if fault is not None and fault.number is not None and number > fault.number:
            break
        yield Document(document, file.path, before + number if content.numbered else None)
    if fault is not None:
        number = None if fault.number is None else before + fault.number
        raise UserError(f"{file.place(number)}: {fault.reason}")
