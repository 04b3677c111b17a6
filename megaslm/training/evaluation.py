"""Loss on the validation tokens: every target once, the same whatever the layout."""

import math
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch

from megaslm.config import UNNAMED_SET
from megaslm.data import IGNORED_TARGET, Tokenizer, ValidationData
from megaslm.parallel import Ranks
from megaslm.training.batches import MicroBatch, to_device
from megaslm.training.engine import TrainingEngine


@dataclass(frozen=True)
class MeanLoss:
    """Mean loss in nats over `targets` target tokens; bits per byte of text where the tokenizer is known."""

    loss: float
    targets: int
    bits_per_byte: float | None

    @classmethod
    def of_sums(cls, losses: float, targets: float, num_bytes: float) -> "MeanLoss":
        return cls(losses / targets, int(targets), losses / math.log(2) / num_bytes if num_bytes else None)

    def record(self) -> dict:
        """For metrics.jsonl."""
        return {"perplexity": math.exp(min(self.loss, 700.0)), **asdict(self)}


@dataclass(frozen=True)
class Evaluation:
    """The mean loss over the targets of all sets together, and that of each."""

    overall: MeanLoss
    sets: dict[str, MeanLoss]
    seconds: float

    def record(self) -> dict:
        """For metrics.jsonl: the overall loss and, where the sets have names, `sets` by name."""
        named = {name: loss.record() for name, loss in self.sets.items()}
        return {
            **self.overall.record(),
            "seconds": self.seconds,
            "sets": None if list(named) == [UNNAMED_SET] else named,
        }


def evaluate(
    engine: TrainingEngine,
    sets: dict[str, ValidationData],
    tokenizer: Tokenizer | None,
    batch_size: int,
    ranks: Ranks,
    max_sequences: int | None = None,
) -> Evaluation:
    """Evaluate every set: its first `max_sequences` windows, or all, `batch_size` a forward pass on each rank."""
    started = time.perf_counter()
    sums = [_sums(engine, data, tokenizer, batch_size, ranks, max_sequences) for data in sets.values()]
    totals = ranks.sum(torch.stack(sums))
    return Evaluation(
        overall=MeanLoss.of_sums(*totals.sum(0).tolist()),
        sets={name: MeanLoss.of_sums(*row) for name, row in zip(sets, totals.tolist(), strict=True)},
        seconds=time.perf_counter() - started,
    )


def _sums(
    engine: TrainingEngine,
    data: ValidationData,
    tokenizer: Tokenizer | None,
    batch_size: int,
    ranks: Ranks,
    max_sequences: int | None,
) -> torch.Tensor:
    """[3] float64 on the host: this rank's sum of losses, its targets, and their bytes (0 without a tokenizer).

    Ranks take windows in turn and all do the same number of forward passes, past the end on masked rows, since a
    ZeRO-3 forward is collective.
    """
    windows = min(data.num_windows, max_sequences or data.num_windows)
    stride = batch_size * ranks.data_parallel_size
    losses = torch.zeros((), dtype=torch.float64, device=ranks.device)
    targets_seen = bytes_seen = 0
    for start in range(0, windows, stride):
        first = start + ranks.data_parallel_rank * batch_size
        tokens, targets, positions = data.batch(first, batch_size)
        if first + batch_size > windows:
            targets[max(0, windows - first) :] = IGNORED_TARGET
        losses += engine.loss_sum(_micro_batch(tokens, targets, positions, ranks.device))
        real = targets[targets != IGNORED_TARGET]
        targets_seen += real.size
        if tokenizer is not None:
            bytes_seen += tokenizer.count_bytes(real)
    return torch.tensor([losses.item(), targets_seen, bytes_seen], dtype=torch.float64)


def _micro_batch(
    tokens: np.ndarray, targets: np.ndarray, positions: np.ndarray | None, device: torch.device
) -> MicroBatch:
    tokens, targets = to_device(tokens, device), to_device(targets, device)
    if positions is None:
        return MicroBatch(tokens, targets, None, None)
    num_documents = int(np.count_nonzero(positions == 0))
    return MicroBatch(tokens, targets, torch.from_numpy(positions).to(device), num_documents)
