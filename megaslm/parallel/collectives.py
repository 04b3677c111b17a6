"""What the ranks of a tensor-parallel group do with activations, and the gradients of it.

Each forward has its backward (Megatron-LM, arXiv:1909.08053; sequence parallelism: arXiv:2205.05198):

    all_reduce_             sum          | nothing        the end of a row-parallel layer
    all_reduce_gradient     nothing      | sum            the beginning of a column-parallel one
    reduce_scatter_tokens   sum, split   | gather         the same two under sequence parallelism
    all_gather_tokens       gather       | sum, split
    split_tokens            split        | gather         where all ranks begin with the same tokens
    all_gather_columns      gather       | split          logits

`column_parallel_linear` is the beginning of a column-parallel layer and its product in one: it keeps no gathered
tokens for the backward pass, and reduces beside a product there.

Under sequence parallelism a rank has the i-th of n equal parts of a batch's B S tokens, in a tensor [B, S/n, E], so
that its collectives need no transposition: of B sequences those are parts of one after the other, not 1/n of each.

Every function returns what it is given in a group of one. Sums are the same, bit for bit, on every rank. torch.compile
traces all of it.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megaslm.parallel.groups import Group


def all_reduce_(x: Tensor, group: Group) -> Tensor:
    """Sum of every rank's `x`, which it is written over: nothing else may need that. Backward: all ranks have the
    sum's gradient, which is that of each summand."""
    return x if group.size == 1 else _AllReduce.apply(x, group)


def all_reduce_gradient(x: Tensor, group: Group) -> Tensor:
    """`x`, which all ranks have and of which each computes a part of what follows. Backward: the parts' sum."""
    return x if group.size == 1 else _AllReduceGradient.apply(x, group)


def all_gather_tokens(x_BSE: Tensor, group: Group) -> Tensor:
    """Every rank's tokens [B, S/n, E], together [B, S, E], of which each computes a part of what follows."""
    return x_BSE if group.size == 1 else _AllGatherTokens.apply(x_BSE, group)


def reduce_scatter_tokens(x_BSE: Tensor, group: Group) -> Tensor:
    """This rank's tokens [B, S/n, E] of the sum of every rank's `x` [B, S, E]; n divides S."""
    return x_BSE if group.size == 1 else _ReduceScatterTokens.apply(x_BSE, group)


def split_tokens(x_BSE: Tensor, group: Group) -> Tensor:
    """This rank's tokens [B, S/n, E] of `x` [B, S, E], which all ranks have; n divides S. Backward: all of them."""
    return x_BSE if group.size == 1 else _SplitTokens.apply(x_BSE, group)


def all_gather_columns(x: Tensor, group: Group) -> Tensor:
    """Every rank's columns [..., V/n] side by side: [..., V]. All ranks then do the same with them."""
    return x if group.size == 1 else _AllGatherColumns.apply(x, group)


Rows = tuple[tuple[int, int], ...]
"""Ranges of a weight's rows, as (first, end)."""


def column_parallel_linear(
    x_BSE: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...],
    group: Group,
    own_tokens: bool,
    rows: tuple[Rows, ...] | None = None,
) -> Tensor:
    """This rank's columns [B, S, O/n] of x weight^T + bias. Backward: the gradient of x, summed over ranks.

    x_BSE: [B, S, E], which all ranks have, or with `own_tokens` this rank's, [B, S/n, E].
    weights: one [O/n, E], or several of which `rows` make it up, one below the other; each a parameter itself, which
        ZeRO-3 takes away between its uses and gives back for the backward pass: a view or a copy would stay.
    biases: of the same rows, [O/n] together; or none.

    Kept for the backward pass are x as it is given and the parameters: it gathers tokens once more, as Megatron-LM
    does, and puts the weight together once more. What it communicates runs beside a product. (torch.compile joins the
    two gathers into one and keeps what it gave: there it is less memory only where activations are recomputed.)
    """
    return _ColumnParallelLinear.apply(x_BSE, group, own_tokens, rows, *weights, *biases)


def summed(x: Tensor, group: Group) -> Tensor:
    """Sum of every rank's `x`, without a gradient."""
    if group.size == 1:
        return x
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group.process_group)
    return total


def stacked(x: Tensor, group: Group) -> Tensor:
    """Every rank's `x`, in the order of the ranks: [n, *x.shape], without a gradient."""
    if group.size == 1:
        return x.unsqueeze(0)
    whole = x.new_empty(group.size, *x.shape)
    dist.all_gather_into_tensor(whole, x.contiguous().unsqueeze(0), group=group.process_group)
    return whole


class _AllReduce(Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        if torch.compiler.is_compiling():  # for which nothing is in place until it chooses so
            return summed(x, group)
        dist.all_reduce(x, group=group.process_group)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


class _AllReduceGradient(Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return summed(gradient, ctx.group), None


class _AllGatherTokens(Function):
    @staticmethod
    def forward(ctx, x_BSE: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gather_tokens(x_BSE, group)[0]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _sum_and_split_tokens(gradient, ctx.group)[0], None


class _ReduceScatterTokens(Function):
    @staticmethod
    def forward(ctx, x_BSE: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _sum_and_split_tokens(x_BSE, group)[0]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _gather_tokens(gradient, ctx.group)[0], None


class _SplitTokens(Function):
    @staticmethod
    def forward(ctx, x_BSE: Tensor, group: Group) -> Tensor:
        ctx.group = group
        batch, length, width = x_BSE.shape
        return x_BSE.reshape(group.size, batch, length // group.size, width)[group.rank].clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _gather_tokens(gradient, ctx.group)[0], None


class _AllGatherColumns(Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return stacked(x, group).movedim(0, -2).flatten(-2)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient.chunk(ctx.group.size, dim=-1)[ctx.group.rank], None


class _ColumnParallelLinear(Function):
    @staticmethod
    def forward(ctx, x_BSE: Tensor, group: Group, own_tokens: bool, rows: tuple[Rows, ...] | None, *parameters: Tensor):
        count = 1 if rows is None else len(rows)
        weights, biases = parameters[:count], parameters[count:]
        ctx.group, ctx.own_tokens, ctx.rows = group, own_tokens, rows
        ctx.save_for_backward(x_BSE, *weights)
        if own_tokens:
            x_BSE, _ = _gather_tokens(x_BSE, group)
        return F.linear(x_BSE, _pack(weights, rows), _pack(biases, rows) if biases else None)

    @staticmethod
    def backward(ctx, gradient_BSO: Tensor):
        x_BSE, *weights = ctx.saved_tensors
        wants_x, wants = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        wants_weight, wants_bias = any(wants[: len(weights)]), any(wants[len(weights) :])
        gradient, heights = gradient_BSO.flatten(0, 1), [weight.size(0) for weight in weights]
        dx_BSE, gathering, reducing = None, None, None
        dweights, dbiases = [None] * len(weights), [None] * (len(wants) - len(weights))
        if wants_weight and ctx.own_tokens:
            x_BSE, gathering = _gather_tokens(x_BSE, ctx.group, overlap=True)
        if wants_x:
            dx_BSE = (gradient @ _pack(weights, ctx.rows)).view(*gradient_BSO.shape[:2], -1)
            if ctx.own_tokens:
                dx_BSE, reducing = _sum_and_split_tokens(dx_BSE, ctx.group, overlap=True)
            else:
                reducing = _start(dist.all_reduce, dx_BSE, group=ctx.group, overlap=True)
        if wants_weight:
            _finish(gathering)
            dweights = _unpack(gradient.t() @ x_BSE.flatten(0, 1), heights, ctx.rows)
        if wants_bias:
            dbiases = _unpack(gradient.sum(0), heights, ctx.rows)
        _finish(reducing)
        return dx_BSE, None, None, None, *dweights, *dbiases


def _pack(parameters: Sequence[Tensor], rows: tuple[Rows, ...] | None) -> Tensor:
    """Their `rows`, one below the other; without any the one that there is."""
    if rows is None:
        return parameters[0]
    return torch.cat([p[first:end] for p, ranges in zip(parameters, rows, strict=True) for first, end in ranges])


def _unpack(packed: Tensor, heights: list[int], rows: tuple[Rows, ...] | None) -> list[Tensor]:
    """The gradients of what `_pack` joined, of `heights` rows, by that of the result."""
    if rows is None:
        return [packed]
    gradients, start = [], 0
    for height, ranges in zip(heights, rows, strict=True):
        gradient = packed.new_zeros(height, *packed.shape[1:])
        for first, end in ranges:
            gradient[first:end] = packed[start : start + end - first]
            start += end - first
        gradients.append(gradient)
    return gradients


def _gather_tokens(x_BSE: Tensor, group: Group, overlap: bool = False) -> tuple[Tensor, dist.Work | None]:
    """[B, S/n, E] of every rank -> [B, S, E], there when what comes with it is finished."""
    batch, length, width = x_BSE.shape
    whole = x_BSE.new_empty(batch, group.size * length, width)
    tokens = x_BSE.reshape(-1, width).contiguous()
    return whole, _start(dist.all_gather_into_tensor, whole.view(-1, width), tokens, group=group, overlap=overlap)


def _sum_and_split_tokens(x_BSE: Tensor, group: Group, overlap: bool = False) -> tuple[Tensor, dist.Work | None]:
    """[B, S, E] on every rank -> this rank's [B, S/n, E] of the sum, there when what comes with it is finished."""
    batch, length, width = x_BSE.shape
    part = x_BSE.new_empty(batch, length // group.size, width)
    tokens = x_BSE.reshape(-1, width).contiguous()
    return part, _start(dist.reduce_scatter_tensor, part.view(-1, width), tokens, group=group, overlap=overlap)


def _start(collective: Callable, *tensors: Tensor, group: Group, overlap: bool) -> dist.Work | None:
    """A collective, finished at once or, with `overlap`, by `_finish`; torch.compile overlaps by itself."""
    if torch.compiler.is_compiling() or not overlap:
        collective(*tensors, group=group.process_group)
        return None
    return collective(*tensors, group=group.process_group, async_op=True)


def _finish(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()
