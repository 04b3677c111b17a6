"""What readers and writers of files share."""

import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """work(item) of every item, each in a thread of its own, in the order of the items.

    For a few large files: reading, writing and hashing leave the interpreter's lock alone. Unlike those of an executor
    the threads end with the process: an interrupted one need not finish its gigabytes first.

    Raises what the first item in order raised, after all have ended.
    """
    results: dict[int, Result] = {}
    failures: dict[int, BaseException] = {}

    def run(i: int, item: Item) -> None:
        try:
            results[i] = work(item)
        except BaseException as error:
            failures[i] = error

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(items)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[min(failures)]
    return [results[i] for i in range(len(threads))]


def flush_to_disk(file) -> None:
    """Wait until the device holds what was written to an open file."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable: wait until its names are on the disk.

    Windows cannot open folders, and needs no such thing.
    """
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
