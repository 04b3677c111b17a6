"""One save at a time in a thread of its own, so that training goes on while a checkpoint is written."""

import threading
from collections.abc import Callable

from megaslm.parallel import host


class BackgroundSave:
    """Runs one collective piece of work beside the training, on all ranks; the next one waits for the last.

    The thread has a process group of its own: its messages can't mix with those of the training. It ends with the
    process: a save that is cut off leaves a hidden folder, which nobody reads and the next save clears.

    Made by all ranks together.
    """

    def __init__(self) -> None:
        self._group = host.new_group()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work`, after what is still running. Collective. Raises what `wait` raises."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,), name="save", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is running. Raises, once, what the work raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self, work: Callable[[], None]) -> None:
        try:
            with host.using(self._group):
                work()
        except BaseException as error:  # for the main thread, which raises it where it can be handled
            self._failure = error
