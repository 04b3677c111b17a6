"""What the kernels' launchers share: the GPU's facts, the layout of a launch over rows, and the launch itself."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from megaslm_kernels._triton import INTERPRETED, tl, triton

WARPS_PER_MULTIPROCESSOR = 32
"""Of a persistent grid: half of what the hardware holds, which 64 registers a thread would allow too."""


@dataclass(frozen=True)
class Architecture:
    """Of a GPU, what a launch depends on."""

    multiprocessors: int
    l2_bytes: int


HOPPER = Architecture(132, 50 * 2**20)
"""H100 SXM and H200: what the kernels are laid out and checked for."""


@functools.cache
def architecture(device: torch.device) -> Architecture:
    """Facts of the GPU `device`. A tensor that is on none (Triton's interpreter, a check that only compiles) counts as
    on Hopper."""
    if device.type != "cuda":
        return HOPPER
    properties = torch.cuda.get_device_properties(device)
    return Architecture(properties.multi_processor_count, properties.L2_cache_size)


@dataclass(frozen=True)
class RowConfig:
    """Launch of a kernel in which one program holds one row at a time."""

    block: int
    """Elements of a row that a program holds: the row length rounded up to a power of two."""
    num_warps: int
    programs: int
    """Size of the grid."""


def row_config(rows: int, n: int, dtype: torch.dtype, arch: Architecture, persistent: bool) -> RowConfig:
    """Launch for `rows` rows of `n` elements.

    persistent: the grid fills the GPU once and its programs take the rows in turn (backward passes, which carry a
    sum over rows); a thread has one load of 128 bits from each tensor. Otherwise a row is a program and a thread has
    two of them, but for rows of up to 2 KB, which are one warp's: it needs no barrier and no shared memory.
    """
    block, vector = max(32, triton.next_power_of_2(n)), 16 // dtype.itemsize
    if not persistent:
        num_warps = 1 if block * dtype.itemsize <= 2048 else min(16, block // (32 * 2 * vector))
        return RowConfig(block, num_warps, rows)
    num_warps = min(16, max(1, block // (32 * vector)))
    per_multiprocessor = max(1, min(16, WARPS_PER_MULTIPROCESSOR // num_warps))
    return RowConfig(block, num_warps, min(rows, arch.multiprocessors * per_multiprocessor))


def row_layout(x: Tensor) -> tuple[Tensor, int, int]:
    """`x` [..., N] as rows of N adjacent elements: a tensor that starts where they do, their number, and their stride.

    The tensor is x itself where x is contiguous, whatever its shape (a view would cost the host 2 to 5 us), a view
    where there is one, else a copy.
    """
    n = x.size(-1)
    if not x.is_contiguous():
        x = x.reshape(-1, n)
        if x.stride(1) == 1:
            return x, x.size(0), x.stride(0)
        x = x.contiguous()
    return x, x.numel() // n, n


def with_unit_stride(x: Tensor) -> Tensor:
    """`x`, copied only where its last stride is not 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check_weight(weight: Tensor, n: int) -> None:
    """Raise ValueError unless `weight` is [n] and contiguous: a kernel would read other memory (under ZeRO-3 a weight
    that is not gathered has no elements)."""
    if weight.numel() != n or not weight.is_contiguous():
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)}, strides {weight.stride()}, for rows of {n} elements"
        )


_compiled: dict[tuple, object] = {}


def launch(kernel, programs: int | tuple[int, int, int], *arguments, num_warps: int, **constants) -> None:
    """Run `kernel` on the current stream: tensors and integers, then the constexprs, both in the kernel's order.

    No program, no launch. Triton's own call sorts its arguments into a cache key in 7 us. This one, in half of that,
    knows that only types and alignment of the tensors and the width of the integers may differ (which must not be
    specialised on: the first call checks) and calls what Triton has compiled for them.
    """
    grid = (programs, 1, 1) if isinstance(programs, int) else programs
    if 0 in grid:
        return
    if INTERPRETED:
        kernel[grid](*arguments, **constants)
        return
    device = arguments[0].get_device()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device, wherever the tensors are
            return launch(kernel, programs, *arguments, num_warps=num_warps, **constants)
    key = [id(kernel), num_warps, device, *constants.values()]
    for argument in arguments:
        if isinstance(argument, Tensor):
            key.append(argument.dtype)
            key.append(argument.data_ptr() % 16 == 0)  # Triton's condition for 128-bit loads
        else:
            key.append(argument < 2**31)  # Triton's condition for 32 bits
    key = tuple(key)
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = _first_launch(kernel, grid, arguments, constants, num_warps)
    else:
        compiled[grid](*arguments, *constants.values())


def _first_launch(kernel, grid, arguments, constants, num_warps):
    assert kernel.arg_names[len(arguments) :] == list(constants), f"{kernel.__name__}: constants out of order"
    for parameter, argument in zip(kernel.params, arguments, strict=False):
        assert parameter.do_not_specialize or not isinstance(argument, int), f"{kernel.__name__}: {parameter.name}"
    return kernel[grid](*arguments, **constants, num_warps=num_warps)


def sum_rows(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of `partials` [P, N], fp32, over P, always in the same order, as [N] of `dtype`. P may be zero."""
    count, n = partials.shape
    total = torch.empty(n, dtype=dtype, device=partials.device)
    launch(
        _sum_rows_kernel, -(-n // 16), partials, total, count, N=n, ROWS=512, COLUMNS=16, num_warps=8
    )  # fmt: skip
    return total


@triton.jit(do_not_specialize=["count"])
def _sum_rows_kernel(partials, total, count, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, count, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows[:, None] < count) & (columns[None, :] < N)
        sums += tl.load(partials + rows[:, None].to(tl.int64) * N + columns[None, :], mask=mask, other=0.0)
    tl.store(total + columns, tl.sum(sums, axis=0).to(total.dtype.element_ty), mask=columns < N)
