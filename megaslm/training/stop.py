"""When to stop before the end: a signal, a launcher that is gone, or the time limit. All ranks at the same step.

A signal may reach one rank only, so each step's flag is all-reduced. The reduction of step k runs beside the next step
and is read after it: no rank waits.
"""

import contextlib
import os
import signal
import time

import torch
import torch.distributed as dist

from megaslm import launchers
from megaslm.parallel import Ranks

# Codes that travel between the ranks; a signal travels as its own number.
RUNNING, TIME_LIMIT, LAUNCHER_GONE = 0, 1001, 1002
LOOK_INTERVAL_SECONDS = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Collects reasons to stop; `agreed()` is called once a step by all ranks."""

    def __init__(self, ranks: Ranks, max_seconds: float | None):
        self._ranks = ranks
        self._deadline = time.monotonic() + max_seconds if max_seconds else None
        self._reason = RUNNING
        # Without a launcher the parent is a shell, whose end (a closed terminal under nohup) is no reason to stop.
        self._ancestors = launchers.AT_START if ranks.launched else []
        self._looked = time.monotonic()
        self._pending = None
        self._previous_handlers = {}

    def __enter__(self):
        for number in SIGNALS:
            self._previous_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_):
        if self._pending is not None:
            self._pending[0].wait()
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number, _frame):
        # A launcher passes a Ctrl-C on as SIGTERM: that is the same wish again. A second Ctrl-C means now.
        if number == signal.SIGINT and self._reason == signal.SIGINT:
            raise KeyboardInterrupt
        if self._reason != RUNNING:
            return
        self._reason = int(number)
        if self._ranks.is_first:
            # Not print: the signal may have come in the middle of one.
            with contextlib.suppress(OSError):
                os.write(1, f"{signal.Signals(number).name}: saving after this step, then leaving\n".encode())

    def _launcher_is_gone(self) -> bool:
        if not self._ancestors or time.monotonic() - self._looked < LOOK_INTERVAL_SECONDS:
            return False
        self._looked = time.monotonic()
        return self._ancestors != launchers.find_launchers()[: len(self._ancestors)]

    def _look(self) -> int:
        if self._reason == RUNNING:
            if self._deadline and time.monotonic() > self._deadline:
                self._reason = TIME_LIMIT
            elif self._launcher_is_gone():
                self._reason = LAUNCHER_GONE
        return self._reason

    def agreed(self) -> str | None:
        """Why all ranks stop after this step, or None to go on."""
        if self._ranks.world_size == 1:
            return self._name(self._look())
        reason = RUNNING
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            reason = int(flag)
        if reason == RUNNING:
            flag = torch.tensor(self._look(), dtype=torch.int32)
            self._pending = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._ranks.host_group, async_op=True), flag
        else:
            self._pending = None
        return self._name(reason)

    @staticmethod
    def _name(reason: int) -> str | None:
        if reason == RUNNING:
            return None
        if reason == TIME_LIMIT:
            return "time limit"
        if reason == LAUNCHER_GONE:
            return "launcher gone"
        return signal.Signals(reason).name
