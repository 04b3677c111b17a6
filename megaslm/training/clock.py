"""Where the time of a training step goes: the step says which phase it enters, a clock takes the time down.

The phases of a step, in the order in which they come: "data" (waiting for the micro-batches), then "forward" and
"backward" for each of them, "optimizer" (clipping and update). DeepSpeed reduces the gradients at the end of an
accumulation in ZeRO-1, so in "optimizer", and in every backward in ZeRO-2 and 3, so in "backward".
"""

import time

import torch

DATA, FORWARD, BACKWARD, OPTIMIZER, REST = PHASES = ("data", "forward", "backward", "optimizer", "rest")


class StepClock:
    """Takes down what it is told; this one does not."""

    def enter(self, phase: str) -> None:
        """End the current phase and begin `phase`. Waits for nothing."""


NO_CLOCK = StepClock()


class RecordingClock(StepClock):
    """Remembers when every phase began. A step begins with "data"."""

    def __init__(self):
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def enter(self, phase: str) -> None:
        self._marks.append((phase, self._now()))

    def steps(self) -> list[dict[str, float]]:
        """Seconds by phase of every step, which add up to its wall time. The phase that is not over is left out."""
        self._wait()
        found: list[dict[str, float]] = []
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if phase == DATA:
                found.append({})
            found[-1][phase] = found[-1].get(phase, 0.0) + self._seconds(begin, end)
        return found

    def _now(self):
        raise NotImplementedError

    def _wait(self) -> None:
        """For what `_now` gave."""

    def _seconds(self, begin, end) -> float:
        return end - begin


class HostClock(RecordingClock):
    """Of a processor that computes what it is asked before it returns."""

    def _now(self) -> float:
        return time.perf_counter()


class DeviceClock(RecordingClock):
    """Of a GPU: times are those at which its current stream came by. Only `steps` waits for it."""

    def _now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _wait(self) -> None:
        self._marks[-1][1].synchronize()

    def _seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1e3
