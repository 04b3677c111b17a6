"""One save at a time in a thread of its own, so that training goes on while a checkpoint is written."""

import threading
from collections.abc import Callable
from typing import Any

from megaslm.parallel import host


class BackgroundSave:
    """Runs one collective piece of work beside the training, on all ranks; the next one waits for the last.

    The thread has a process group of its own: its messages can't mix with those of the training. It ends with the
    process: a save that is cut off leaves a hidden folder, which nobody reads and the next save clears.

    Made by all ranks together, which then start the same work at the same point of the run.
    """

    def __init__(self) -> None:
        self._group = host.new_group()
        self._thread: threading.Thread | None = None
        self._result: Any = None
        self._failure: BaseException | None = None

    def start(self, work: Callable[[], Any]) -> None:
        """Begin `work`; nothing may be running."""
        assert self._thread is None, "wait() comes first"
        self._thread = threading.Thread(target=self._run, args=(work,), name="save", daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> Any:
        """Wait until nothing is running.

        Args:
            timeout: seconds; after them the work is left to itself.

        Returns:
            What the work returned, once; None where there was none.

        Raises what the work raised, once.
        """
        if self._thread is not None:
            self._thread.join(timeout)
            self._thread = None
        result, failure = self._result, self._failure
        self._result = self._failure = None
        if failure is not None:
            raise failure
        return result

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            with host.using(self._group):
                self._result = work()
        except BaseException as error:  # for the main thread, which raises it where it can be handled
            self._failure = error
