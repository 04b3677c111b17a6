"""Hugging Face datasets, streamed: the planning process reads rows, and hands them on as those of a parquet file.

    hf://ORG/NAME[/CONFIG][:SPLIT]   by its name on the hub
    hf:FOLDER[:SPLIT]                on disk: what `save_to_disk` wrote, or a folder of data files

SPLIT is "train" where none is given.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megaslm.data.sources import parquet
from megaslm.data.sources.records import Piece, ReadOptions, SourceFile, damaged
from megaslm.errors import UserError

if TYPE_CHECKING:
    import datasets
    import pyarrow

PREFIX = "hf:"
HUB = "hf://"
DEFAULT_SPLIT = "train"
BATCH_ROWS = 8  # which are read before their size is known
SAVED_FILES = ("state.json", "dataset_dict.json")  # of save_to_disk: a dataset, or one with splits


class Unreadable(Exception):
    """Why the rest of a dataset cannot be read."""


def find(given: str) -> SourceFile:
    """The dataset as one file, of known size and time where it lies on disk; it is not opened."""
    if given.startswith(HUB):
        address, split = _address_and_split(given)
        if not 1 <= address.count("/") <= 2:
            raise UserError(f"input {given} does not name a dataset; write {HUB}ORG/NAME[/CONFIG][:SPLIT]")
        return SourceFile(given, given, 0, 0, f"{HUB}{address}:{split or DEFAULT_SPLIT}", "dataset")
    try:
        folder, split = _folder_and_split(given)
        if not folder or not Path(folder).is_dir():
            raise UserError(f"input {given}: there is no folder {folder!r}; a dataset on the hub is {HUB}ORG/NAME")
        found = _data_files(Path(folder), split or DEFAULT_SPLIT)
        resolved = Path(folder).resolve()
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    size, mtime_ns = sum(status.st_size for status in found), max((status.st_mtime_ns for status in found), default=0)
    name = f"{PREFIX}{resolved.name}" + (f":{split}" if split and split != DEFAULT_SPLIT else "")
    return SourceFile(given, name, size, mtime_ns, f"{PREFIX}{resolved}:{split or DEFAULT_SPLIT}", "dataset")


def plan(file: SourceFile, options: ReadOptions, unit_bytes: int) -> Iterator[Piece]:
    """Rows put together to `unit_bytes`. UserError where the dataset cannot be opened, or the hub not be reached."""
    start, left = 0, file.size
    try:
        with _silent():
            for rows in _tables(_open(file), options, unit_bytes):
                size = min(left, rows.nbytes)
                left -= size
                yield parquet.as_piece(file, start, rows, size)
                start += rows.num_rows
    except Unreadable as reason:
        # On the hub all may be well the next time.
        if file.path.startswith(HUB):
            raise UserError(f"{file.place(None)}: {reason}") from reason
        yield damaged(file, start, str(reason), left)


@contextmanager
def _silent() -> Iterator[None]:
    """What goes wrong is raised, and said once."""
    from datasets.utils import logging as log

    before = log.get_verbosity()
    log.set_verbosity(log.CRITICAL)
    try:
        yield
    finally:
        log.set_verbosity(before)


def _tables(dataset: "datasets.IterableDataset", options: ReadOptions, unit_bytes: int) -> Iterator["pyarrow.Table"]:
    """The columns that are read, rows put together to `unit_bytes`."""
    names = list(options.record_text.names)

    def batches() -> Iterator["pyarrow.Table"]:
        for number, table in enumerate(dataset.with_format("arrow").iter(batch_size=BATCH_ROWS)):
            if number == 0 and dataset.features is None:  # which are known only where all rows are read, or none
                _check_columns(table.schema, options)
            yield table.select(names)

    try:
        if dataset.features is not None:
            _check_columns(dataset.features.arrow_schema, options)
            dataset = dataset.select_columns(names)
        yield from parquet.together(batches(), unit_bytes)
    except Unreadable:
        raise
    # Whatever the library, the network and the formats below raise, of which there is no list.
    except Exception as error:
        raise Unreadable(_unreadable(error)) from error


def _check_columns(schema: "pyarrow.Schema", options: ReadOptions) -> None:
    if fault := parquet.column_fault(schema, options):
        raise Unreadable(fault)


def _unreadable(error: Exception) -> str:
    reason = next(iter(str(error).splitlines()), "")
    return f"this cannot be read as a dataset ({type(error).__name__}: {reason})"


def _open(file: SourceFile) -> "datasets.IterableDataset":
    import datasets

    try:
        if file.path.startswith(HUB):
            address, split = _address_and_split(file.path)
            org, name, *config = address.split("/")
            return datasets.load_dataset(f"{org}/{name}", *config, split=split or DEFAULT_SPLIT, streaming=True)
        folder, split = _folder_and_split(file.path)
        if any(Path(folder, name).is_file() for name in SAVED_FILES):
            return _open_saved(folder, split)
        return datasets.load_dataset(folder, split=split or DEFAULT_SPLIT, streaming=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file.place(None)}: {_unreadable(error)}") from error


def _open_saved(folder: str, split: str) -> "datasets.IterableDataset":
    import datasets

    saved = datasets.load_from_disk(folder)
    if isinstance(saved, datasets.DatasetDict):
        if (split or DEFAULT_SPLIT) not in saved:
            raise UserError(f"{PREFIX}{folder} has no split {split or DEFAULT_SPLIT!r}, but {', '.join(saved)}")
        saved = saved[split or DEFAULT_SPLIT]
    elif split:
        raise UserError(f"{PREFIX}{folder} was saved without splits; leave out :{split}")
    return saved.to_iterable_dataset()


def _data_files(folder: Path, split: str) -> list[os.stat_result]:
    """Those whose path names the split, where any does, which is how the library finds them; else all."""

    def stop(error: OSError) -> None:
        raise error

    paths = [Path(parent, name) for parent, _, names in os.walk(folder, onerror=stop) for name in names]
    of_split = [path for path in paths if split in path.relative_to(folder).as_posix()]
    return [path.stat() for path in of_split or paths]


def _address_and_split(given: str) -> tuple[str, str]:
    """Of hf://ORG/NAME[/CONFIG][:SPLIT]; the split may be ""."""
    address, _, split = given.removeprefix(HUB).partition(":")
    return address.strip("/"), split


def _folder_and_split(given: str) -> tuple[str, str]:
    """Of hf:FOLDER[:SPLIT], the longest folder that is there; the split may be ""."""
    path = folder = given.removeprefix(PREFIX)
    while not Path(folder).is_dir() and ":" in folder:
        folder = folder.rpartition(":")[0]
    return (folder, path[len(folder) + 1 :]) if Path(folder).is_dir() else (path.partition(":")[0], "")
