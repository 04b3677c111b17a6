"""Cross-entropy of given logits, with z-loss (PaLM, arXiv:2204.02311): of whole rows, or of a shard of the vocabulary.

    m = max_v x_v,  s = sum_v exp(x_v - m),  lse = m + log s
    loss = lse - x_t + z lse^2          d loss / d x_v = (1 + 2 z lse) exp(x_v - lse) - [v == t]

Shards combine their statistics (m_i, s_i, and x_t from the one that holds the target t) as

    m = max_i m_i,  s = sum_i s_i exp(m_i - m),  x_t = sum_i x_t,i

so that a vocabulary-parallel loss reduces three numbers a row, and each shard then writes its part of the gradient.

Bytes of device memory per logit in bf16: loss 2, gradient 4; both at once, over the logits, 4 where the caches hold a
row from its first pass to its second, else 6. They do: two programs of 16 warps are resident on a multiprocessor, and
their rows, of 100 KB at V = 50304, are 26 MB of an H100's L2 of 50. The second pass starts at the row's end, read last.

Every lane keeps the maximum and the sum of its own columns, rescaled once per vector of 8, and they meet once at the
row's end: no barrier inside a pass, and little more than one exponential a column.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from megaslm_kernels._triton import tl, triton
from megaslm_kernels.cross_entropy_formulas import IGNORE_INDEX, cross_entropy_reference, shard_gradient_reference_
from megaslm_kernels.launch import Architecture, architecture, launch, with_unit_stride
from megaslm_kernels.registration import register, upcast


def cross_entropy(logits: Tensor, targets: Tensor, vocab_size: int | None = None, z_loss: float = 0.0) -> Tensor:
    """`cross_entropy_reference` in Triton: logits with any row stride. A target out of range gives a loss of NaN."""
    return _cross_entropy(logits, targets, logits.size(1) if vocab_size is None else vocab_size, z_loss)[0]


def shard_statistics(logits: Tensor, targets: Tensor, first: int, vocab_size: int) -> Tensor:
    """`shard_statistics_reference` in Triton: logits with any row stride."""
    statistics = torch.empty(3, targets.size(0), dtype=torch.float32, device=logits.device)
    rows, targets = with_unit_stride(logits), targets.contiguous()
    _launch(_statistics_kernel, rows, first, vocab_size, targets, *statistics.unbind(), FIRST=first)
    return statistics


def shard_gradient_(
    logits: Tensor, targets: Tensor, first: int, vocab_size: int, logsumexp: Tensor, scale: Tensor, z_loss: float,
    out: Tensor | None = None,
) -> None:  # fmt: skip
    """`shard_gradient_reference_` in Triton: logits with any row stride, scale with any stride, logsumexp contiguous.

    out: written to instead of the logits, with any row stride.
    """
    out = logits if out is None else out
    assert logits.stride(1) == out.stride(1) == 1, "what is written over is not copied first"
    _launch(
        _gradient_kernel, logits, first, vocab_size, out, targets.contiguous(), logsumexp, scale,
        FIRST=first, OUT_STRIDE=out.stride(0), SCALE_STRIDE=scale.stride(0), Z_LOSS=z_loss, IGNORED=IGNORE_INDEX,
    )  # fmt: skip


def loss_and_gradient_(
    logits: Tensor, targets: Tensor, vocab_size: int, z_loss: float, losses: Tensor, logsumexp: Tensor, scale: float
) -> None:
    """`loss_and_gradient_reference_` in Triton."""
    _launch(
        _loss_kernel, logits, 0, vocab_size, targets, losses, logsumexp,
        Z_LOSS=z_loss, GRADIENT_SCALE=scale, IGNORED=IGNORE_INDEX,
    )  # fmt: skip


@dataclass(frozen=True)
class VocabularyConfig:
    """Launch of a kernel in which a program takes one row, block after block."""

    lanes: int
    """Vectors in a block."""
    vector: int
    """Logits of a 128-bit load."""
    num_warps: int


@functools.lru_cache(1024)
def config(v: int, dtype: torch.dtype, arch: Architecture) -> VocabularyConfig:
    """Two loads of 128 bits a thread in flight. Short rows get fewer warps; those of which two to a multiprocessor
    would not fit into three quarters of L2 get 32, which leaves room for one."""
    vector, block_bytes = 16 // dtype.itemsize, triton.next_power_of_2(v) * dtype.itemsize
    fits = 2 * arch.multiprocessors * v * dtype.itemsize <= 0.75 * arch.l2_bytes
    num_warps = min(16, max(1, block_bytes // 4096)) if fits else 32
    return VocabularyConfig(min(64 * num_warps, triton.next_power_of_2(triton.cdiv(v, vector))), vector, num_warps)


def _launch(kernel, logits: Tensor, first: int, vocab_size: int, *tensors: Tensor, **constants) -> None:
    """Run `kernel`, a program for each row of `logits`, on these, the other tensors and what constants only it has."""
    count, v = logits.shape
    layout = config(v, logits.dtype, architecture(logits.device))
    launch(
        kernel, count, logits, *tensors,
        STRIDE=logits.stride(0), V=v, USED=min(v, max(0, vocab_size - first)), **constants,
        LANES=layout.lanes, VECTOR=layout.vector, num_warps=layout.num_warps,
    )  # fmt: skip


def _forward(logits: Tensor, targets: Tensor, vocab_size: int, z_loss: float) -> tuple[Tensor, Tensor]:
    losses, logsumexp = (torch.empty(targets.shape, dtype=torch.float32, device=logits.device) for _ in range(2))
    loss_and_gradient_(with_unit_stride(logits), targets.contiguous(), vocab_size, z_loss, losses, logsumexp, 0.0)
    return losses, logsumexp


def _backward(
    dlosses: Tensor, logits: Tensor, targets: Tensor, logsumexp: Tensor, vocab_size: int, z_loss: float
) -> Tensor:
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    shard_gradient_(with_unit_stride(logits), targets, 0, vocab_size, logsumexp, dlosses, z_loss, gradient)
    return gradient


@triton.jit
def _accumulate(maximum, total, x):
    """Maximum and sum of exponentials of every lane, [LANES], with `x` [LANES, VECTOR]."""
    LOG2E: tl.constexpr = 1.4426950408889634
    larger = tl.maximum(maximum, tl.max(x, axis=1))
    terms = tl.sum(tl.exp2((x - larger[:, None]) * LOG2E), axis=1)
    return larger, total * tl.exp2((maximum - larger) * LOG2E) + terms


@triton.jit
def _row_statistics(x, V: tl.constexpr, USED: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Maximum of the row at `x`, and the sum of exp(logit - maximum), which is 0 where no column is used."""
    BLOCK: tl.constexpr = LANES * VECTOR
    FULL: tl.constexpr = USED // BLOCK * BLOCK
    columns = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    maximum = tl.full((LANES,), -1.0e38, dtype=tl.float32)  # not -inf, whose difference to itself is NaN
    total = tl.zeros((LANES,), dtype=tl.float32)
    if FULL > 0:
        ahead = tl.load(x + columns)  # one block is under way while another is computed with
        for start in range(BLOCK, FULL, BLOCK):
            block = ahead
            ahead = tl.load(x + start + columns)
            maximum, total = _accumulate(maximum, total, block.to(tl.float32))
        maximum, total = _accumulate(maximum, total, ahead.to(tl.float32))
    if FULL < USED:
        # The load's mask ends at V, which has the alignment that wide loads need; USED may not.
        block = tl.load(x + FULL + columns, mask=FULL + columns < V, other=0.0).to(tl.float32)
        maximum, total = _accumulate(maximum, total, tl.where(FULL + columns < USED, block, -float("inf")))
    largest = tl.max(maximum)
    return largest, tl.sum(total * tl.exp(maximum - largest))


@triton.jit
def _write_gradient(
    x, out, target, lse, scale,
    V: tl.constexpr, USED: tl.constexpr, Z_LOSS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Gradient of a row, from its logits at `x` to `out`, maybe the same place; target: a column, or none at all."""
    LOG2E: tl.constexpr = 1.4426950408889634
    BLOCK: tl.constexpr = LANES * VECTOR
    FULL: tl.constexpr = USED // BLOCK * BLOCK
    columns = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    target = target.to(tl.int32)  # halves the comparisons
    softmax_scale = scale * (1.0 + 2.0 * Z_LOSS * lse)
    for start in range(FULL, V, BLOCK):
        block = tl.load(x + start + columns, mask=start + columns < V, other=0.0).to(tl.float32)
        dx = tl.where(start + columns < USED, tl.exp2(block * LOG2E - lse * LOG2E) * softmax_scale, 0.0)
        dx = tl.where(start + columns == target, dx - scale, dx)
        tl.store(out + start + columns, dx.to(out.dtype.element_ty), mask=start + columns < V)
    for done in range(BLOCK, FULL + BLOCK, BLOCK):
        start = FULL - done
        dx = tl.exp2(tl.load(x + start + columns).to(tl.float32) * LOG2E - lse * LOG2E) * softmax_scale
        dx = tl.where(start + columns == target, dx - scale, dx)
        tl.store(out + start + columns, dx.to(out.dtype.element_ty))


@triton.jit
def _statistics_kernel(
    logits, targets, maximum, total, target_logit,
    STRIDE: tl.constexpr, V: tl.constexpr, USED: tl.constexpr, FIRST: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * STRIDE
    target = tl.load(targets + row) - FIRST
    tl.store(target_logit + row, tl.load(x + target, mask=(target >= 0) & (target < USED), other=0.0).to(tl.float32))
    largest, row_total = _row_statistics(x, V, USED, LANES, VECTOR)
    tl.store(maximum + row, tl.where(row_total == 0, -float("inf"), largest))
    tl.store(total + row, row_total)


@triton.jit
def _loss_kernel(
    logits, targets, losses, logsumexp,
    STRIDE: tl.constexpr, V: tl.constexpr, USED: tl.constexpr, Z_LOSS: tl.constexpr, GRADIENT_SCALE: tl.constexpr,
    IGNORED: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * STRIDE
    target = tl.load(targets + row)
    # Before the gradient overwrites it.
    x_target = tl.load(x + target, mask=(target >= 0) & (target < USED), other=float("nan")).to(tl.float32)
    maximum, total = _row_statistics(x, V, USED, LANES, VECTOR)
    log_total = tl.log(total)
    lse = maximum + log_total
    loss = log_total + (maximum - x_target) + Z_LOSS * lse * lse  # lse - x_target would cancel
    tl.store(losses + row, tl.where(target == IGNORED, 0.0, loss))
    tl.store(logsumexp + row, lse)
    if GRADIENT_SCALE != 0.0:
        scale = tl.where(target == IGNORED, 0.0, GRADIENT_SCALE)
        _write_gradient(x, x, target, lse, scale, V, USED, Z_LOSS, LANES, VECTOR)


@triton.jit
def _gradient_kernel(
    logits, out, targets, logsumexp, scale,
    STRIDE: tl.constexpr, V: tl.constexpr, USED: tl.constexpr, FIRST: tl.constexpr, OUT_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr, Z_LOSS: tl.constexpr, IGNORED: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    row_scale = tl.where(target == IGNORED, 0.0, tl.load(scale + row * SCALE_STRIDE))
    x, dx = logits + row * STRIDE, out + row * OUT_STRIDE
    _write_gradient(x, dx, target - FIRST, tl.load(logsumexp + row), row_scale, V, USED, Z_LOSS, LANES, VECTOR)


def _forward_formula(logits: Tensor, targets: Tensor, vocab_size: int, z_loss: float) -> tuple[Tensor, Tensor]:
    logsumexp = upcast(logits[:, :vocab_size]).logsumexp(dim=1)
    return cross_entropy_reference(logits, targets, vocab_size, z_loss), logsumexp


def _backward_formula(
    dlosses: Tensor, logits: Tensor, targets: Tensor, logsumexp: Tensor, vocab_size: int, z_loss: float
) -> Tensor:
    gradient = logits.clone(memory_format=torch.contiguous_format)
    shard_gradient_reference_(gradient, targets, 0, vocab_size, logsumexp, dlosses, z_loss)
    return gradient


def _backward_fake(dlosses: Tensor, logits: Tensor, *_) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    logits, targets, *ctx.constants = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, backward, dlosses, _):
    if dlosses is None:
        return (None,) * 4
    return backward(dlosses, *ctx.saved_tensors, *ctx.constants), None, None, None


_cross_entropy = register(
    "cross_entropy", _forward, _backward, _forward_formula, _backward_formula, _save, _gradients,
    backward_fake=_backward_fake,
)  # fmt: skip
