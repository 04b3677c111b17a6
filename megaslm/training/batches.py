"""Which samples a rank reads in a step: a pure function of the samples consumed."""

import numpy as np
import torch
from torch import Tensor

from megaslm.config import BatchLayout
from megaslm.data import TrainingData
from megaslm.errors import UserError
from megaslm.parallel import Ranks


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Integer array to an int64 tensor on the device."""
    tensor = torch.from_numpy(array.astype(np.int64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def step_batches(data: TrainingData, samples: int, layout: BatchLayout, ranks: Ranks) -> list[tuple[Tensor, Tensor]]:
    """This rank's (tokens, targets) [micro, S] of the step that starts at sample number `samples`.

    Micro-batch m of data-parallel rank r: samples + m micro dp + r micro and the micro - 1 that follow.
    """
    micro, size = layout.micro_batch_size, ranks.data_parallel_size
    batches = []
    for m in range(layout.accumulation_steps):
        first = samples + (m * size + ranks.data_parallel_rank) * micro
        try:
            window = to_device(data.batch(first, micro), ranks.device)
        except UserError as error:  # an id over the vocabulary lies in one rank's samples
            raise UserError(str(error), on_one_rank=True) from error
        batches.append((window[:, :-1], window[:, 1:]))
    return batches
