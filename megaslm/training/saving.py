"""A run's saves: in the background or at once, what a failure means, and which checkpoints stay."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from megaslm.checkpoint import BackgroundSave, Retention, SaveFailed, Snapshot, apply_retention, clear_leftovers
from megaslm.config import CheckpointConfig
from megaslm.errors import UserError
from megaslm.training.run_dir import lock_run_dir


class Saving:
    """Saves of one run, each step at most once. Made and used by all ranks together.

    A save on the way that fails is reported, and the run goes on with the checkpoints that it has; the last save of a
    process is written at once, and its failure ends the process: what it trained would be lost without a word.
    """

    def __init__(self, config: CheckpointConfig, say: Callable[..., None], saved_step: int | None):
        self._say = say
        self._background = BackgroundSave() if config.background else None
        self._retention = Retention(
            config.keep_last, config.keep_every, keep_best=config.keep_best, rolling_names=config.rolling_names
        )
        self._step = saved_step  # of the last save, on the disk or under way; None where it failed

    def save(self, step: int, take: Callable[[bool], Snapshot], last: bool) -> None:
        """Save the state of `step`, unless that is done or under way.

        Args:
            take: takes the snapshot; its argument says whether it must be a copy.
            last: this process ends after it.

        Raises:
            UserError: the last save failed.
        """
        if step == self._step and not last:
            return
        self._wait()
        if step == self._step:
            return
        in_background = self._background is not None and not last
        started = time.perf_counter()
        snapshot = take(in_background)
        waited = time.perf_counter() - started if in_background else None
        self._step = step
        if in_background:
            self._background.start(lambda: self._write(snapshot, waited))
        else:
            self._write(snapshot, waited, last)

    def finish_running(self) -> None:
        """Let a save that is under way come to its end while the process is ending for another reason."""
        with contextlib.suppress(Exception):  # that reason is the one to hear of
            self._wait()

    def _wait(self) -> None:
        if self._background is not None:
            self._background.wait()

    def _write(self, snapshot: Snapshot, waited: float | None, last: bool = False) -> None:
        """Collective; in the thread of the background save, or in the main one."""
        started = time.perf_counter()
        try:
            path = snapshot.write()
        except SaveFailed as error:
            self._step = None
            if last:
                raise UserError(f"{error} and run the same command again") from error
            self._say(f"warning: {error}. The run goes on")
            return
        seconds = time.perf_counter() - started
        beside = "" if waited is None else f"; training waited {waited:.2f} s"
        self._say(f"saved {path} ({_size(path)} in {seconds:.1f} s{beside})")
        apply_retention(path.parent, self._retention)


def clear_finished(run_dir: Path) -> None:
    """Delete what a kill right after the last save left half deleted: no save is to come that would. Local."""
    directory = run_dir / "checkpoints"
    if any(directory.glob(".*")):
        with contextlib.suppress(UserError, OSError):  # in use, or not writable: no harm in what lies there
            with lock_run_dir(run_dir):
                clear_leftovers(directory)


def _size(folder: Path) -> str:
    with contextlib.suppress(OSError):
        size = sum(file.stat().st_size for file in folder.iterdir())
        return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
    return "size unknown"
