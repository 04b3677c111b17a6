"""Processes that encode units of the input, beside the one that appends them to the streams.

A signal that asks a build to end is for the process that waits: workers never get it, and are killed when that process
stops them, or end when it is gone, however that came. What they have not handed on is encoded again by the next run.
"""

import collections
import concurrent.futures
import contextlib
import functools
import multiprocessing
import multiprocessing.resource_tracker
import os
import pickle
import queue
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from megaslm.data.encoder import make_encoder
from megaslm.data.sources import TextSource, Unit
from megaslm.data.tokenizer import Tokenizer
from megaslm.data.unit_encoder import EncodedUnit, UnitEncoder, UnitFacts, UnitRules
from megaslm.data.work import CHUNK_BYTES, UNIT_SUFFIX, work_errors, write_all
from megaslm.errors import UserError
from megaslm.signals import signals_held

KILLED = -9  # exit code of a process that was sent SIGKILL


class WorkerProcesses:
    """Processes that encode units. They start at once, while this one has other things to do; a context manager.

    UserError if they cannot be started. stop_at_fault: see `UnitEncoder`.
    """

    def __init__(
        self, num_workers: int, source: TextSource, tokenizer: Tokenizer, rules: UnitRules, stop_at_fault: bool = False
    ):
        setup = pickle.dumps((source, tokenizer, rules, stop_at_fault))
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        # A thread waits for a worker: what does not fit into a pipe holds no one else up.
        self._threads = concurrent.futures.ThreadPoolExecutor(num_workers)
        multiprocessing.resource_tracker.ensure_running()  # or the first start does it, and drops the signal mask
        try:
            with signals_held():
                for _ in range(num_workers):
                    self._workers.append(_Worker())
        except OSError as error:
            self.stop()
            reason = f"cannot start {num_workers:,} worker processes: {error.strerror}"
            raise UserError(f"{reason}; use fewer --workers") from error
        except BaseException:
            self.stop()
            raise
        for worker in self._workers:
            self._threads.submit(self._ask, setup, worker)

    def encode(self, units: Iterable[Unit], encoder: str, folder: Path) -> Iterator[EncodedUnit]:
        """Encode units with the encoder of this name and give them in order; at most two per worker are under way.

        The workers' bytes come through files in `folder`. At the end, whatever it is, the workers are stopped.
        UserError if one of them ended by itself.
        """
        under_way: collections.deque = collections.deque()
        try:
            for number, unit in enumerate(units):
                path = folder / f"{os.getpid()}-{number}{UNIT_SUFFIX}"
                under_way.append((unit, path, self._threads.submit(self._ask, (unit, path, encoder))))
                if len(under_way) >= 2 * len(self._workers):
                    yield _finished(*under_way.popleft())
            while under_way:
                yield _finished(*under_way.popleft())
        finally:
            self.stop()
            for path in folder.glob(f"{os.getpid()}-*{UNIT_SUFFIX}"):
                path.unlink(missing_ok=True)

    def _ask(self, question: object, worker: "_Worker | None" = None) -> object:
        """In one of the threads: the answer of this worker, or of one that has nothing else to do."""
        worker = worker or self._idle.get()
        try:
            return worker.ask(question)
        finally:
            self._idle.put(worker)  # also one that is no more: nobody may wait for it

    def stop(self) -> None:
        """End the processes, whatever they are doing; nothing writes to the folder any more. It may be called again."""
        with signals_held():
            for worker in self._workers:
                worker.kill()
            self._threads.shutdown(cancel_futures=True)
            for worker in self._workers:
                worker.close()

    def __enter__(self) -> "WorkerProcesses":
        return self

    def __exit__(self, *exception) -> None:
        self.stop()


class _Worker:
    """A process that answers one question after the other, and our end of the pipe to it."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._has_answered = False
        self._fault: Exception | None = None
        with theirs:
            self._process.start()

    def ask(self, question: object) -> object:
        """The answer. An exception that is one is raised, now and ever after; UserError if the process has ended."""
        if self._fault is None:
            try:
                self._connection.send(question)
                answer = self._connection.recv()
            except (EOFError, OSError):
                self._fault = UserError(self._ending())
            else:
                self._has_answered = True
                if not isinstance(answer, Exception):
                    return answer
                self._fault = answer
        raise self._fault

    def _ending(self) -> str:
        self._process.join()
        code = self._process.exitcode
        if code == KILLED:
            return (
                "a worker process was killed, most likely because memory ran out: the same command with fewer "
                "--workers goes on where this one stopped"
            )
        if self._has_answered:
            return (
                f"a worker process ended by itself (exit code {code}), see above for what it said: the same command "
                "goes on where this one stopped"
            )
        return (
            f"a worker process ended before it could start (exit code {code}), see above for what it said: a script "
            'that uses workers is a file, and has the guard `if __name__ == "__main__":`; or it has workers=0'
        )

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.join()
        self._connection.close()


def _finished(unit: Unit, path: Path, future: concurrent.futures.Future) -> EncodedUnit:
    sizes, facts = future.result()
    return unit, facts, _chunks(path, sizes)


def _chunks(path: Path, sizes: Sequence[tuple[str, int]]) -> Iterator[tuple[str, memoryview]]:
    """The bytes of a unit's file by the names they go to; the file is then removed."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        for name, size in sizes:
            while size:
                count = file.readinto(buffer[: min(size, CHUNK_BYTES)])
                assert count, f"{path} is shorter than it was written"
                yield name, buffer[:count]
                size -= count
    path.unlink()


# --- in the worker ----------------------------------------------------------------------------------------------------


def _serve(connection: Connection) -> None:
    """Answer what comes: first the pickled attributes of a UnitEncoder, with None; then units, see `_encode_to_file`.

    Leaves with the process that started this one, however that ends.
    """
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
    with contextlib.suppress(EOFError, OSError):
        source, tokenizer, rules, stop_at_fault = pickle.loads(connection.recv())
        connection.send(None)

        @functools.cache
        def unit_encoder(name: str) -> UnitEncoder:
            return UnitEncoder(source, tokenizer, make_encoder(name, tokenizer, parallel=False), rules, stop_at_fault)

        while True:
            unit, path, encoder = connection.recv()
            connection.send(_answer(unit, path, unit_encoder, encoder))


def _answer(unit: Unit, path: Path, unit_encoder, encoder: str) -> object:
    """What `_encode_to_file` returns, or the exception."""
    try:
        return _encode_to_file(unit, path, unit_encoder(encoder))
    except (UserError, MemoryError) as error:
        return error
    except BaseException:  # a fault of ours, or a panic in Rust, which does not travel
        return RuntimeError(f"in a worker process:\n{traceback.format_exc()}")


def _leave_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_to_file(unit: Unit, path: Path, encode: UnitEncoder) -> tuple[list[tuple[str, int]], UnitFacts]:
    """Write the columns of a unit to `path`; return their names and sizes in bytes, in the order of the file."""
    columns, facts = encode(unit)
    with work_errors(path.parent), open(path, "wb", buffering=0) as file:
        for arrays in columns.values():
            for array in arrays:
                write_all(file, array)
    return [(name, sum(array.nbytes for array in arrays)) for name, arrays in columns.items()], facts
