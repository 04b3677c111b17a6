"""How busy a GPU was in each phase of a step, from a trace of torch.profiler.

The profiler costs the host time, and what a kernel takes not: so wall times come from steps without it, and from the
steps with it only for how long the device worked. A moment at which several kernels or copies ran counts once, for
the one that began first. What ran belongs to the phase in which the host launched it, whichever thread did: backward
has one of its own.
"""

import bisect
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from megaslm.training import StepClock

PREFIX = "phase: "
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
PHASES = "user_annotation"
READ = {*ON_DEVICE, *LAUNCHES, PHASES}  # of the categories, a small part of what a trace holds


class ProfilerClock(StepClock):
    """Marks the phases in the trace of a profiler that is running."""

    def __init__(self):
        self._range: torch.profiler.record_function | None = None

    def enter(self, phase: str) -> None:
        self.leave()
        self._range = torch.profiler.record_function(PREFIX + phase)
        self._range.__enter__()

    def leave(self) -> None:
        """End the current phase, if there is one."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None


def events_of(profiler: torch.profiler.profile) -> list[dict]:
    """What `busy_seconds` reads of a profiler that has stopped, in the Chrome trace format: `ts` and `dur` in us."""

    def needed(value: dict) -> dict | None:
        return value if value.get("cat", PHASES) in READ else None

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        with path.open(encoding="utf-8", errors="replace") as file:
            events = json.load(file, object_hook=needed)["traceEvents"]
    return [event for event in events if event is not None and "cat" in event]


def busy_seconds(events: Iterable[dict]) -> dict[str, float] | None:
    """Seconds that the device was busy with what was launched in each phase, of all steps in the trace together. What
    no phase launched is left out.

    None: the trace has nothing of the device, as where the driver lets no one watch it.
    """
    begins, phases, launched, work = [], [], {}, []
    for event in events:
        kind = event.get("cat")
        if kind == PHASES and event["name"].startswith(PREFIX):
            begins.append(event["ts"])
            phases.append(event["name"].removeprefix(PREFIX))
        elif kind in LAUNCHES and "correlation" in event.get("args", ()):
            launched[event["args"]["correlation"]] = event["ts"]
        elif kind in ON_DEVICE:
            work.append((event["ts"], event["ts"] + event["dur"], event["args"].get("correlation")))
    if not work:
        return None
    order = sorted(range(len(begins)), key=begins.__getitem__)
    begins, phases = [begins[i] for i in order], [phases[i] for i in order]
    busy = dict.fromkeys(phases, 0.0)
    covered = float("-inf")
    for begin, end, correlation in sorted(work, key=lambda one: one[:2]):
        i = bisect.bisect(begins, launched.get(correlation, float("-inf"))) - 1
        if i >= 0:
            busy[phases[i]] += max(0.0, end - max(begin, covered)) / 1e6
        covered = max(covered, end)
    return busy
