"""Which files an input names, and how each is read."""

import errno
import glob
import hashlib
import itertools
import os
import stat
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from megaslm.data.sources.records import SourceFile
from megaslm.data.token_file import TOKENIZER_SUFFIX
from megaslm.errors import UserError

PYTHON_STDLIB = "python-stdlib"
COMPRESSED_SUFFIXES = (".gz", ".zst")
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".npy": "array",
    ".npz": "array",
    ".pdf": "pdf",
}  # and text
# In folders .json is left out: there it is more often a settings file than lines of records.
FOLDER_SUFFIXES = tuple(
    ".jsonl .ndjson .jsonl.gz .jsonl.zst .ndjson.gz .ndjson.zst .json.gz .json.zst .parquet .npy .npz .pdf .txt "
    ".txt.gz .txt.zst .text .md .rst .tex .py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts .sh".split()
)
# What tokenizing writes: copies of tokenizers, what is done so far, the list of records that were left out.
OUR_SUFFIXES = (TOKENIZER_SUFFIX, ".work", ".skipped.jsonl")
STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def format_of(path: Path) -> tuple[str, str | None]:
    """Format and compression ("gz", "zst" or None) by the ending; what has no ending of a format is text."""
    suffix, compression = path.suffix.lower(), None
    if suffix in COMPRESSED_SUFFIXES:
        suffix, compression = path.with_suffix("").suffix.lower(), suffix[1:]
    form = FORMATS.get(suffix, "text")
    return form if compression is None or form == "jsonl" else "text", compression


def find(given: str) -> tuple[list[SourceFile], int]:
    """The files that one input names, and how many others were left out: of its folders, or second names of a file."""
    if given == PYTHON_STDLIB:
        return _find_stdlib(), 0
    path = Path(given)
    status = _status(path)
    if status is None:
        if glob.has_magic(given):
            return _find_matches(given)
        raise UserError(
            f"input {given} does not exist; it is no file, folder or glob, nor {PYTHON_STDLIB}, - (standard "
            "input), hf:FOLDER or hf://ORG/NAME (Hugging Face datasets)"
        )
    if stat.S_ISDIR(status.st_mode):
        return _find_in_folder(path)
    if stat.S_ISFIFO(status.st_mode):
        raise UserError(f"input {given} is a pipe; give the data as - (standard input)")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"input {given} is neither a file nor a folder")
    return [_source_file(path, path.name, status)], 0


def in_order(files: Iterable[SourceFile]) -> list[SourceFile]:
    """By the hash of their names. UserError if a file is there twice."""
    ordered = sorted(files, key=lambda file: (hashlib.blake2b(os.fsencode(file.name)).digest(), str(file.path)))
    seen: set[object] = set()
    for file in ordered:
        if file.key in seen:
            raise UserError(f"{file.path} is in the input twice; name every file once (folders and globs overlap?)")
        seen.add(file.key)
    return ordered


def _find_matches(pattern: str) -> tuple[list[SourceFile], int]:
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))
    matches, others = [], set()
    for path in map(Path, sorted(glob.glob(pattern, recursive=True))):
        if any(map(_is_ours, path.parts[len(fixed) :])):
            continue
        status = _status(path)
        if status is not None and stat.S_ISDIR(status.st_mode):
            of_folder, left_out = _search(path)
            matches += of_folder
            others |= left_out
        else:
            matches.append(path)
    _check_readable(pattern)
    files, unread = _regular_files(matches, Path(*fixed))
    if not files:
        raise UserError(f"no file matches the input {pattern}")
    return files, len(others.difference(matches)) + unread


def _check_readable(pattern: str) -> None:
    """UserError if one of the folders that a glob lists cannot be read; it passes over them in silence."""
    parts = Path(pattern).parts
    for depth, part in enumerate(parts):
        if not glob.has_magic(part):
            continue
        listed = Path(*parts[: depth + (part == "**")])
        for folder in glob.iglob(f"{listed}/", recursive=True):
            try:
                os.scandir(folder).close()
            except OSError as error:
                _raise_unreadable(error)


def _find_in_folder(folder: Path) -> tuple[list[SourceFile], int]:
    found, others = _search(folder)
    files, unread = _regular_files(found, folder)
    if not files:
        raise UserError(
            f"folder {folder} has no file to read; looked below it for {' '.join(FOLDER_SUFFIXES)} and found "
            f"{len(others) + unread} other files (give them by name or glob, if they are text)"
        )
    return files, len(others) + unread


def _search(folder: Path) -> tuple[list[Path], set[Path]]:
    """What in a folder looks like files to read, and all other files."""
    found, others = [], set()
    for path in _walk(folder, skip=lambda name: name.startswith(".") or _is_ours(name)):
        if path.name.lower().endswith(FOLDER_SUFFIXES):
            found.append(path)
        else:
            others.add(path)
    return found, others


def _is_ours(name: str) -> bool:
    return name.endswith(OUR_SUFFIXES)


def _regular_files(paths: Iterable[Path], root: Path) -> tuple[list[SourceFile], int]:
    """The files, each under the first of its names, and the number of other names, broken links, pipes and the like."""
    files: dict[object, SourceFile] = {}
    paths = dict.fromkeys(paths)
    for path in paths:
        status = _status(path)
        if status is not None and stat.S_ISREG(status.st_mode):
            file = _source_file(path, path.relative_to(root).as_posix(), status)
            files.setdefault(file.key, file)
    return list(files.values()), len(paths) - len(files)


def _walk(folder: Path, skip: Callable[[str], bool]) -> Iterator[Path]:
    """All files below a folder, in an order of their names; links are followed, and no folder is read twice."""
    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not skip(name))
        yield from (Path(parent, name) for name in sorted(names) if not skip(name))


def _raise_unreadable(error: OSError) -> None:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def _status(path: Path) -> os.stat_result | None:
    """None where nothing is there, or a link to nothing. UserError where that cannot be known."""
    try:
        return path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _source_file(path: Path, name: str, status: os.stat_result) -> SourceFile:
    inode = (status.st_dev, status.st_ino)
    return SourceFile(path, name, status.st_size, status.st_mtime_ns, os.path.abspath(path), inode=inode)


def _find_stdlib() -> list[SourceFile]:
    root = Path(sysconfig.get_path("stdlib"))
    found = (path for path in _walk(root, skip=STDLIB_EXCLUDED.__contains__) if path.suffix == ".py")
    files, _ = _regular_files(found, root)
    if not files:
        raise UserError(f"{PYTHON_STDLIB}: this interpreter has no .py files under {root}; give another input")
    return files
