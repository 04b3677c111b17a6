"""Documents from raw text: jsonl files, text files, folders, globs, and the standard library's own source.

Inputs:
    FILE.jsonl, FILE.ndjson, FILE.json   one JSON object a line, its text in the field `text_key`; each is a document
    any other file                       UTF-8 text, one file is one document
    FOLDER                               every file below it that ends in one of FOLDER_SUFFIXES; hidden ones and
                                         folders named *.tokenizer (copies of tokenizers) are left out
    GLOB                                 `*`, `?`, `[...]` and `**`; every file it matches
    python-stdlib                        the .py files of the running interpreter's standard library, tests left out

Files are read in the order of a hash of their names (relative to the input), whatever the order of the inputs or of the
file system, so that a contiguous part of the documents is a fair sample of all. Documents of one file keep their order.
Line ends and all other characters are kept as they are; only a byte order mark at the start of a file is dropped.
"""

import glob
import hashlib
import itertools
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import orjson

from megaslm.data.token_file import TOKENIZER_SUFFIX
from megaslm.errors import UserError

PYTHON_STDLIB = "python-stdlib"
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
# In folders .json is left out: there it is more often a settings file than lines of records.
FOLDER_SUFFIXES = tuple(
    ".jsonl .ndjson .txt .text .md .rst .tex .py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts .sh".split()
)
STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class SourceFile(NamedTuple):
    """A file to read: `name` is its path relative to the input it was found under, `size` is in bytes."""

    path: Path
    name: str
    size: int
    mtime_ns: int


class Document(NamedTuple):
    """A text and where it stands; `str(document)` is "file" or "file:line"."""

    text: str
    path: Path
    line: int | None = None

    def __str__(self) -> str:
        return str(self.path) if self.line is None else f"{self.path}:{self.line}"


@dataclass
class TextSource:
    """The documents of `inputs`; iterate as often as needed, files are found once.

    Attributes:
        files: what is read, in order.
        num_other_files: files in folders that were left out because of their ending.
        num_empty: documents without a visible character that the last complete iteration skipped.

    UserError on construction where an input gives no file, and during iteration for broken JSON, a missing or non-text
    field and invalid UTF-8, naming file and line.
    """

    inputs: Sequence[str | os.PathLike]
    text_key: str = "text"

    def __post_init__(self):
        self.files: list[SourceFile] = []
        self.num_other_files = 0
        self.num_empty = 0
        for given in map(os.fspath, self.inputs):
            self.files.extend(self._find(given))
        if not self.files:
            raise UserError("no input was given; name jsonl files, text files, folders, globs, or python-stdlib")
        self.files.sort(key=lambda file: (hashlib.blake2b(os.fsencode(file.name)).digest(), str(file.path)))
        seen: set[Path] = set()
        for file in self.files:
            path = file.path.resolve()
            if path in seen:
                raise UserError(f"{file.path} is in the input twice; name every file once (folders and globs overlap?)")
            seen.add(path)

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)

    def __iter__(self) -> Iterator[Document]:
        empty = 0
        for file in self.files:
            read = _read_jsonl if file.path.suffix.lower() in JSONL_SUFFIXES else _read_text
            for document in read(file.path, self.text_key):
                if document.text and not document.text.isspace():
                    yield document
                else:
                    empty += 1
        self.num_empty = empty

    def _find(self, given: str) -> list[SourceFile]:
        if given == PYTHON_STDLIB:
            return _find_stdlib()
        path = Path(given)
        if path.is_file():
            return [_source_file(path, path.name)]
        if path.is_dir():
            return self._find_in_folder(path)
        if glob.has_magic(given):
            files = [Path(match) for match in sorted(glob.glob(given, recursive=True)) if Path(match).is_file()]
            if not files:
                raise UserError(f"no file matches the input {given}")
            fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
            return [_source_file(file, Path(*file.parts[len(fixed) :]).as_posix()) for file in files]
        raise UserError(f"input {given} does not exist; it is no file, folder or glob, nor the name {PYTHON_STDLIB}")

    def _find_in_folder(self, folder: Path) -> list[SourceFile]:
        files, others = [], 0
        for path in _walk(folder, skip=lambda name: name.startswith(".") or name.endswith(TOKENIZER_SUFFIX)):
            if path.name.startswith("."):
                continue
            if path.suffix.lower() in FOLDER_SUFFIXES:
                files.append(_source_file(path, path.relative_to(folder).as_posix()))
            else:
                others += 1
        if not files:
            raise UserError(
                f"folder {folder} has no file to read; looked below it for {' '.join(FOLDER_SUFFIXES)} and found "
                f"{others} other files (give them by name or glob, if they are text)"
            )
        self.num_other_files += others
        return files


def _walk(folder: Path, skip) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = sorted(name for name in folders if not skip(name))
        yield from (Path(parent, name) for name in sorted(names))


def _raise_unreadable(error: OSError) -> None:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def _source_file(path: Path, name: str) -> SourceFile:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return SourceFile(path, name, status.st_size, status.st_mtime_ns)


def _find_stdlib() -> list[SourceFile]:
    root = Path(sysconfig.get_path("stdlib"))
    found = [path for path in _walk(root, skip=STDLIB_EXCLUDED.__contains__) if path.suffix == ".py" and path.is_file()]
    if not found:
        raise UserError(f"{PYTHON_STDLIB}: this interpreter has no .py files under {root}; give another input")
    return [_source_file(path, path.relative_to(root).as_posix()) for path in found]


def _read_text(path: Path, _text_key: str) -> Iterator[Document]:
    data = _read_bytes(path)
    try:
        yield Document(data.removeprefix(BYTE_ORDER_MARK).decode(), path)
    except UnicodeDecodeError as error:
        at = error.start + len(data) - len(error.object)
        line = data.count(b"\n", 0, at) + 1
        raise UserError(
            f"{path}: byte {at} (line {line}) is not valid UTF-8; convert the file to UTF-8, or decompress it"
        ) from None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _read_jsonl(path: Path, text_key: str) -> Iterator[Document]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                if not line.isspace():
                    yield Document(_text_of(line, text_key, path, number), path, number)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _text_of(line: bytes, text_key: str, path: Path, number: int) -> str:
    """The text field of one jsonl line."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError as invalid:
            raise UserError(f"{path}:{number}: byte {invalid.start} of the line is not valid UTF-8") from None
        raise UserError(
            f"{path}:{number}: broken JSON ({error.msg}, column {error.colno}); every line must be one JSON object"
        ) from None
    if not isinstance(record, dict):
        raise UserError(f"{path}:{number}: the line is a JSON {type(record).__name__}, not an object")
    if text_key not in record:
        keys = ", ".join(list(record)[:10]) or "none"
        raise UserError(f"{path}:{number}: the record has no field {text_key!r} (its fields: {keys}); see text_key")
    text = record[text_key]
    if not isinstance(text, str):
        raise UserError(f"{path}:{number}: field {text_key!r} is a {type(text).__name__}, not text")
    return text
