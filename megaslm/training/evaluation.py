"""Loss on the validation tokens: every target once, the same whatever the layout."""

import math
import time
from dataclasses import dataclass

import torch

from megaslm.data import IGNORED_TARGET, Tokenizer, ValidationData
from megaslm.parallel import Ranks
from megaslm.training.batches import to_device
from megaslm.training.engine import TrainingEngine


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats over `targets` target tokens; bits per byte of text where the tokenizer is known."""

    loss: float
    targets: int
    bits_per_byte: float | None
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def evaluate(
    engine: TrainingEngine,
    data: ValidationData,
    tokenizer: Tokenizer | None,
    batch_size: int,
    ranks: Ranks,
    max_sequences: int | None = None,
) -> Evaluation:
    """Evaluate `data` (its first `max_sequences` windows, or all), `batch_size` windows a forward pass on each rank.

    Ranks take windows in turn and all do the same number of forward passes, past the end on masked rows, since a
    ZeRO-3 forward is collective.
    """
    started = time.perf_counter()
    windows = min(data.num_windows, max_sequences or data.num_windows)
    stride = batch_size * ranks.data_parallel_size
    losses = torch.zeros((), dtype=torch.float64, device=ranks.device)
    targets_seen = bytes_seen = 0
    for start in range(0, windows, stride):
        first = start + ranks.data_parallel_rank * batch_size
        tokens, targets = data.batch(first, batch_size)
        if first + batch_size > windows:
            targets[max(0, windows - first) :] = IGNORED_TARGET
        losses += engine.loss_sum(to_device(tokens, ranks.device), to_device(targets, ranks.device))
        real = targets[targets != IGNORED_TARGET]
        targets_seen += real.size
        if tokenizer is not None:
            bytes_seen += tokenizer.count_bytes(real)
    totals = ranks.sum(torch.tensor([losses.item(), targets_seen, bytes_seen], dtype=torch.float64))
    loss_sum, target_count, byte_count = totals.tolist()
    return Evaluation(
        loss=loss_sum / target_count,
        targets=int(target_count),
        bits_per_byte=loss_sum / math.log(2) / byte_count if byte_count else None,
        seconds=time.perf_counter() - started,
    )
