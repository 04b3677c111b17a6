"""One function that shards a built model over a tensor-parallel group, by a plan.

The model is built whole, with its initial weights, and every rank keeps its part: no layout changes a bit of them. The
names of parameters stay, but where one becomes two (`QueryKeyValue`); every one says what it is of the whole model's
(placement.py), and a sliced one has DeepSpeed's tag, `tensor_model_parallel`, without which its share of the gradient's
norm would be counted once instead of summed over the group.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from megaslm.config import ModelConfig
from megaslm.errors import UserError
from megaslm.model import LanguageModel
from megaslm.parallel import collectives
from megaslm.parallel.groups import ALONE, Group
from megaslm.parallel.layers import (
    ColumnParallelLinear,
    GroupedQueryProjection,
    ParallelLayer,
    RowParallelLinear,
    SplitRows,
    VocabularyParallelEmbedding,
    VocabularyParallelHead,
)
from megaslm.parallel.placement import Block, Placement, placement_of


@dataclass(frozen=True)
class Target:
    """Where a model is to go."""

    config: ModelConfig
    group: Group
    sequence_parallel: bool


class Rule(Protocol):
    """What becomes of one module."""

    def apply(self, name: str, module: nn.Module, to: Target) -> nn.Module:
        """The module that takes its place, which may be itself."""


@dataclass(frozen=True)
class Column:
    """A linear layer of which every rank has some outputs: rows of the weight and of the bias.

    parts: equal parts that its rows are packed of, each of which is sliced by itself.
    """

    parts: int = 1

    def apply(self, name: str, module: nn.Linear, to: Target) -> nn.Module:
        heights = [module.out_features // self.parts] * self.parts
        return _column_parallel(name, module, heights, to)


@dataclass(frozen=True)
class QueryKeyValue:
    """The packed projection of queries, keys and values, by heads: a column-parallel layer.

    For more ranks than key/value heads, of which each has one then: it is parted into the queries, sliced, and keys and
    values, `kv_weight` and `kv_bias`, which are whole on every rank and one weight in the gradient's norm.
    """

    def apply(self, name: str, module: nn.Linear, to: Target) -> nn.Module:
        config, group = to.config, to.group
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        if config.num_kv_heads % group.size == 0:
            return _column_parallel(name, module, [queries, keys, keys], to)

        def q_and_kv(kind: str, whole: nn.Parameter | None) -> tuple[nn.Parameter | None, nn.Parameter | None]:
            if whole is None:
                return None, None
            q = _keep(whole, f"{name}.{kind}", _rows(whole, [queries], group), sliced=True)
            kv = _keep(whole, f"{name}.{kind}", (_block(whole, 0, queries, 2 * keys),), sliced=False)
            _sum_gradient(kv, group)
            return q, kv

        weights, biases = q_and_kv("weight", module.weight), q_and_kv("bias", module.bias)
        kv_head = group.rank * config.num_kv_heads // group.size
        return GroupedQueryProjection(
            (weights[0], biases[0]), (weights[1], biases[1]), config.head_dim, kv_head, group, to.sequence_parallel
        )


@dataclass(frozen=True)
class Row:
    """A linear layer of which every rank has some inputs: columns of the weight. All have the bias."""

    def apply(self, name: str, module: nn.Linear, to: Target) -> nn.Module:
        width = module.in_features // to.group.size
        block = _block(module.weight, 1, to.group.rank * width, width)
        weight = _keep(module.weight, f"{name}.weight", (block,), sliced=True)
        if module.bias is not None and to.sequence_parallel:
            _sum_gradient(module.bias, to.group)
        return RowParallelLinear(weight, module.bias, to.group, to.sequence_parallel)


@dataclass(frozen=True)
class Embedding:
    """A table of token embeddings of which every rank has some rows."""

    def apply(self, name: str, module: nn.Embedding, to: Target) -> nn.Module:
        weight = _slice_rows(module.weight, f"{name}.weight", [module.num_embeddings], to.group)
        # Learned positions are added to whole sequences, which are split after that.
        splits = to.sequence_parallel and to.config.position != "learned"
        return VocabularyParallelEmbedding(weight, to.group, splits)


@dataclass(frozen=True)
class Head:
    """The output layer, of which every rank has some logits: rows of the weight."""

    def apply(self, name: str, module: nn.Module, to: Target) -> nn.Module:
        weight = _slice_rows(module.weight, f"{name}.weight", [module.weight.size(0)], to.group)
        return VocabularyParallelHead(
            weight, module.vocab_size, module.z_loss, module.ops, to.group, to.sequence_parallel
        )


@dataclass(frozen=True)
class Replicated:
    """A module that every rank has. Where each computes a part of its gradient alone, from its heads or its rows of the
    batch, the parts are summed."""

    summed: Literal["never", "always", "sequence_parallel"]

    def apply(self, name: str, module: nn.Module, to: Target) -> nn.Module:
        if self.summed == "always" or (self.summed == "sequence_parallel" and to.sequence_parallel):
            for parameter in module.parameters(recurse=False):
                _sum_gradient(parameter, to.group)
        return module


_BLOCK = r"decoder\.blocks\.\d+\."
PLAN: tuple[tuple[str, Rule], ...] = (
    (r"decoder\.embedding", Embedding()),
    (r"decoder\.position_embedding", Replicated(summed="never")),
    (_BLOCK + r"(attention|feed_forward)_norm", Replicated(summed="sequence_parallel")),
    (_BLOCK + r"attention\.qkv", QueryKeyValue()),
    (_BLOCK + r"attention\.qk_norm", Replicated(summed="always")),
    (_BLOCK + r"attention\.out", Row()),
    (_BLOCK + r"feed_forward\.gate_up", Column(parts=2)),
    (_BLOCK + r"feed_forward\.up", Column()),
    (_BLOCK + r"feed_forward\.down", Row()),
    (r"decoder\.norm", Replicated(summed="sequence_parallel")),
    (r"head", Head()),
)
"""For every module that has parameters of its own, by its name: what becomes of it."""


def check_sizes(config: ModelConfig, size: int) -> None:
    """Raises UserError where a model can't be shared among `size` tensor-parallel ranks, with the sizes that it can."""
    wrong = _obstacles(config, size)
    if wrong:
        fitting = [n for n in range(1, config.num_heads + 1) if not _obstacles(config, n)]
        raise UserError(
            f"{' and '.join(wrong)} do not divide among {size} tensor-parallel ranks (parallel.tensor_parallel_size); "
            f"for this model, sizes that do: {', '.join(map(str, fitting))}"
        )


def _obstacles(config: ModelConfig, size: int) -> list[str]:
    wrong = []
    if config.num_heads % size:
        wrong.append(f"{config.num_heads} attention heads")
    if config.num_kv_heads % size and size % config.num_kv_heads:
        wrong.append(f"{config.num_kv_heads} key/value heads")
    if config.ffn_hidden_size % size:
        wrong.append(f"a feed-forward width of {config.ffn_hidden_size}")
    if config.vocab_size is not None and config.padded_vocab_size % size:  # it may yet have to come from the data
        wrong.append(f"a padded vocabulary of {config.padded_vocab_size:,}")
    return wrong


@torch.no_grad()
def shard_model(model: LanguageModel, group: Group, sequence_parallel: bool = False) -> None:
    """Keep this rank's part of a whole `model`, in place, and let it compute what the whole one does.

    `check_sizes` has passed. Parameters are new objects: an optimizer or an engine is made after this. In a group of
    one nothing is changed.

    sequence_parallel: in training, between the sharded layers, a rank has 1/n of the rows alone; n divides the length
        of every sequence then.
    """
    if group.size == 1:
        return
    to = Target(model.config, group, sequence_parallel)
    # A tied matrix is cut under both of its names, and becomes one again at the end.
    for name, module in list(model.named_modules()):
        if any(True for _ in module.parameters(recurse=False)):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, _rule_for(name).apply(name, module, to))
    if sequence_parallel and model.config.position == "learned":
        model.decoder.stream = SplitRows(group, sequence_parallel)
    for block in model.decoder.blocks:
        kv_heads = max(1, model.config.num_kv_heads // group.size)
        block.attention.queries_per_kv = model.config.num_heads // group.size // kv_heads
    model.tie_weights()
    model.train(model.training)


def _rule_for(name: str) -> Rule:
    found = [rule for pattern, rule in PLAN if re.fullmatch(pattern, name)]
    assert len(found) == 1, f"{len(found)} rules of the plan are for {name}, which has parameters"
    return found[0]


def check_tags(model: LanguageModel) -> None:
    """AssertionError where the gradient's norm would not count every weight of the whole model once.

    It sums over the group what is tagged, and takes the rest from one rank: as many elements as the whole model has,
    parameter by parameter, which is what is checked here; and that the tags are those of the placements.
    """
    group = next((module.group for module in model.modules() if isinstance(module, ParallelLayer)), ALONE)
    counted: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        tagged, placement = getattr(parameter, "tensor_model_parallel", False), placement_of(name, parameter)
        assert tagged == placement.sliced, f"{name} is {'' if tagged else 'not '}tagged tensor_model_parallel"
        size = getattr(parameter, "ds_numel", parameter.numel())
        counted[placement.name] += size * (group.size if tagged else 1)
    with torch.device("meta"):
        whole = {name: parameter.numel() for name, parameter in LanguageModel(model.config).named_parameters()}
    for name in whole.keys() | counted.keys():
        assert counted[name] == whole.get(name), (
            f"the norm would count {counted[name]:,} elements of {name}, which has {whole.get(name, 0):,}: "
            "a sliced parameter without the tag tensor_model_parallel, or one with it that is not"
        )


def _column_parallel(name: str, module: nn.Linear, heights: list[int], to: Target) -> ColumnParallelLinear:
    weight, bias = (
        whole if whole is None else _slice_rows(whole, f"{name}.{kind}", heights, to.group)
        for kind, whole in (("weight", module.weight), ("bias", module.bias))
    )
    return ColumnParallelLinear(weight, bias, to.group, to.sequence_parallel)


def _slice_rows(whole: nn.Parameter, name: str, heights: list[int], group: Group) -> nn.Parameter:
    return _keep(whole, name, _rows(whole, heights, group), sliced=True)


def _rows(whole: Tensor, heights: list[int], group: Group) -> tuple[Block, ...]:
    """A rank's equal share of every one of the parts, of `heights` rows, that `whole` begins with."""
    starts = [sum(heights[:i]) for i in range(len(heights))]
    shares = [height // group.size for height in heights]
    return tuple(
        _block(whole, 0, start + group.rank * share, share) for start, share in zip(starts, shares, strict=True)
    )


def _block(whole: Tensor, dim: int, start: int, length: int) -> Block:
    """`length` indices of dimension `dim`, and all of the others."""
    offset, shape = [0] * whole.dim(), list(whole.shape)
    offset[dim], shape[dim] = start, length
    return Block(tuple(offset), tuple(shape))


def _keep(whole: nn.Parameter, name: str, blocks: tuple[Block, ...], sliced: bool) -> nn.Parameter:
    """A parameter of these blocks of `whole`, with its placement and, where sliced, the tag."""
    placement = Placement(name, tuple(whole.shape), blocks, sliced)
    part = nn.Parameter(placement.cut(whole.detach()), whole.requires_grad)
    part.placement = placement
    if sliced:
        part.tensor_model_parallel = True
    return part


def _sum_gradient(parameter: nn.Parameter, group: Group) -> None:
    """Sum the parts of the gradient that the ranks compute, once a backward pass, before DeepSpeed sees it.

    A hook of the leaf runs when all its uses have been added up, and before what DeepSpeed does with the result. An
    operation on the weight instead would keep a view of it in the graph, past the time that ZeRO-3 gives it.
    In fp32, rounded once: the parts are few, and what they are of is small.
    """
    parameter.register_hook(_summing(group))


def _summing(group: Group) -> Callable[[Tensor], Tensor]:
    def sum_parts(gradient: Tensor) -> Tensor:
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        return collectives.summed(wide, group).to(gradient.dtype)

    return sum_parts
