"""Learning rate as a pure function of the samples consumed: nothing to save, nothing to restore.

A step that consumes samples [s, s + B) uses the rate at s. Warmup rises linearly and is never zero:
lr (s + B) / (W + B) with W samples of warmup (nanoGPT's rule in samples).
"""

import math

from megaslm.config import OptimizerConfig, ScheduleConfig


def learning_rate(
    samples: int, *, horizon: int, batch: int, optimizer: OptimizerConfig, schedule: ScheduleConfig
) -> float:
    """Rate for the step that starts at `samples`, in a run of `horizon` samples with `batch` samples a step."""
    peak, minimum = optimizer.lr, optimizer.lr * schedule.min_lr_ratio
    warmup = schedule.warmup_steps * batch
    if samples < warmup:
        return peak * (samples + batch) / (warmup + batch)
    if schedule.type == "constant":
        return peak
    if samples >= horizon:
        return minimum
    if schedule.type == "wsd":
        return _warmup_stable_decay(samples, horizon, peak, minimum, schedule.decay_fraction, warmup)
    progress = (samples - warmup) / (horizon - warmup)
    if schedule.type == "linear":
        return peak + (minimum - peak) * progress
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def _warmup_stable_decay(samples, horizon, peak, minimum, decay_fraction, warmup) -> float:
    """Stable, then 1 - sqrt down to the minimum over the last `decay_fraction` (arXiv:2405.18392)."""
    decay_start = max(warmup, horizon - decay_fraction * horizon)
    if samples < decay_start:
        return peak
    progress = (samples - decay_start) / (horizon - decay_start)
    return peak + (minimum - peak) * math.sqrt(progress)
