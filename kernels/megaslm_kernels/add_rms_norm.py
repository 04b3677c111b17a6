"""Residual addition and the RMS normalisation of the sum, in one pass.

    s = x + residual          y = rms_norm(s, weight)          as in rms_norm.py
    dx = dresidual = ds + (gradient of y with respect to s)     one buffer for both

The sum is rounded to its type before it is normalised, so that forward and backward see the s that is stored.

Bytes of device memory per element in bf16: forward 8 (read x and residual, write s and y; as two ops 10), backward 8
(read dy, s and ds, write dx; as two ops 12), and 4 per row for r.
"""

import torch
from torch import Tensor

from megaslm_kernels._triton import tl, triton
from megaslm_kernels.launch import architecture, check_weight, launch, row_layout
from megaslm_kernels.registration import register, upcast
from megaslm_kernels.rms_norm import (
    backward_formula,
    backward_with,
    forward_config,
    forward_formula,
    rms_norm_reference,
)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of `x` and `residual` [..., N], and its normalisation scaled by `weight` [N]: x's shape and type both."""
    total = x + residual
    return total, rms_norm_reference(total, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm_reference` in Triton: x and residual of one shape and type, any strides. Results are contiguous.

    The gradients of x and residual are one tensor: autograd copies it where it has to add to one of them.
    Raises ValueError where shapes or types differ.
    """
    total, y, _ = _add_rms_norm(x, residual, weight, eps)
    return total, y


def _forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    (rows, count, stride), (residual_rows, _, residual_stride) = row_layout(x), row_layout(residual)
    n = x.size(-1)
    check_weight(weight, n)
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(f"x {tuple(x.shape)}, {x.dtype}, and residual {tuple(residual.shape)}, {residual.dtype}")
    total, y = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    rstd = torch.empty(count, dtype=torch.float32, device=x.device)
    config = forward_config(count, n, x.dtype, architecture(x.device))
    launch(
        _forward_kernel, config.programs, rows, residual_rows, weight, total, y, rstd,
        X_STRIDE=stride, RESIDUAL_STRIDE=residual_stride, N=n, EPS=eps, BLOCK=config.block,
        num_warps=config.num_warps,
    )  # fmt: skip
    return total, y, rstd


@triton.jit
def _forward_kernel(
    x, residual, weight, total, y, rstd,
    X_STRIDE: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr, N: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < N
    x_row = tl.load(x + row * X_STRIDE + columns, mask=mask, other=0.0).to(tl.float32)
    residual_row = tl.load(residual + row * RESIDUAL_STRIDE + columns, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    rounded = (x_row + residual_row).to(total.dtype.element_ty)
    tl.store(total + row * N + columns, rounded, mask=mask)
    s = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(s * s) * (1.0 / N) + EPS)
    tl.store(rstd + row, r)
    tl.store(y + row * N + columns, (s * r * w).to(y.dtype.element_ty), mask=mask)


def _forward_formula(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = (x + residual).contiguous()
    return total, *forward_formula(total, weight, eps)


def _backward_formula(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    dx, dw = backward_formula(dy, upcast(total), weight, rstd)
    return (dx if dtotal is None else dx + dtotal).to(total.dtype), dw


def _save(ctx, inputs, output) -> None:
    total, _, rstd = output
    ctx.save_for_backward(total, inputs[2], rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _gradients(ctx, backward, dtotal, dy, _):
    if dy is None:
        return dtotal, dtotal, None, None
    # dtotal is None where the sum is used by nothing but this norm.
    dx, dw = backward(dy, dtotal, *ctx.saved_tensors)
    return dx, dx, dw, None


_add_rms_norm = register(
    "add_rms_norm", _forward, backward_with, _forward_formula, _backward_formula, _save, _gradients
)  # fmt: skip
