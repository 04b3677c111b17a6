"""What the ranks of a tensor-parallel group do with activations, and the gradients of it.

Each forward has its backward (Megatron-LM, arXiv:1909.08053; sequence parallelism: arXiv:2205.05198):

    all_reduce            sum          | nothing        the end of a row-parallel layer
    all_reduce_gradient   nothing      | sum            the beginning of a column-parallel one
    reduce_scatter_rows   sum, split   | gather         the same two under sequence parallelism
    all_gather_rows       gather       | sum, split
    split_rows            split        | gather         where all ranks begin with the same rows
    all_gather_columns    gather       | split          logits

Under sequence parallelism a rank has the i-th of n equal parts of a batch's rows (tokens), in a tensor [B, S/n, E], so
that its collectives need no transposition: of B sequences those are parts of one after the other, not 1/n of each.

Every function returns what it is given in a group of one. Sums are the same, bit for bit, on every rank. torch.compile
traces all of it.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megaslm.parallel.groups import Group


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Sum of every rank's `x`. Backward: all ranks have the sum's gradient, which is that of each summand."""
    return x if group.size == 1 else _AllReduce.apply(x, group)


def all_reduce_gradient(x: Tensor, group: Group) -> Tensor:
    """`x`, which all ranks have and of which each computes a part of what follows. Backward: the parts' sum."""
    return x if group.size == 1 else _AllReduceGradient.apply(x, group)


def all_gather_rows(x_BSE: Tensor, group: Group) -> Tensor:
    """Every rank's rows [B, S/n, E], together [B, S, E], of which each computes a part of what follows."""
    return x_BSE if group.size == 1 else _AllGatherRows.apply(x_BSE, group)


def reduce_scatter_rows(x_BSE: Tensor, group: Group) -> Tensor:
    """This rank's rows [B, S/n, E] of the sum of every rank's `x` [B, S, E]; n divides S."""
    return x_BSE if group.size == 1 else _ReduceScatterRows.apply(x_BSE, group)


def split_rows(x_BSE: Tensor, group: Group) -> Tensor:
    """This rank's rows [B, S/n, E] of `x` [B, S, E], which all ranks have; n divides S. Backward: all of them."""
    return x_BSE if group.size == 1 else _SplitRows.apply(x_BSE, group)


def all_gather_columns(x: Tensor, group: Group) -> Tensor:
    """Every rank's columns [..., V/n] side by side: [..., V]. All ranks then do the same with them."""
    return x if group.size == 1 else _AllGatherColumns.apply(x, group)


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
    return _gather(x.unsqueeze(0), group)


def _gather(x: Tensor, group: Group) -> Tensor:
    """Joined in dimension 0."""
    whole = x.new_empty(group.size * x.size(0), *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group.process_group)
    return whole


def _join(x_BSE: Tensor, group: Group) -> Tensor:
    batch, rows, width = x_BSE.shape
    return _gather(x_BSE.reshape(batch * rows, width), group).view(batch, group.size * rows, width)


def _part(x_BSE: Tensor, group: Group) -> Tensor:
    """This rank's rows, not copied."""
    batch, rows, width = x_BSE.shape
    return x_BSE.reshape(group.size, batch, rows // group.size, width)[group.rank]


def _sum_part(x_BSE: Tensor, group: Group) -> Tensor:
    batch, rows, width = x_BSE.shape
    part = x_BSE.new_empty(batch, rows // group.size, width)
    dist.reduce_scatter_tensor(
        part.view(-1, width), x_BSE.reshape(batch * rows, width).contiguous(), group=group.process_group
    )
    return part


class _AllReduce(Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        return summed(x, group)

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


class _AllGatherRows(Function):
    @staticmethod
    def forward(ctx, x_BSE: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _join(x_BSE, group)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _sum_part(gradient, ctx.group), None


class _ReduceScatterRows(Function):
    @staticmethod
    def forward(ctx, x_BSE: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _sum_part(x_BSE, group)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _join(gradient, ctx.group), None


class _SplitRows(Function):
    @staticmethod
    def forward(ctx, x_BSE: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _part(x_BSE, group).clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _join(gradient, ctx.group), None


class _AllGatherColumns(Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return stacked(x, group).movedim(0, -2).flatten(-2)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient.chunk(ctx.group.size, dim=-1)[ctx.group.rank], None
