"""Cross-entropy of a linear layer's logits without ever holding the logits of the whole batch.

    objective = sum over rows of  lse_i - x_it + z lse_i^2,   x = hidden weight^T          as in cross_entropy.py
    dhidden = dx weight          dweight = dx^T hidden

Rows are taken in chunks: the product, then one kernel that turns the logits, in place, into their gradient, then the
two products with it. The gradients are thus there after the forward pass; the backward pass scales them.

The products take 6 E V operations a row; the kernel adds 4 V bytes in bf16, on an H100 some 150/E of their time. The
weight's gradient is summed over chunks in fp32, 8 E V bytes a chunk: a bf16 sum loses the small terms (linked to
divergence in other implementations). That, and the products' efficiency, asks for large chunks: with the 5,336 rows
that the budget allows at V = 50304 the sum takes 5 % of the products' time, where these do not hide it. A single chunk
needs no such buffer.

Where the vocabulary lies in shards, their statistics, 12 bytes a row, are gathered between a chunk's product and its
gradient (see cross_entropy.py), and the logits are read once more.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megaslm_kernels.cross_entropy import loss_and_gradient_, shard_gradient_, shard_statistics
from megaslm_kernels.cross_entropy_formulas import (
    IGNORE_INDEX,
    loss_and_gradient_reference_,
    shard_gradient_reference_,
    shard_statistics_reference,
)
from megaslm_kernels.registration import eager, register

CHUNK_BYTES = 512 * 2**20
"""Budget for the logits of one chunk."""

MIN_CHUNK_ROWS = 4096
"""Whatever the budget: smaller matrix products do not reach the GPU's speed."""

REFERENCE_CHUNK_BYTES = 256 * 2**20
"""Budget of the reference, which also runs on machines with little memory."""

PRODUCT_BYTES = 16 * 2**20
"""Of a chunk's logits in fp32 that a CPU has at a time while it sums products of half-precision matrices."""

# Until 2.10, addmm with an output of another type wants that of its operands for the summand.
_ADDS_TO_FP32 = torch.__version__ >= "2.10"


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int | None = None,
    z_loss: float = 0.0,
    chunk_bytes: int | None = REFERENCE_CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Sums over rows, in nats, as fp32 scalars: the objective, cross-entropy and z-loss, which is differentiable, and
    the cross-entropy alone, which is not.

    hidden: [N, E]; weight: [V, E], of the same type; targets: [N], int64, `IGNORE_INDEX` where there is no loss.
    vocab_size: rows of `weight` from this one on are padding and take no part (their gradient is zero). Default V.
    z_loss: factor of the squared logsumexp.
    Raises ValueError where shapes or types do not fit together.
    chunk_bytes: budget for the logits of one chunk, in their own type. None: `CHUNK_BYTES`, but at least
        `MIN_CHUNK_ROWS` rows.
    """
    return _call(_reference, hidden, weight, targets, vocab_size, z_loss, chunk_bytes)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int | None = None,
    z_loss: float = 0.0,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy_reference` with the loss and the logits' gradient in Triton."""
    return _call(_fused, hidden, weight, targets, vocab_size, z_loss, chunk_bytes)


def sharded_linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    first: int,
    vocab_size: int,
    z_loss: float = 0.0,
    chunk_bytes: int | None = REFERENCE_CHUNK_BYTES,
    *,
    gather: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy_reference` of a vocabulary that is cut into equal shards, on every holder of one: the same
    sums, the gradient of its own `weight`, and of `hidden` the part that its logits give, to be summed over all.

    weight: [V, E], rows first .. first + V of the whole matrix, of which those from `vocab_size` on are padding.
    targets: [N], ids of the whole vocabulary.
    gather: statistics of a chunk's n rows, [3, n] fp32, to those of all shards, [shards, 3, n]. It is called once a
        chunk; all holders have as many, since they have equal rows and equal shards. Not for torch.compile.
    """
    loss = _sharded_with(shard_statistics_reference, shard_gradient_reference_, first, gather)
    return _call(_sharded, hidden, weight, targets, vocab_size, z_loss, chunk_bytes, loss)


def sharded_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    first: int,
    vocab_size: int,
    z_loss: float = 0.0,
    chunk_bytes: int | None = None,
    *,
    gather: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """`sharded_linear_cross_entropy_reference` with the statistics and the logits' gradient in Triton."""
    loss = _sharded_with(shard_statistics, shard_gradient_, first, gather)
    return _call(_sharded, hidden, weight, targets, vocab_size, z_loss, chunk_bytes, loss)


def _call(op, hidden, weight, targets, vocab_size, z_loss, chunk_bytes, *loss_and_gradient):
    if hidden.dtype != weight.dtype or hidden.size(1) != weight.size(1) or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, {hidden.dtype}, weight {tuple(weight.shape)}, {weight.dtype}, "
            f"targets {tuple(targets.shape)}"
        )
    vocab_size = weight.size(0) if vocab_size is None else vocab_size
    wanted = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    return op(hidden, weight, targets.contiguous(), vocab_size, z_loss, chunk_bytes, *wanted, *loss_and_gradient)[:2]


def chunk_limit(row_bytes: int, chunk_bytes: int | None) -> int:
    """Most rows of a chunk."""
    return max(MIN_CHUNK_ROWS, CHUNK_BYTES // row_bytes) if chunk_bytes is None else max(1, chunk_bytes // row_bytes)


def chunk_rows(count: int, limit: int) -> int:
    """Rows of a chunk: `count` over as few chunks as `limit` allows, in whole tiles of the matrix products."""
    if count <= limit:
        return max(1, count)
    even = -(-count // -(-count // limit))
    return min(limit, -(-even // 128) * 128)


def product_rows(inner: int) -> int:
    """Rows that a CPU casts at a time for a product over `inner` rows of a chunk."""
    return max(1, PRODUCT_BYTES // (4 * max(1, inner)))


def gradient_scale(dtype: torch.dtype) -> float:
    """Factor of the logits' gradient until the backward pass: without one, fp16 would lose what is below 6e-8, before
    the scale of the loss, which comes in the backward pass, could help."""
    return 1024.0 if dtype == torch.float16 else 1.0


def _fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, z_loss: float, chunk_bytes: int | None,
    want_hidden: bool, want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Objective, cross-entropy, and the objective's gradients, of which one that is not wanted is an empty tensor.

    Nothing is computed yet. The gradients are `gradient_scale` times too large; that of the weight is in fp32 where it
    is a sum over several chunks.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    several = hidden.size(0) > chunk_limit(weight.size(0) * weight.element_size(), chunk_bytes)
    wide_weight = several or hidden.dtype == torch.float16  # whose range a sum over the batch may leave
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape if want_hidden else 0),
        weight.new_empty(weight.shape if want_weight else 0, dtype=wide if wide_weight else weight.dtype),
    )


def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, z_loss: float, chunk_bytes: int | None,
    want_hidden: bool, want_weight: bool, loss_and_gradient: Callable,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What `_fake` describes, by `loss_and_gradient`, which has the interface of `cross_entropy.loss_and_gradient_`."""
    objective, cross_entropy, grad_hidden, grad_weight = _fake(
        hidden, weight, targets, vocab_size, z_loss, chunk_bytes, want_hidden, want_weight
    )
    count, v = hidden.size(0), weight.size(0)
    rows = chunk_rows(count, chunk_limit(v * weight.element_size(), chunk_bytes))
    logits = hidden.new_empty(min(rows, count), v)
    losses, logsumexp = objective.new_empty(2, count).unbind()
    scale = gradient_scale(hidden.dtype) if want_hidden or want_weight else 0.0
    for start in range(0, max(1, count), rows):  # no rows at all: the weight's gradient is still to be written
        chunk = slice(start, start + rows)
        hidden_chunk = hidden[chunk]
        chunk_logits = torch.mm(hidden_chunk, weight.T, out=logits[: hidden_chunk.size(0)])
        loss_and_gradient(chunk_logits, targets[chunk], vocab_size, z_loss, losses[chunk], logsumexp[chunk], scale)
        if want_hidden:
            torch.mm(chunk_logits, weight, out=grad_hidden[chunk])
        if want_weight:
            _add_product_(grad_weight, chunk_logits.T, hidden_chunk, start > 0)
    torch.sum(losses, dim=0, out=objective)
    if z_loss:
        losses -= (z_loss * logsumexp.square()).where(targets != IGNORE_INDEX, 0.0)
    torch.sum(losses, dim=0, out=cross_entropy)
    return objective, cross_entropy, grad_hidden, grad_weight


def _forward_with(loss_and_gradient: Callable) -> Callable:
    def forward(
        hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, z_loss: float, chunk_bytes: int | None,
        want_hidden: bool, want_weight: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        return _forward(
            hidden, weight, targets, vocab_size, z_loss, chunk_bytes, want_hidden, want_weight, loss_and_gradient
        )

    return forward


def _sharded_with(statistics: Callable, gradient_: Callable, first: int, gather: Callable) -> Callable:
    """`loss_and_gradient_` of rows whose logits lie in several shards."""

    def loss_and_gradient(
        logits: Tensor, targets: Tensor, vocab_size: int, z_loss: float, losses: Tensor, logsumexp: Tensor, scale: float
    ) -> None:
        maxima, totals, target_logits = gather(statistics(logits, targets, first, vocab_size)).unbind(dim=1)
        maximum, x_target = maxima.amax(dim=0), target_logits.sum(dim=0)  # [n], of [shards, n]
        log_total = (maxima - maximum).exp_().mul_(totals).sum(dim=0).log_()
        torch.add(maximum, log_total, out=logsumexp)
        log_total += maximum - x_target  # logsumexp - x_target would cancel
        torch.addcmul(log_total, logsumexp, logsumexp, value=z_loss, out=losses)
        losses.masked_fill_((targets < 0) | (targets >= vocab_size), torch.nan).masked_fill_(targets == IGNORE_INDEX, 0)
        if scale:
            upstream = logsumexp.new_full((), scale).expand_as(losses)
            gradient_(logits, targets, first, vocab_size, logsumexp, upstream, z_loss)

    return loss_and_gradient


def _add_product_(total: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    """total = left @ right, plus what it was if `add`, with no rounding to the operands' type on the way."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=int(add), out=total)
    elif not left.is_cuda:  # no product there has a result of another type
        right, rows = right.to(total.dtype), product_rows(left.size(1))
        for part, factor in zip(total.split(rows), left.split(rows), strict=True):
            torch.addmm(part, factor.to(total.dtype), right, beta=int(add), out=part)
    elif _ADDS_TO_FP32:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=int(add), out=total)
    elif add:
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        torch.mm(left, right, out_dtype=total.dtype, out=total)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.dtype, ctx.scale = inputs[0].dtype, gradient_scale(inputs[0].dtype)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, backward, dobjective, *_):
    """Upstream gradient times the gradients, multiplied in fp32 and rounded once."""
    if dobjective is None:
        return (None,) * len(ctx.needs_input_grad)
    # Of one dimension, since a scalar would first be rounded to the gradients' type.
    dobjective = dobjective.reshape(1)
    if ctx.scale != 1.0:
        dobjective = dobjective / ctx.scale
    scaled = [
        torch.mul(gradient, dobjective, out=torch.empty_like(gradient, dtype=ctx.dtype)) if wanted else None
        for gradient, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
    ]
    return *scaled, *(None,) * (len(ctx.needs_input_grad) - 2)


_fused, _reference = (
    register(name, forward, None, _forward_with(loss_and_gradient_reference_), None, _save, _gradients, _fake)
    for name, forward in (
        ("linear_cross_entropy", _forward_with(loss_and_gradient_)),
        ("linear_cross_entropy_reference", _forward_with(loss_and_gradient_reference_)),
    )
)
_sharded = eager("sharded_linear_cross_entropy", _forward, None, _save, _gradients)
