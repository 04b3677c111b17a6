"""A run's saves: in the background or at once, what a failure means, and which checkpoints stay."""

import contextlib
import gc
import time
from collections.abc import Callable
from pathlib import Path

from megaslm.checkpoint import (
    BackgroundSave,
    HostBuffers,
    NoHostMemory,
    Retention,
    SaveFailed,
    Snapshot,
    apply_retention,
)
from megaslm.config import CheckpointConfig
from megaslm.errors import UserError
from megaslm.parallel import host

# For a save that is under way when the process ends for another reason: the other ranks may be gone for good.
LAST_WAIT_SECONDS = 600


class Saving:
    """Saves of one run, each step at most once. Made and used by all ranks together.

    A save on the way that fails is reported, and the run goes on with the checkpoints that it has; the last save of a
    process is written at once, and its failure ends the process: what it trained would be lost without a word.
    """

    def __init__(self, config: CheckpointConfig, say: Callable[..., None], saved_step: int | None):
        self._say = say
        self._background = BackgroundSave() if config.background else None
        self._buffers = HostBuffers()
        self._retention = Retention(
            config.keep_last, config.keep_every, keep_best=config.keep_best, rolling_names=config.rolling_names
        )
        self._step = saved_step  # of the last save, on the disk or under way; None where it failed

    def save(self, step: int, take: Callable[[HostBuffers | None], Snapshot], last: bool) -> None:
        """Save the state of `step`, unless that is done or under way. Collective.

        Args:
            take: takes the snapshot; to these buffers, or, given None, without a copy.
            last: this process ends after it.

        Raises:
            UserError: the last save failed. (And a fault of ours in an earlier one.)
        """
        if step == self._step and not last:
            return
        started = time.perf_counter()
        self._wait()
        if step == self._step:
            return
        self._step = step
        if self._background is not None and not last:
            try:
                snapshot = take(self._buffers)
            except NoHostMemory as error:
                self._say(f"warning: {error}; training waits until the checkpoint is written")
            else:
                waited = time.perf_counter() - started
                self._background.start(lambda: self._write(snapshot, waited))
                return
        if not self._write(take(None), None, last):
            self._step = None

    def finish_running(self) -> None:
        """Let a save that is under way come to its end while the process is ending for another reason."""
        with contextlib.suppress(Exception):  # that reason is the one to hear of
            self._wait(LAST_WAIT_SECONDS)

    def _wait(self, timeout: float | None = None) -> None:
        # What the thread found is looked at here alone, where all ranks are at the same point.
        if self._background is not None and self._background.wait(timeout) is False:
            self._step = None

    def _write(self, snapshot: Snapshot, waited: float | None, last: bool = False) -> bool:
        """Whether the checkpoint is on the disk. Collective; in the thread of the background save, or in the main one.

        Args:
            waited: seconds that training was held up; None where it waits to the end.
        """
        started = time.perf_counter()
        try:
            path = snapshot.write()
        except SaveFailed as error:
            if last:
                raise UserError(f"{error} and run the same command again") from error
            message = str(error)
        else:
            if host.rank() == 0:
                seconds = time.perf_counter() - started
                beside = "" if waited is None else f"; training waited {waited:.2f} s"
                self._say(f"saved {path} ({_size(path)} in {seconds:.1f} s{beside})")
            apply_retention(path.parent, self._retention)
            return True
        self._say(f"warning: {message}. The run goes on")
        gc.collect()  # the error's frames hold the copy of the state, and each other
        return False


def _size(folder: Path) -> str:
    with contextlib.suppress(OSError):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
    return "size unknown"
