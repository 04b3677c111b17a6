"""The phases that a training step tells of, and what a clock makes of them."""

import time

import pytest

from megaslm.training import HostClock, clock


def test_phases_of_every_step_add_up_to_its_wall_time():
    watch = HostClock()
    started = time.perf_counter()
    for _ in range(2):
        for phase, seconds in [("data", 0.002), ("forward", 0.004), ("backward", 0), ("forward", 0.004), ("rest", 0)]:
            watch.enter(phase)
            time.sleep(seconds)
    watch.enter("data")
    wall = time.perf_counter() - started
    steps = watch.steps()
    assert [list(step) for step in steps] == 2 * [["data", "forward", "backward", "rest"]]
    assert sum(map(sum, (step.values() for step in steps))) == pytest.approx(wall, rel=0.02)
    assert all(step["forward"] >= 0.008 and 0.002 <= step["data"] < step["forward"] for step in steps)


def test_a_gpu_s_times_are_those_between_its_events(monkeypatch):
    """With events that know when they were recorded, by a device that is behind the host."""
    moments = iter([10.0, 10.5, 14.0, 20.0])  # ms
    waited = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.moment = next(moments)

        def synchronize(self):
            waited.append(self.moment)

        def elapsed_time(self, end):
            return end.moment - self.moment

    monkeypatch.setattr(clock.torch.cuda, "Event", Event)
    watch = clock.DeviceClock()
    for phase in ("data", "forward", "backward", "data"):
        watch.enter(phase)
    assert waited == []  # no step waits for the device
    assert watch.steps() == [pytest.approx({"data": 0.0005, "forward": 0.0035, "backward": 0.006})]
    assert waited == [20.0]
