"""RMS norm of every query and key head, then rotary position embedding, in one pass over the memory.

With x a head's D channels, w the weight of queries or of keys, and R the rotation of `rotary` by the token's angle:

    r = 1 / sqrt(mean(x^2) + eps)          y = R (x r w)
    g = R^T dy                             dx = r (w g - x r mean(w g x r))
    dw = sum over tokens and heads of g x r

Everything in fp32, one rounding at each store: unlike norm then rotation, whose normalised heads are rounded between.

Bytes of device memory per element of a bf16 q or k: forward 4 (unfused 8), backward 6 (unfused 10). Nothing is saved
but the inputs: the backward pass has x at hand and a warp holds whole heads, so that r costs it a few shuffles,
but neither memory nor an allocation. The partial sums of dw are programs x 2 D x 4 bytes, written and read once.
"""

import functools

import torch
from torch import Tensor

from megaslm_kernels._triton import tl, triton
from megaslm_kernels.launch import Architecture, architecture, check_weight, launch, sum_rows, with_unit_stride
from megaslm_kernels.registration import register, upcast
from megaslm_kernels.rms_norm import rms_norm_reference
from megaslm_kernels.rotary import (
    HeadsConfig,
    check_heads,
    contiguous_heads,
    heads_config,
    heads_of,
    load_angles,
    load_tile,
    rotary_reference,
    store_tile,
    strided_heads,
    strides_of,
)


def qk_norm_rotary_reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Normalise each head of `q` [B, S, H, D] and `k` [B, S, K, D], scale it by its weight [D], and rotate it.

    cos, sin [C, R/2] and positions [B, S]: as in `rotary_reference`. Returns new tensors of the shapes and types of
    q and k.
    """
    q, k = rms_norm_reference(q, q_weight, eps), rms_norm_reference(k, k_weight, eps)
    return rotary_reference(q, k, cos, sin, positions)


def qk_norm_rotary(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`qk_norm_rotary_reference` in Triton: q and k of one type and any strides; weights of one type, and these and the
    tables contiguous. Gradients for q, k and the weights.

    Returns q' and k', contiguous.
    """
    return _qk_norm_rotary(q, k, q_weight, k_weight, cos, sin, eps, positions)


@functools.lru_cache(1024)
def forward_config(tokens: int, heads: int, d: int, half: int, dtype: torch.dtype, arch: Architecture) -> HeadsConfig:
    return heads_config(tokens, heads, d, half, dtype, arch, holds_rest=True)


@functools.lru_cache(1024)
def backward_config(tokens: int, heads: int, d: int, half: int, dtype: torch.dtype, arch: Architecture) -> HeadsConfig:
    return heads_config(tokens, heads, d, half, dtype, arch, holds_rest=True, persistent=True)


def _forward(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_heads(q, k, cos, sin, positions)
    check_weight(q_weight, q.size(3))
    check_weight(k_weight, q.size(3))
    q, k = with_unit_stride(q), with_unit_stride(k)
    batch, length, query_heads, d = q.shape
    key_heads, half = k.size(2), cos.size(1)
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    k_out = torch.empty_like(k, memory_format=torch.contiguous_format)
    strides, unit = strides_of(q, k)
    config = forward_config(batch * length, query_heads + key_heads, d, half, q.dtype, architecture(q.device))
    launch(
        _forward_kernel, config.programs, q, k, q_weight, k_weight, cos, sin,
        cos if positions is None else positions.contiguous(), q_out, k_out, length, *strides,
        UNIT=unit, H=query_heads, K=key_heads, D=d, HALF=half, EPS=eps, POSITIONS=positions is not None,
        HEADS=config.heads, PAIRS=config.pairs, REST=config.rest, num_warps=config.num_warps,
    )  # fmt: skip
    return q_out, k_out


def _backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    eps: float, positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, and [2, D] of the two weights."""
    q, k = with_unit_stride(q), with_unit_stride(k)
    dq_out, dk_out = with_unit_stride(dq_out), with_unit_stride(dk_out)
    batch, length, query_heads, d = q.shape
    key_heads, half, tokens = k.size(2), cos.size(1), batch * length
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk = torch.empty_like(k, memory_format=torch.contiguous_format)
    strides, unit = strides_of(q, k, dq_out, dk_out)
    config = backward_config(tokens, query_heads + key_heads, d, half, q.dtype, architecture(q.device))
    programs, tiles, _ = config.programs
    partials = torch.empty(programs * tiles, 2 * d, dtype=torch.float32, device=q.device)
    launch(
        _backward_kernel, config.programs, q, k, dq_out, dk_out, q_weight, k_weight, cos, sin,
        cos if positions is None else positions.contiguous(), dq, dk, partials, tokens, length, *strides,
        UNIT=unit, H=query_heads, K=key_heads, D=d, HALF=half, EPS=eps, POSITIONS=positions is not None,
        HEADS=config.heads, PAIRS=config.pairs, REST=config.rest, num_warps=config.num_warps,
    )  # fmt: skip
    return dq, dk, sum_rows(partials, q_weight.dtype).view(2, d)


@triton.jit(do_not_specialize=["length", "q_batch", "q_token", "q_head", "k_batch", "k_token", "k_head"])
def _forward_kernel(
    q, k, q_weight, k_weight, cos, sin, positions, q_out, k_out,
    length, q_batch, q_token, q_head, k_batch, k_token, k_head,
    UNIT: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr,
    POSITIONS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    heads = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    x = strided_heads(q, k, heads, token, length, q_batch, q_token, q_head, k_batch, k_token, k_head, UNIT, H)
    y = contiguous_heads(q_out, k_out, heads, token, H, K, D)
    w = heads_of(q_weight, k_weight, heads, 0, 0, 0, 0, H)
    pairs = tl.arange(0, PAIRS)
    first, second = pairs[None, :], HALF + pairs[None, :]
    is_query, exists = heads[:, None] < H, heads[:, None] < H + K
    mask = exists & (first < HALF)
    x1, x2 = load_tile(x, first, is_query, mask), load_tile(x, second, is_query, mask)
    squares = tl.sum(x1 * x1 + x2 * x2, axis=1)
    if REST:
        rest = 2 * HALF + tl.arange(0, REST)[None, :]
        rest_mask = exists & (rest < D)
        x3 = load_tile(x, rest, is_query, rest_mask)
        squares += tl.sum(x3 * x3, axis=1)
    c, s = load_angles(cos, sin, positions, token, length, mask, HALF, POSITIONS)
    r = tl.rsqrt(squares * (1.0 / D) + EPS)[:, None]
    x1, x2 = x1 * r * load_tile(w, first, is_query, mask), x2 * r * load_tile(w, second, is_query, mask)
    store_tile(y, first, is_query, mask, x1 * c - x2 * s)
    store_tile(y, second, is_query, mask, x2 * c + x1 * s)
    if REST:
        store_tile(y, rest, is_query, rest_mask, x3 * r * load_tile(w, rest, is_query, rest_mask))


@triton.jit(
    do_not_specialize=[
        "tokens", "length", "q_batch", "q_token", "q_head", "k_batch", "k_token", "k_head",
        "dq_batch", "dq_token", "dq_head", "dk_batch", "dk_token", "dk_head",
    ]
)  # fmt: skip
def _backward_kernel(
    q, k, dq_out, dk_out, q_weight, k_weight, cos, sin, positions, dq, dk, partials,
    tokens, length, q_batch, q_token, q_head, k_batch, k_token, k_head,
    dq_batch, dq_token, dq_head, dk_batch, dk_token, dk_head,
    UNIT: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr,
    POSITIONS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    heads = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    w = heads_of(q_weight, k_weight, heads, 0, 0, 0, 0, H)
    pairs = tl.arange(0, PAIRS)
    first, second = pairs[None, :], HALF + pairs[None, :]
    is_query, exists = heads[:, None] < H, heads[:, None] < H + K
    mask = exists & (first < HALF)
    w1, w2 = load_tile(w, first, is_query, mask), load_tile(w, second, is_query, mask)
    # A row of the tile is the same head whatever the token: dw is summed per head here, and over heads at the end.
    dw1, dw2 = tl.zeros((HEADS, PAIRS), dtype=tl.float32), tl.zeros((HEADS, PAIRS), dtype=tl.float32)
    if REST:
        rest = 2 * HALF + tl.arange(0, REST)[None, :]
        rest_mask = exists & (rest < D)
        w3 = load_tile(w, rest, is_query, rest_mask)
        dw3 = tl.zeros((HEADS, REST), dtype=tl.float32)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        x = strided_heads(q, k, heads, token, length, q_batch, q_token, q_head, k_batch, k_token, k_head, UNIT, H)
        dy = strided_heads(
            dq_out, dk_out, heads, token, length, dq_batch, dq_token, dq_head, dk_batch, dk_token, dk_head, UNIT, H
        )
        dx = contiguous_heads(dq, dk, heads, token, H, K, D)
        x1, x2 = load_tile(x, first, is_query, mask), load_tile(x, second, is_query, mask)
        dy1, dy2 = load_tile(dy, first, is_query, mask), load_tile(dy, second, is_query, mask)
        c, s = load_angles(cos, sin, positions, token, length, mask, HALF, POSITIONS)
        g1, g2 = dy1 * c + dy2 * s, dy2 * c - dy1 * s
        squares = tl.sum(x1 * x1 + x2 * x2, axis=1)
        product = tl.sum(g1 * w1 * x1 + g2 * w2 * x2, axis=1)
        if REST:
            x3, g3 = load_tile(x, rest, is_query, rest_mask), load_tile(dy, rest, is_query, rest_mask)
            squares += tl.sum(x3 * x3, axis=1)
            product += tl.sum(g3 * w3 * x3, axis=1)
        r = tl.rsqrt(squares * (1.0 / D) + EPS)
        mean = (product * r * (1.0 / D))[:, None]
        r = r[:, None]
        x1, x2 = x1 * r, x2 * r
        dw1 += g1 * x1
        dw2 += g2 * x2
        store_tile(dx, first, is_query, mask, (g1 * w1 - x1 * mean) * r)
        store_tile(dx, second, is_query, mask, (g2 * w2 - x2 * mean) * r)
        if REST:
            x3 = x3 * r
            dw3 += g3 * x3
            store_tile(dx, rest, is_query, rest_mask, (g3 * w3 - x3 * mean) * r)
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    partial = partials + program * (2 * D)
    _store_sums(partial, dw1, is_query, pairs, HALF, D)
    _store_sums(partial + HALF, dw2, is_query, pairs, HALF, D)
    if REST:
        _store_sums(partial + 2 * HALF, dw3, is_query, tl.arange(0, REST), D - 2 * HALF, D)


@triton.jit
def _store_sums(partial, dw, is_query, channels, COUNT: tl.constexpr, D: tl.constexpr):
    """Sums of `dw` over the query heads, and D further those over the key heads."""
    tl.store(partial + channels, tl.sum(tl.where(is_query, dw, 0.0), axis=0), mask=channels < COUNT)
    tl.store(partial + D + channels, tl.sum(tl.where(is_query, 0.0, dw), axis=0), mask=channels < COUNT)


def _forward_formula(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    normalised = (_normalise(x, eps)[0] * upcast(w) for x, w in ((q, q_weight), (k, k_weight)))
    rotated = rotary_reference(*normalised, cos, sin, positions)
    return rotated[0].to(q.dtype).contiguous(), rotated[1].to(k.dtype).contiguous()


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Heads of unit mean square, and what they were multiplied with."""
    x = upcast(x)
    r = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return x * r, r


def _backward_formula(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    eps: float, positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rotated_back = rotary_reference(upcast(dq_out), upcast(dk_out), cos, -sin, positions)
    dx, dw = [], []
    for x, g, weight in zip((q, k), rotated_back, (q_weight, k_weight), strict=True):
        normalised, r = _normalise(x, eps)
        scaled = g * upcast(weight)
        mean = (scaled * normalised).mean(dim=-1, keepdim=True)
        dx.append(((scaled - normalised * mean) * r).to(x.dtype).contiguous())
        dw.append((g * normalised).sum(dim=(0, 1, 2)).to(weight.dtype))
    return *dx, torch.stack(dw)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.eps, positions = inputs
    ctx.save_for_backward(*tensors, positions)


def _gradients(ctx, backward, dq_out, dk_out):
    *tensors, positions = ctx.saved_tensors
    dq, dk, dw = backward(dq_out, dk_out, *tensors, ctx.eps, positions)
    return dq, dk, dw[0], dw[1], None, None, None, None


_qk_norm_rotary = register(
    "qk_norm_rotary", _forward, _backward, _forward_formula, _backward_formula, _save, _gradients
)
