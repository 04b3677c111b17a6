"""The reference of cross_entropy.py, whose docstring has the formulas, in PyTorch's operations.

What writes gradients over logits, and the statistics of shards, go over a block of rows at a time: what they make of it
in fp32 is small, and on a CPU stays in the caches. (All rows at once take up to three times as long there.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megaslm_kernels.registration import upcast

IGNORE_INDEX = -100
"""Target of a row that has no loss (PyTorch's default)."""

BLOCK_BYTES = 4 * 2**20
"""fp32 logits of a block: with their logarithms, of which there are as many, what the caches of a CPU hold."""

GPU_BLOCK_BYTES = 64 * 2**20
"""The same where small blocks would leave the device idle."""


def reference_rows(vocab_size: int, block_bytes: int = BLOCK_BYTES) -> int:
    """Rows of logits in a block."""
    return max(1, block_bytes // (4 * vocab_size))


def blocks_of(logits: Tensor, *of_rows: Tensor) -> list[tuple[Tensor, ...]]:
    """Views of `logits` [N, V] and of other tensors with N rows, block by block."""
    rows = reference_rows(logits.size(1), BLOCK_BYTES if logits.device.type == "cpu" else GPU_BLOCK_BYTES)
    return list(zip(*(tensor.split(rows) for tensor in (logits, *of_rows)), strict=True))


def cross_entropy_reference(
    logits: Tensor, targets: Tensor, vocab_size: int | None = None, z_loss: float = 0.0
) -> Tensor:
    """Losses [N], in nats, fp32, of `logits` [N, V] and `targets` [N], int64; 0 where a target is `IGNORE_INDEX`.

    vocab_size: columns from this one on are padding; they take no part and their gradient is zero. Default V.
    z_loss: factor of the squared logsumexp, which is part of the losses.
    """
    logits = upcast(logits[:, :vocab_size])
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
    if z_loss:
        losses = losses + z_loss * logits.logsumexp(dim=1).square().where(targets != IGNORE_INDEX, 0.0)
    return losses


def loss_and_gradient_reference_(
    logits: Tensor, targets: Tensor, vocab_size: int, z_loss: float, losses: Tensor, logsumexp: Tensor, scale: float
) -> None:
    """Write `losses` and `logsumexp` [N], fp32, and over `logits` the losses' gradient times `scale`, unless that is 0.

    All contiguous but for the logits' rows, which are of any stride.
    """
    blocks = blocks_of(logits, targets, losses, logsumexp)
    # Once for all blocks: the allocator may take fresh pages each time, which costs as much as the arithmetic.
    wide = logits.new_empty(2, blocks[0][0].size(0), vocab_size, dtype=losses.dtype)
    for block in blocks:
        _write_block(*block, vocab_size, z_loss, scale, *wide[:, : block[0].size(0)])


def _write_block(
    logits: Tensor, targets: Tensor, losses: Tensor, logsumexp: Tensor, vocab_size: int, z_loss: float, scale: float,
    x: Tensor, log_probs: Tensor,
) -> None:  # fmt: skip
    """The formula for some rows. x, log_probs: memory for the logits in fp32 and for their logarithms."""
    x.copy_(logits[:, :vocab_size])
    is_target = targets != IGNORE_INDEX
    index = targets.where(is_target, 0).unsqueeze(1)
    torch.log_softmax(x, dim=1, out=log_probs)  # one fused pass; logsumexp is four
    row_losses = -log_probs.gather(1, index).squeeze(1)
    torch.add(x.gather(1, index).squeeze(1), row_losses, out=logsumexp)
    torch.mul(row_losses + z_loss * logsumexp.square(), is_target, out=losses)
    if scale:
        ones = scale * is_target.to(x.dtype).unsqueeze(1)
        grad = log_probs.exp_().mul_(ones * (1 + 2 * z_loss * logsumexp.unsqueeze(1))).scatter_add_(1, index, -ones)
        logits[:, :vocab_size] = grad
        logits[:, vocab_size:].zero_()


def shard_statistics_reference(logits: Tensor, targets: Tensor, first: int, vocab_size: int) -> Tensor:
    """[3, N], fp32: maximum, sum of exp(logit - maximum) and the target's logit of `logits` [N, V], the columns
    first .. first + V of a vocabulary of `vocab_size`, past which there is padding.

    targets: [N], int64, ids of the whole vocabulary; the target's logit is 0 where another shard (or none) holds it.
    A shard that is padding altogether has maximum -inf and sum 0.
    """
    columns = torch.arange(first, first + logits.size(1), device=logits.device)
    is_token, statistics = columns < vocab_size, []
    for block, block_targets in blocks_of(logits, targets):
        x = upcast(block).where(is_token, -torch.inf)
        maximum = x.amax(dim=1)
        total = (x - maximum.clamp(min=torch.finfo(x.dtype).min).unsqueeze(1)).exp_().sum(dim=1)
        target_logits = x.where((columns == block_targets.unsqueeze(1)) & is_token, 0.0).sum(dim=1)
        statistics.append(torch.stack((maximum, total, target_logits)))
    return torch.cat(statistics, dim=1)


def shard_gradient_reference_(
    logits: Tensor, targets: Tensor, first: int, vocab_size: int, logsumexp: Tensor, scale: Tensor, z_loss: float
) -> None:
    """Write the gradient of the losses over `logits`, a shard as in `shard_statistics_reference`.

    logsumexp: [N], fp32, over all shards, of ignored rows too. scale: [N], fp32, the losses' upstream gradient.
    """
    columns = torch.arange(first, first + logits.size(1), device=logits.device)
    is_padding, scale = columns >= vocab_size, scale.where(targets != IGNORE_INDEX, 0.0)
    for block, target, lse, factor in blocks_of(logits, *(x.unsqueeze(1) for x in (targets, logsumexp, scale))):
        probabilities = (upcast(block) - lse).exp_().masked_fill_(is_padding, 0.0)
        block.copy_(factor * ((1 + 2 * z_loss * lse) * probabilities - (columns == target).to(factor)))
