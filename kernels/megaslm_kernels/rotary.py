"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the half-split layout of GPT-NeoX and Llama.

Channel i of the first half of the rotated part is paired with channel i of the second half:

    y1 = x1 cos - x2 sin          dx1 = dy1 cos + dy2 sin
    y2 = x2 cos + x1 sin          dx2 = dy2 cos - dy1 sin

Channels past the rotated part (rotary fraction below one) pass through. The backward pass is the rotation by the
opposite angle, one kernel for both. Products in fp32, one rounding at the store.

Bytes of device memory per element of a bf16 q or k: 4, forward and backward. cos and sin come from L2.

A program holds heads of one token, queries and keys as rows of one tile: all of them share the angles, and 12 query and
4 key heads fill a tile of 16.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from megaslm_kernels._triton import tl, triton
from megaslm_kernels.launch import Architecture, architecture, launch, with_unit_stride
from megaslm_kernels.registration import register


def rotary_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate `q` [B, S, H, D] and `k` [B, S, K, D] by the angles of their positions.

    cos, sin: of every position and frequency, [C, R/2], fp32, with 2 <= R <= D and C past the largest position.
    positions: [B, S], integer; None: token s of a sequence is at position s.
    Returns new tensors of the shapes and types of q and k; computed in fp32.
    """
    rows = slice(q.size(1)) if positions is None else positions
    cos, sin = cos[rows].unsqueeze(-2), sin[rows].unsqueeze(-2)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2, rest = x.split((cos.size(-1), cos.size(-1), x.size(-1) - 2 * cos.size(-1)), dim=-1)
    return torch.cat(((x1 * cos - x2 * sin).to(x.dtype), (x2 * cos + x1 * sin).to(x.dtype), rest), dim=-1)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`rotary_reference` in Triton: q and k of one type and any strides; cos and sin contiguous. No gradient for these.

    Returns q' and k', contiguous.
    """
    return _rotary(q, k, cos, sin, positions)


@dataclass(frozen=True)
class HeadsConfig:
    """Launch of a kernel in which one program holds heads of one token at a time."""

    heads: int
    """Heads in a program's tile, of queries and keys together: a power of two."""
    pairs: int
    """Pairs of channels in the tile: R/2 rounded up to a power of two."""
    rest: int
    """Channels past the rotated ones, rounded up to a power of two; zero where all are rotated."""
    num_warps: int
    programs: tuple[int, int, int]
    """Size of the grid: tokens (or persistent programs that take them in turn), and tiles of a token's heads."""


def heads_config(
    tokens: int, heads: int, d: int, half: int, dtype: torch.dtype, arch: Architecture, holds_rest: bool = False,
    persistent: bool = False,
) -> HeadsConfig:  # fmt: skip
    """Launch for `tokens` tokens of `heads` heads (H + K) of `d` channels, of which 2 `half` are rotated.

    A thread has one 128-bit load for the first channels of its pairs and one for the second: 8 pairs in bf16. A kernel
    that only rotates then needs so few registers that a multiprocessor holds nearly all the warps it can. No head is
    shared between warps: no barrier. A tile is one to four warps (eight in fp32).
    holds_rest: the channels past the rotated ones stay in registers and count as pairs do; else they are only copied.
    persistent: the grid fills the GPU once, with 16 warps a multiprocessor, as many as 128 registers a thread allow.
    These have few loads in flight, so the tile is the one with fewest rows that hold no head: 20 heads are three
    tiles of 8 rather than one of 32. Otherwise a program is one token and one tile of its heads.
    """
    pairs = triton.next_power_of_2(half)
    rest = triton.next_power_of_2(d - 2 * half) if d > 2 * half else 0
    held = pairs + rest // 2 if holds_rest else pairs
    smallest, largest = _power_of_2_below(256 // held), _power_of_2_below(1024 // held)
    block = max(smallest, min(triton.next_power_of_2(heads), largest))
    if persistent:
        halves = (block >> i for i in range(1, 8))
        block = min((block, *(size for size in halves if size >= max(8, smallest))), key=lambda size: -heads % size)
    tiles = triton.cdiv(heads, block)
    num_warps = triton.next_power_of_2(triton.cdiv(block * held, 32 * 16 // dtype.itemsize))
    resident = arch.multiprocessors * (16 // num_warps)
    programs = min(tokens, max(1, resident // tiles)) if persistent else tokens
    return HeadsConfig(block, pairs, rest, num_warps, (programs, tiles, 1))


def _power_of_2_below(n: int) -> int:
    """The largest that is at most n, and at least 1."""
    return 1 << max(0, n.bit_length() - 1)


@functools.lru_cache(1024)
def rotary_config(tokens: int, heads: int, d: int, half: int, dtype: torch.dtype, arch: Architecture) -> HeadsConfig:
    """A program per token and tile of its heads, forward and backward."""
    return heads_config(tokens, heads, d, half, dtype, arch)


def strides_of(*tensors: Tensor) -> tuple[list[int], int]:
    """Strides of the batch, sequence and head dimension of each tensor, in units of so many elements, and the unit.

    The unit is the largest power of two up to 8 that divides them all. It is a constant of the kernel, which proves the
    alignment that 128-bit loads need; the strides are not, since those of most tensors change with S.
    """
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    bits = 8
    for stride in strides:
        bits |= stride
    unit = bits & -bits
    return [stride // unit for stride in strides], unit


def check_heads(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    """Raise ValueError for sizes of which a kernel would read other memory. (The positions' values are not looked at:
    the host would have to wait for them.)"""
    if q.shape[:2] != k.shape[:2] or q.size(3) != k.size(3) or q.dtype != k.dtype:
        raise ValueError(f"q {tuple(q.shape)}, {q.dtype}, and k {tuple(k.shape)}, {k.dtype}")
    for table in (cos, sin):
        if table.shape != cos.shape or table.dtype != torch.float32 or not table.is_contiguous():
            raise ValueError(f"a table {tuple(table.shape)}, {table.dtype}, strides {table.stride()}")
    if 2 * cos.size(1) > q.size(3):
        raise ValueError(f"tables {tuple(cos.shape)} for heads of {q.size(3)} channels")
    if positions is None and q.size(1) > cos.size(0):
        raise ValueError(f"{q.size(1)} tokens, and tables of {cos.size(0)} positions")
    if positions is not None and positions.shape != q.shape[:2]:
        raise ValueError(f"positions {tuple(positions.shape)} for tokens {tuple(q.shape[:2])}")


def _launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, conjugate: bool
) -> tuple[Tensor, Tensor]:
    q, k = with_unit_stride(q), with_unit_stride(k)
    batch, length, query_heads, d = q.shape
    key_heads, half = k.size(2), cos.size(1)
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    k_out = torch.empty_like(k, memory_format=torch.contiguous_format)
    strides, unit = strides_of(q, k)
    config = rotary_config(batch * length, query_heads + key_heads, d, half, q.dtype, architecture(q.device))
    launch(
        _kernel, config.programs, q, k, cos, sin, cos if positions is None else positions.contiguous(), q_out, k_out,
        length, *strides,
        UNIT=unit, H=query_heads, K=key_heads, D=d, HALF=half, CONJUGATE=conjugate, POSITIONS=positions is not None,
        HEADS=config.heads, PAIRS=config.pairs, REST=config.rest, num_warps=config.num_warps,
    )  # fmt: skip
    return q_out, k_out


@triton.jit
def heads_of(q, k, heads, q_offset, k_offset, q_head, k_head, H: tl.constexpr):
    """Where `heads` [HEADS], numbered through the H of q and then those of k, start: as heads of q, and as of k."""
    return (q + q_offset + heads * q_head)[:, None], (k + k_offset + (heads - H) * k_head)[:, None]


@triton.jit
def strided_heads(
    q, k, heads, token, length, q_batch, q_token, q_head, k_batch, k_token, k_head, UNIT: tl.constexpr, H: tl.constexpr
):
    """`heads_of` a token in tensors with the strides of `strides_of`."""
    b, s = (token // length).to(tl.int64) * UNIT, (token % length).to(tl.int64) * UNIT
    q_offset, k_offset = b * q_batch + s * q_token, b * k_batch + s * k_token
    return heads_of(q, k, heads * UNIT, q_offset, k_offset, q_head, k_head, H * UNIT)


@triton.jit
def contiguous_heads(q, k, heads, token, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr):
    """`heads_of` a token in contiguous tensors."""
    token = tl.cast(token, tl.int64)  # an int of Python in the interpreter's loops
    return heads_of(q, k, heads, token * (H * D), token * (K * D), D, D, H)


@triton.jit
def tile_of(heads, channels, is_query):
    """Pointers to `channels` [1, C] of `heads_of`."""
    # Triton 3.9 knows no alignment of pointers that are selected before the channels are added.
    return tl.where(is_query, heads[0] + channels, heads[1] + channels)


@triton.jit
def load_tile(heads, channels, is_query, mask):
    return tl.load(tile_of(heads, channels, is_query), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(heads, channels, is_query, mask, values):
    pointers = tile_of(heads, channels, is_query)
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def load_angles(cos, sin, positions, token, length, mask, HALF: tl.constexpr, POSITIONS: tl.constexpr):
    """cos and sin of a token's position as tiles [HEADS, PAIRS] whose rows are equal.

    A warp's rows read the same addresses, at the price of one; a single row spread over the tile would go through
    shared memory.
    """
    position = tl.load(positions + token) if POSITIONS else token % length
    pairs = tl.broadcast_to(tl.arange(0, mask.shape[1])[None, :], mask.shape)
    angle = position.to(tl.int64) * HALF + pairs
    return tl.load(cos + angle, mask=mask, other=0.0), tl.load(sin + angle, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["length", "q_batch", "q_token", "q_head", "k_batch", "k_token", "k_head"])
def _kernel(
    q, k, cos, sin, positions, q_out, k_out, length, q_batch, q_token, q_head, k_batch, k_token, k_head,
    UNIT: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    CONJUGATE: tl.constexpr, POSITIONS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    heads = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    x = strided_heads(q, k, heads, token, length, q_batch, q_token, q_head, k_batch, k_token, k_head, UNIT, H)
    y = contiguous_heads(q_out, k_out, heads, token, H, K, D)
    pairs = tl.arange(0, PAIRS)
    first, second = pairs[None, :], HALF + pairs[None, :]
    is_query, exists = heads[:, None] < H, heads[:, None] < H + K
    mask = exists & (first < HALF)
    x1, x2 = load_tile(x, first, is_query, mask), load_tile(x, second, is_query, mask)
    c, s = load_angles(cos, sin, positions, token, length, mask, HALF, POSITIONS)
    if CONJUGATE:
        s = -s
    store_tile(y, first, is_query, mask, x1 * c - x2 * s)
    store_tile(y, second, is_query, mask, x2 * c + x1 * s)
    if REST:
        rest = 2 * HALF + tl.arange(0, REST)[None, :]
        mask = exists & (rest < D)
        tl.store(tile_of(y, rest, is_query), tl.load(tile_of(x, rest, is_query), mask=mask), mask=mask)


def _forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    check_heads(q, k, cos, sin, positions)
    return _launch(q, k, cos, sin, positions, conjugate=False)


def _backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    return _launch(dq, dk, cos, sin, positions, conjugate=True)


def _forward_formula(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k = rotary_reference(q, k, cos, sin, positions)
    return q.contiguous(), k.contiguous()


def _backward_formula(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _forward_formula(dq, dk, cos, -sin, positions)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[2:])


def _gradients(ctx, backward, dq, dk):
    return *backward(dq, dk, *ctx.saved_tensors), None, None, None


_rotary = register("rotary", _forward, _backward, _forward_formula, _backward_formula, _save, _gradients)
