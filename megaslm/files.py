"""What readers and writers of files share."""

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from megaslm.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
FILES_OF_OTHERS = 256  # that a process may have open beside those that it counts: sockets, libraries, logs
HOLDER_SECONDS = 0.1  # within which the one who has just got a lock has written its name


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


def allow_open_files(count: int) -> None:
    """Raise this process's own limit of open files so that `count` more may be, as far as the system lets it."""
    if os.name == "posix":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = count + FILES_OF_OTHERS
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def refuse_too_many_files(error: BaseException) -> None:
    """UserError if it is the process that can open no more files; nothing is known of the file then."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise UserError(
            f"no more files can be opened ({error.strerror}); allow this process more of them (ulimit -n)"
        ) from error


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


@contextlib.contextmanager
def sole_writer(output: Path, what: str = "folder") -> Iterator[None]:
    """One writer of `output` at a time.

    The lock is the kernel's, on the hidden file `.NAME.lock` beside it: it ends with the process, however that ends;
    the next one takes the file that was left. A file system without locks, or Windows, lets everyone pass.

    Args:
        output: what is written; the folder that it goes to is there.
        what: the kind of thing that it is, for the message.

    Raises:
        UserError: names the other process, which may be on another machine.
        OSError: the hidden file can't be made.
    """
    path = output.with_name(f".{output.name}.lock")
    descriptor = _lock(path, output, what)
    try:
        yield
    finally:
        # First the name, then the lock: who waits for neither finds no file, or one that is still locked.
        if descriptor is not None:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)


def _lock(path: Path, output: Path, what: str) -> int | None:
    """Descriptor of the locked file at `path`, which says who holds it; None where there is no such thing."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:
            if not path.exists():
                raise
            descriptor = os.open(path, os.O_RDONLY)  # another user's: to lock it, that is enough
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                time.sleep(HOLDER_SECONDS)
                holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
                os.close(descriptor)
                raise UserError(
                    f"{holder} is writing {output}: wait until it has ended, or choose another output {what}"
                ) from None
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                os.close(descriptor)
                raise
        if _is_at(descriptor, path):
            with contextlib.suppress(OSError):  # the lock holds without the name
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still there: who held it before may have removed it since the opening."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
