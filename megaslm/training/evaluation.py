"""Loss on the validation tokens: every target once, the same whatever the layout."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from megaslm.config import UNNAMED_SET
from megaslm.data import Tokenizer, ValidationData
from megaslm.evaluation import MeanLoss, sum_losses
from megaslm.parallel import Ranks
from megaslm.training.batches import MicroBatch, to_device
from megaslm.training.engine import TrainingEngine


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

    def loss_sum(*arrays: np.ndarray | None) -> torch.Tensor:
        return engine.loss_sum(_micro_batch(*arrays, ranks.device))

    part = (ranks.data_parallel_rank, ranks.data_parallel_size)
    sums = [sum_losses(loss_sum, data, tokenizer, batch_size, max_sequences, *part) for data in sets.values()]
    totals = ranks.sum(torch.stack(sums))
    return Evaluation(
        overall=MeanLoss.of_sums(*totals.sum(0).tolist()),
        sets={name: MeanLoss.of_sums(*row) for name, row in zip(sets, totals.tolist(), strict=True)},
        seconds=time.perf_counter() - started,
    )


def _micro_batch(
    tokens: np.ndarray, targets: np.ndarray, positions: np.ndarray | None, device: torch.device
) -> MicroBatch:
    tokens, targets = to_device(tokens, device), to_device(targets, device)
    if positions is None:
        return MicroBatch(tokens, targets, None, None)
    num_documents = int(np.count_nonzero(positions == 0))
    return MicroBatch(tokens, targets, torch.from_numpy(positions).to(device), num_documents)
