"""The layers of a model of which every rank of a tensor-parallel group has a part (Megatron-LM, arXiv:1909.08053).

Columns and rows are those of the matrix that x is multiplied with from the right: the weight, transposed. A column-
parallel layer has some of the outputs, of all inputs; a row-parallel one all outputs, of some inputs, summed over the
group.

Under sequence parallelism (arXiv:2205.05198) x between two such pairs is this rank's tokens alone, see collectives.py.
That is for training, where the length is known to divide: in evaluation mode every layer takes whole sequences.

Parameters are read as `self.weight` each time, and inside of the layer's own forward: under ZeRO-3 they are there only
then. Shapes as in megaslm/model/transformer.py, n ranks.
"""

import functools

import torch.nn.functional as F
from megaslm_kernels import Ops
from torch import Tensor, nn

from megaslm.parallel import collectives
from megaslm.parallel.groups import Group


class ParallelLayer(nn.Module):
    """A layer that shares its work with the other ranks of `group`."""

    def __init__(self, group: Group, sequence_parallel: bool):
        super().__init__()
        self.group = group
        self.sequence_parallel = sequence_parallel

    @property
    def takes_own_tokens(self) -> bool:
        """Whether x, outside of the layers, is this rank's tokens alone."""
        return self.sequence_parallel and self.training

    def enter(
        self, x_BSE: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...] = (None,), **packing
    ) -> Tensor:
        """This rank's columns of a linear layer's result, see `collectives.column_parallel_linear`."""
        biases = () if biases[0] is None else biases
        return collectives.column_parallel_linear(x_BSE, weights, biases, self.group, self.takes_own_tokens, **packing)

    def leave(self, partial_BSE: Tensor) -> Tensor:
        """The sum of the ranks' parts of a computation: this rank's tokens of it, or all. The part is written over."""
        if self.takes_own_tokens:
            return collectives.reduce_scatter_tokens(partial_BSE, self.group)
        return collectives.all_reduce_(partial_BSE, self.group)

    def extra_repr(self) -> str:
        shapes = [f"{name} {tuple(p.shape)}" for name, p in self.named_parameters(recurse=False)]
        place = f"rank {self.group.rank} of {self.group.size}"
        return ", ".join([*shapes, place, f"sequence_parallel={self.sequence_parallel}"])


class ColumnParallelLinear(ParallelLayer):
    """x -> this rank's columns of x weight^T + bias. weight: [O/n, I], bias: [O/n] or None."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, group: Group, sequence_parallel: bool):
        super().__init__(group, sequence_parallel)
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.enter(x_BSE, (self.weight,), (self.bias,))


class RowParallelLinear(ParallelLayer):
    """This rank's columns of x -> all of x weight^T + bias. weight: [O, I/n], bias: [O], on every rank, or None."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, group: Group, sequence_parallel: bool):
        super().__init__(group, sequence_parallel)
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x_BSE: Tensor) -> Tensor:
        y_BSE = self.leave(F.linear(x_BSE, self.weight))
        return y_BSE if self.bias is None else y_BSE + self.bias


class GroupedQueryProjection(ParallelLayer):
    """x -> the queries of this rank's heads, and the keys and values of the one head that they share, packed.

    For more ranks than key/value heads, of which all ranks have all. Of the gradient of those weights each computes the
    part that its own queries are answerable for: sharding.py has them summed.

    q_weight: [H D / n, E]; kv_weight: [2 K D, E], all keys, then all values; the biases alike, or None.
    kv_head: this rank's.
    """

    def __init__(
        self, q: tuple[nn.Parameter, nn.Parameter | None], kv: tuple[nn.Parameter, nn.Parameter | None],
        head_dim: int, kv_head: int, group: Group, sequence_parallel: bool,
    ):  # fmt: skip
        super().__init__(group, sequence_parallel)
        self.kv_head = kv_head
        self.q_weight, self.kv_weight = q[0], kv[0]
        self.register_parameter("q_bias", q[1])
        self.register_parameter("kv_bias", kv[1])

        keys, first = kv[0].size(0) // 2, kv_head * head_dim
        own_kv = tuple((start, start + head_dim) for start in (first, keys + first))
        self.rows = (((0, q[0].size(0)),), own_kv)

    def forward(self, x_BSE: Tensor) -> Tensor:
        # One product of the packed weights is cheaper than the packing of two products.
        return self.enter(x_BSE, (self.q_weight, self.kv_weight), (self.q_bias, self.kv_bias), rows=self.rows)


class VocabularyParallelEmbedding(ParallelLayer):
    """Token ids [B, S] -> [B, S, E], or this rank's tokens of it, of a table of which this rank has [V/n, E].

    An id that no rank has gives zeros, where a whole table raises: whoever loads tokens checks them.
    """

    def __init__(self, weight: nn.Parameter, group: Group, sequence_parallel: bool):
        super().__init__(group, sequence_parallel)
        self.weight = weight

    def forward(self, tokens_BS: Tensor) -> Tensor:
        size = self.weight.size(0)
        local_BS = tokens_BS - self.group.rank * size
        elsewhere_BS = (local_BS < 0) | (local_BS >= size)
        x_BSE = F.embedding(local_BS.masked_fill_(elsewhere_BS, 0), self.weight)
        return self.leave(x_BSE.masked_fill_(elsewhere_BS.unsqueeze(-1), 0.0))


class VocabularyParallelHead(ParallelLayer):
    """`LanguageModelHead` with this rank's rows of the matrix, [V/n, E]: the same logits and losses, on every rank."""

    def __init__(
        self, weight: nn.Parameter, vocab_size: int, z_loss: float, ops: Ops, group: Group, sequence_parallel: bool
    ):
        super().__init__(group, sequence_parallel)
        self.vocab_size = vocab_size
        self.z_loss = z_loss
        self.weight = weight
        self.ops = ops

    def forward(self, hidden_BSE: Tensor, targets_BS: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if targets_BS is None:
            logits = collectives.all_gather_columns(self.enter(hidden_BSE, (self.weight,)), self.group)
            return logits[..., : self.vocab_size]
        gather = collectives.all_gather_tokens if self.takes_own_tokens else collectives.all_reduce_gradient
        hidden_BSE = gather(hidden_BSE, self.group)
        return self.ops.sharded_linear_cross_entropy(
            hidden_BSE.flatten(0, -2), self.weight, targets_BS.flatten(), self.group.rank * self.weight.size(0),
            self.vocab_size, self.z_loss, gather=functools.partial(collectives.stacked, group=self.group),
        )  # fmt: skip


class SplitTokens(ParallelLayer):
    """All tokens, on every rank -> this rank's: where the stream enters the blocks after learned positions."""

    def forward(self, x_BSE: Tensor) -> Tensor:
        return collectives.split_tokens(x_BSE, self.group) if self.takes_own_tokens else x_BSE
