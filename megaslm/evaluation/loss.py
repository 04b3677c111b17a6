"""Loss, perplexity and bits per byte of a model on tokens.

Every target counts once and equally: sums over targets, never means of means. B windows of S tokens each.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from megaslm.config import ModelConfig
from megaslm.data import IGNORED_TARGET, Tokenizer, ValidationData
from megaslm.errors import UserError
from megaslm.model import LanguageModel


@dataclass(frozen=True)
class MeanLoss:
    """Mean loss in nats over `targets` target tokens; bits per byte of text where the tokenizer is known."""

    loss: float
    targets: int
    bits_per_byte: float | None

    @classmethod
    def of_sums(cls, losses: float, targets: float, num_bytes: float) -> "MeanLoss":
        return cls(losses / targets, int(targets), losses / math.log(2) / num_bytes if num_bytes else None)

    @property
    def perplexity(self) -> float:
        """exp(loss), of a loss of 700 nats at most: it is to be a finite number."""
        return math.exp(min(self.loss, 700.0))

    def record(self) -> dict:
        """As JSON."""
        return {"perplexity": self.perplexity, **asdict(self)}


@dataclass(frozen=True)
class LossSums:
    """What one or several sets of tokens add up to.

    Attributes:
        losses: sum over the targets, in nats.
        targets: target tokens that were scored.
        num_bytes: UTF-8 bytes of text that they stand for; 0 where no tokenizer says so.
        tokens: tokens that went through the model; more than targets where windows overlap or are padded.
        seconds: wall time of the passes.
    """

    losses: float
    targets: int
    num_bytes: int
    tokens: int
    seconds: float

    def __add__(self, other: "LossSums") -> "LossSums":
        # Bits per byte of both together need the bytes of both.
        num_bytes = self.num_bytes + other.num_bytes if self.num_bytes and other.num_bytes else 0
        return LossSums(
            self.losses + other.losses,
            self.targets + other.targets,
            num_bytes,
            self.tokens + other.tokens,
            self.seconds + other.seconds,
        )

    @property
    def mean(self) -> MeanLoss:
        return MeanLoss.of_sums(self.losses, self.targets, self.num_bytes)

    def record(self) -> dict:
        """As JSON: the mean loss, `bytes` (None: not known), and tokens through the model by second."""
        return {
            **self.mean.record(),
            "bytes": self.num_bytes or None,
            "tokens_per_s": self.tokens / self.seconds,
            "seconds": self.seconds,
        }


def sum_losses(
    loss_sum: Callable[[np.ndarray, np.ndarray, np.ndarray | None], Tensor],
    data: ValidationData,
    tokenizer: Tokenizer | None,
    batch_size: int,
    max_sequences: int | None = None,
    rank: int = 0,
    num_ranks: int = 1,
    progress: Callable[[int], None] = lambda windows: None,
) -> Tensor:
    """[3] float64 on the host: this rank's sum of losses, its targets, and their bytes (0 without a tokenizer).

    Ranks take windows in turn and all do the same number of forward passes, past the end on masked rows, since a
    ZeRO-3 forward is collective.

    Args:
        loss_sum: sum of the losses, a scalar, of tokens [B, S], targets [B, S] and positions as `ValidationData.batch`
            gives them. It is not waited for.
        max_sequences: the first so many windows alone; None: all.
        progress: called with the number of windows of each pass of all ranks.
    """
    windows = min(data.num_windows, max_sequences or data.num_windows)
    batch_size = min(batch_size, -(-windows // num_ranks))  # masked rows take as long as others
    losses: Tensor | None = None
    targets_seen = bytes_seen = 0
    for start in range(0, windows, batch_size * num_ranks):
        first = start + rank * batch_size
        tokens, targets, positions = data.batch(first, batch_size)
        if first + batch_size > windows:
            targets[max(0, windows - first) :] = IGNORED_TARGET
        loss = loss_sum(tokens, targets, positions).double()
        losses = loss if losses is None else losses + loss
        real = targets[targets != IGNORED_TARGET]
        targets_seen += real.size
        if tokenizer is not None:
            bytes_seen += tokenizer.count_bytes(real)
        progress(min(batch_size * num_ranks, windows - start))
    return torch.tensor([float(losses), targets_seen, bytes_seen], dtype=torch.float64)


@torch.inference_mode()
def evaluate_tokens(
    model: LanguageModel,
    data: ValidationData,
    tokenizer: Tokenizer | None,
    batch_size: int,
    max_sequences: int | None = None,
    progress: Callable[[int], None] = lambda windows: None,
) -> LossSums:
    """The losses of `model`, on its own device and in its own type, over the windows of `data`.

    The same windows and sums as a run's own evaluation. UserError for a window longer than the model's context, and for
    ids that are outside its vocabulary.
    """
    check_context(model.config, data.seq_length)
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device

    def loss_sum(tokens: np.ndarray, targets: np.ndarray, positions: np.ndarray | None) -> Tensor:
        arrays = (None if one is None else torch.from_numpy(one).to(device) for one in (tokens, targets, positions))
        num_documents = None if positions is None else int(np.count_nonzero(positions == 0))
        return model(*arrays, num_documents)[1]

    started = time.perf_counter()
    sums = sum_losses(loss_sum, data, tokenizer, batch_size, max_sequences, progress=progress)
    seconds = time.perf_counter() - started
    model.train(was_training)
    losses, targets, num_bytes = sums.tolist()
    windows = min(data.num_windows, max_sequences or data.num_windows)
    return LossSums(losses, int(targets), int(num_bytes), windows * data.seq_length, seconds)


def check_context(config: ModelConfig, seq_length: int) -> None:
    """UserError for windows that are longer than the model's context."""
    if seq_length > config.context_length:
        raise UserError(
            f"seq_length {seq_length} is longer than the model's context of {config.context_length} tokens; give that "
            "or less"
        )
