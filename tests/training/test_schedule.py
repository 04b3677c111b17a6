import math

import pytest

from megaslm.config import OptimizerConfig, ScheduleConfig
from megaslm.training import learning_rate

BATCH, PEAK = 12, 1e-3
SHAPES = ("constant", "linear", "cosine", "wsd")


def rates(steps: int, **schedule) -> list[float]:
    """The rate of steps 0 to `steps`, the horizon; one more than a run of so many steps uses."""
    return [
        learning_rate(
            step * BATCH,
            horizon=steps * BATCH,
            batch=BATCH,
            optimizer=OptimizerConfig(lr=PEAK),
            schedule=ScheduleConfig(**schedule),
        )
        for step in range(steps + 1)
    ]


def nanogpt(step: int, warmup: int, decay_steps: int, peak: float, minimum: float) -> float:
    """get_lr of nanoGPT's train.py (MIT licence, Andrej Karpathy)."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step > decay_steps:
        return minimum
    ratio = (step - warmup) / (decay_steps - warmup)
    return minimum + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (peak - minimum)


def test_cosine_is_nanogpts():
    expected = [nanogpt(step, 100, 2000, 1e-3, 1e-4) for step in range(2001)]
    assert rates(2000, type="cosine", warmup_steps=100, min_lr_ratio=0.1) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_warmup_rises_in_a_line_from_above_zero_to_the_peak(shape):
    warmup = rates(100, type=shape, warmup_steps=9)[:10]
    assert warmup == pytest.approx([PEAK * (step + 1) / 10 for step in range(10)])


@pytest.mark.parametrize("shape", SHAPES)
def test_without_warmup_the_first_step_has_the_peak(shape):
    assert rates(100, type=shape)[0] == PEAK


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_after_the_warmup_the_rate_never_rises_and_ends_at_the_minimum(shape):
    after = rates(100, type=shape, warmup_steps=10, min_lr_ratio=0.05)[10:]
    assert after == sorted(after, reverse=True)
    assert after[-1] == pytest.approx(0.05 * PEAK)
    assert min(after[:-1]) > after[-1]


def test_constant_stays_at_the_peak():
    assert set(rates(100, type="constant", warmup_steps=10)[10:]) == {PEAK}


def test_linear_is_halfway_down_in_the_middle():
    assert rates(110, type="linear", warmup_steps=10, min_lr_ratio=0.2)[60] == pytest.approx(0.6 * PEAK)


def test_wsd_is_stable_until_the_decay_and_then_falls_as_one_minus_the_square_root():
    values = rates(100, type="wsd", warmup_steps=10, min_lr_ratio=0.0, decay_fraction=0.25)
    assert set(values[10:76]) == {PEAK}
    assert values[76] < PEAK
    assert values[75 + 4] == pytest.approx(PEAK * (1 - math.sqrt(4 / 25)))


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_past_the_horizon_the_minimum_stays(shape):
    rate = learning_rate(
        5000, horizon=1000, batch=1, optimizer=OptimizerConfig(lr=1.0), schedule=ScheduleConfig(type=shape)
    )
    assert rate == pytest.approx(0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_rate_depends_on_samples_and_not_on_steps_of_the_process(shape):
    """Twice the batch: the same rate at the same number of samples, up to the first step of the warmup."""
    options = {"optimizer": OptimizerConfig(lr=PEAK), "horizon": 800}
    one = learning_rate(400, batch=4, schedule=ScheduleConfig(type=shape, warmup_steps=20), **options)
    two = learning_rate(400, batch=8, schedule=ScheduleConfig(type=shape, warmup_steps=10), **options)
    assert one == two


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_shorter_than_its_warmup_only_rises(shape):
    values = rates(20, type=shape, warmup_steps=100)[:20]
    assert values == sorted(values)
    assert max(values) < PEAK
