"""Traces of a profiler: made by hand, where everything is known; and a real one, of a processor."""

import pytest
import torch

from megaslm.throughput.trace import ProfilerClock, busy_seconds, events_of


def phase(name, begin, end):
    return {"ph": "X", "cat": "user_annotation", "name": f"phase: {name}", "ts": begin, "dur": end - begin}


def launch(correlation, moment, kind="cuda_runtime"):
    return {"ph": "X", "cat": kind, "name": "launch", "ts": moment, "dur": 2, "args": {"correlation": correlation}}


def work(correlation, begin, end, kind="kernel"):
    arguments = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": kind, "name": "work", "ts": begin, "dur": end - begin, "args": arguments}


PHASES = [phase("data", 0, 10), phase("forward", 10, 30), phase("backward", 30, 60), phase("optimizer", 60, 90)]


def busy(*events) -> dict[str, float]:
    """In us."""
    return {name: 1e6 * seconds for name, seconds in busy_seconds([*reversed(events), *PHASES]).items() if seconds}


def test_work_belongs_to_the_phase_that_launched_it():
    """The device is behind the host: forward's kernel runs when the host is in backward. A launch of the backward
    thread and one by a driver's call count like any other."""
    events = [launch(1, 12), work(1, 40, 45), launch(2, 35) | {"tid": 7}, work(2, 46, 53), launch(3, 61, "cuda_driver")]
    assert busy(*events, work(3, 70, 90)) == pytest.approx({"forward": 5, "backward": 7, "optimizer": 20})


def test_a_moment_with_several_kernels_counts_once():
    events = [launch(i, 12) for i in (1, 2, 3)] + [launch(4, 35), launch(5, 36)]
    events += [work(1, 40, 50), work(2, 42, 47), work(3, 45, 52, "gpu_memset")]  # 12, of 10 + 5 + 7
    events += [work(4, 51, 60, "gpu_memcpy"), work(5, 70, 71)]  # 8 of 9, and 1 after a pause
    assert busy(*events) == pytest.approx({"forward": 12, "backward": 9})


def test_all_kernels_of_a_graph_belong_to_the_phase_of_its_launch():
    assert busy(launch(1, 15), work(1, 40, 44), work(1, 45, 49)) == pytest.approx({"forward": 8})


def test_what_no_phase_launched_is_left_out_and_still_covers_its_time():
    before = [launch(1, -5), work(1, 2, 10)]
    assert busy(*before, work(None, 10, 20), launch(2, 12), work(2, 15, 25)) == pytest.approx({"forward": 5})


def test_a_trace_without_the_device_says_nothing():
    """As where the driver lets no one watch it: launches, and no work."""
    assert busy_seconds([*PHASES, launch(1, 12), launch(2, 35)]) is None


def test_the_phases_of_a_real_trace_are_found():
    """Of a processor, which has no device's work."""
    clock = ProfilerClock()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for name in ("data", "forward", "backward"):
            clock.enter(name)
            torch.ones(8).sum()
        clock.leave()
    events = events_of(profiler)
    assert busy_seconds(events) is None, "nothing ran on a device"
    assert busy_seconds([*events, work(None, 0, 1)]) == {"data": 0, "forward": 0, "backward": 0}
    found = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event["name"].startswith("phase: "))
    assert {event["cat"] for event in events} == {"user_annotation"}, "of all that a trace holds, what is read"
    assert [end <= begin for (_, end), (begin, _) in zip(found, found[1:], strict=False)] == [True, True]
