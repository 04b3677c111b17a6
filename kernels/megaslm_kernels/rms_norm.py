"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467) over the last dimension.

    r = 1 / sqrt(mean(x^2) + eps)          y = x r w
    dx = r (w dy - x r mean(w dy x r))     dw = sum over rows of dy x r

Statistics and products in fp32, one rounding at each store.

Bytes of device memory per element of a bf16 x: forward 4 (read x, write y), backward 6 (read x and dy, write dx), and
4 per row for r. The weight comes from L2; the partial sums of dw are programs x N x 4 bytes, written and read once.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from megaslm_kernels._triton import tl, triton
from megaslm_kernels.launch import (
    Architecture,
    RowConfig,
    architecture,
    check_weight,
    launch,
    row_config,
    row_layout,
    sum_rows,
)
from megaslm_kernels.registration import register, upcast


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of `x` [..., N] and scale it by `weight` [N]. Returns x's shape and type."""
    return F.rms_norm(x, weight.shape, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_reference` in Triton: x [..., N], any strides; weight [N], contiguous. Returns [..., N], contiguous.
    Raises ValueError for another weight."""
    return _rms_norm(x, weight, eps)[0]


@functools.lru_cache(1024)
def forward_config(rows: int, n: int, dtype: torch.dtype, arch: Architecture) -> RowConfig:
    """A row a program."""
    return row_config(rows, n, dtype, arch, persistent=False)


@functools.lru_cache(1024)
def backward_config(rows: int, n: int, dtype: torch.dtype, arch: Architecture) -> RowConfig:
    """Persistent; few elements a thread, since x, dy, w and the sum of dw are held at once in fp32."""
    return row_config(rows, n, dtype, arch, persistent=True)


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, count, stride = row_layout(x)
    n = x.size(-1)
    check_weight(weight, n)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = torch.empty(count, dtype=torch.float32, device=x.device)
    config = forward_config(count, n, x.dtype, architecture(x.device))
    launch(
        _forward_kernel, config.programs, rows, weight, y, rstd,
        X_STRIDE=stride, N=n, EPS=eps, BLOCK=config.block, num_warps=config.num_warps,
    )  # fmt: skip
    return y, rstd


def _backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return backward_with(dy, None, x, weight, rstd)


def backward_with(
    dy: Tensor, other_dx: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and the weight; other_dx: what else x's gradient holds, added in fp32."""
    (rows, count, stride), (dy_rows, _, dy_stride) = row_layout(x), row_layout(dy)
    other_rows, _, other_stride = (dy_rows, count, dy_stride) if other_dx is None else row_layout(other_dx)
    n = x.size(-1)
    config = backward_config(count, n, x.dtype, architecture(x.device))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    partials = torch.empty(config.programs, n, dtype=torch.float32, device=x.device)
    launch(
        _backward_kernel, config.programs, dy_rows, other_rows, rows, weight, rstd, dx, partials, count,
        DY_STRIDE=dy_stride, OTHER_STRIDE=other_stride, HAS_OTHER=other_dx is not None, X_STRIDE=stride,
        N=n, BLOCK=config.block, num_warps=config.num_warps,
    )  # fmt: skip
    return dx, sum_rows(partials, weight.dtype)


@triton.jit
def _forward_kernel(
    x, weight, y, rstd,
    X_STRIDE: tl.constexpr, N: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # before the product: row * stride passes 2^31 in real batches
    columns = tl.arange(0, BLOCK)
    mask = columns < N
    x_row = tl.load(x + row * X_STRIDE + columns, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x_row * x_row) * (1.0 / N) + EPS)
    tl.store(rstd + row, r)
    tl.store(y + row * N + columns, (x_row * r * w).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _backward_kernel(
    dy, other_dx, x, weight, rstd, dx, partials, count,
    DY_STRIDE: tl.constexpr, OTHER_STRIDE: tl.constexpr, HAS_OTHER: tl.constexpr, X_STRIDE: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < N
    w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(program, count, tl.num_programs(0)):
        x_row = tl.load(x + row * X_STRIDE + columns, mask=mask, other=0.0).to(tl.float32)
        dy_row = tl.load(dy + row * DY_STRIDE + columns, mask=mask, other=0.0).to(tl.float32)
        if HAS_OTHER:
            other_row = tl.load(other_dx + row * OTHER_STRIDE + columns, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(rstd + row)
        normalised = x_row * r
        dw += dy_row * normalised
        scaled = dy_row * w
        mean = tl.sum(scaled * normalised) * (1.0 / N)
        dx_row = (scaled - normalised * mean) * r
        if HAS_OTHER:
            dx_row += other_row
        tl.store(dx + row * N + columns, dx_row.to(dx.dtype.element_ty), mask=mask)
    tl.store(partials + program * N + columns, dw, mask=mask)


def forward_formula(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x32 = upcast(x).contiguous()
    rstd = torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)
    return (x32 * rstd * upcast(weight)).to(x.dtype), rstd.flatten()


def backward_formula(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    rows, dy_rows = (upcast(t).reshape(-1, t.size(-1)) for t in (x, dy))
    rstd = rstd.unsqueeze(1)
    normalised, scaled = rows * rstd, dy_rows * upcast(weight)
    dx = (scaled - normalised * (scaled * normalised).mean(dim=1, keepdim=True)) * rstd
    return dx.to(x.dtype).reshape(x.shape).contiguous(), (dy_rows * normalised).sum(dim=0).to(weight.dtype)


def _save(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, backward, dy, _):
    if dy is None:
        return None, None, None
    return *backward(dy, *ctx.saved_tensors), None


_rms_norm = register("rms_norm", _forward, _backward, forward_formula, backward_formula, _save, _gradients)
