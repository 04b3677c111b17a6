"""One function that shards a built model over a tensor-parallel group, by a plan.

The model is built whole, with its initial weights, and every rank keeps its part: no layout changes a bit of them. The
names of parameters stay, but where one becomes two (`QueryKeyValue`); every one says what it is of the whole model's
(placement.py), and a sliced one has DeepSpeed's tag, `tensor_model_parallel`, without which its share of the gradient's
norm would be counted once instead of summed over the group.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaslm.config import ModelConfig
from megaslm.errors import UserError
from megaslm.model import LanguageModel
from megaslm.parallel.groups import Group
from megaslm.parallel.layers import (
    ColumnParallelLinear,
    GroupedQueryProjection,
    RowParallelLinear,
    SplitTokens,
    VocabularyParallelEmbedding,
    VocabularyParallelHead,
)
from megaslm.parallel.placement import Block, Placement, placement_of, shape_of


@dataclass(frozen=True)
class Target:
    """Where a model is to go."""

    config: ModelConfig
    group: Group
    sequence_parallel: bool

    @property
    def splits_stream(self) -> bool:
        """Whether tokens are split among the ranks where they enter the blocks, not by the embedding: learned positions
        are added to whole sequences."""
        return self.sequence_parallel and self.config.position == "learned"


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
        return VocabularyParallelEmbedding(weight, to.group, to.sequence_parallel and not to.splits_stream)


@dataclass(frozen=True)
class Stream:
    """What enters the first block."""

    def apply(self, name: str, module: nn.Module, to: Target) -> nn.Module:
        return SplitTokens(to.group, to.sequence_parallel) if to.splits_stream else module


@dataclass(frozen=True)
class Heads:
    """Attention, which tells queries from keys by how many of the former share one of the latter on this rank."""

    def apply(self, name: str, module: nn.Module, to: Target) -> nn.Module:
        kv_heads = max(1, to.config.num_kv_heads // to.group.size)
        module.queries_per_kv = to.config.num_heads // to.group.size // kv_heads
        return module


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
    """A module that every rank has. Where each computes a part of its gradient alone, from its heads or its tokens, the
    parts are summed."""

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
    (r"decoder\.stream", Stream()),
    (_BLOCK + r"(attention|feed_forward)_norm", Replicated(summed="sequence_parallel")),
    (_BLOCK + r"attention", Heads()),
    (_BLOCK + r"attention\.qkv", QueryKeyValue()),
    (_BLOCK + r"attention\.qk_norm", Replicated(summed="always")),
    (_BLOCK + r"attention\.out", Row()),
    (_BLOCK + r"feed_forward\.gate_up", Column(parts=2)),
    (_BLOCK + r"feed_forward\.up", Column()),
    (_BLOCK + r"feed_forward\.down", Row()),
    (r"decoder\.norm", Replicated(summed="sequence_parallel")),
    (r"head", Head()),
)
"""What becomes of modules, by their names: one rule for every module that has parameters of its own."""


def check_sizes(config: ModelConfig, size: int) -> None:
    """Raises UserError where a model can't be shared among `size` tensor-parallel ranks, with the sizes that it can."""
    wrong = _obstacles(config, size)
    if wrong:
        fitting = [n for n in range(1, config.num_heads + 1) if not _obstacles(config, n)]
        raise UserError(
            f"the model does not divide among {size} tensor-parallel ranks (parallel.tensor_parallel_size): "
            f"{', '.join(wrong)}; sizes among which it does: {', '.join(map(str, fitting))}"
        )


def _obstacles(config: ModelConfig, size: int) -> list[str]:
    wrong = []
    if config.num_heads % size:
        wrong.append(f"attention heads {config.num_heads}")
    if config.num_kv_heads % size and size % config.num_kv_heads:
        wrong.append(f"key/value heads {config.num_kv_heads}")
    if config.ffn_hidden_size % size:
        wrong.append(f"feed-forward width {config.ffn_hidden_size}")
    if config.vocab_size is not None and config.padded_vocab_size % size:  # it may yet have to come from the data
        wrong.append(f"padded vocabulary {config.padded_vocab_size:,}")
    return wrong


@torch.no_grad()
def shard_model(model: LanguageModel, group: Group, sequence_parallel: bool = False) -> None:
    """Keep this rank's part of a whole `model`, in place, and let it compute what the whole one does.

    `check_sizes` has passed. Parameters are new objects: an optimizer or an engine is made after this. They carry what
    the layout needs, a placement, a tag, a hook that sums the gradient, and what makes a parameter anew loses it
    (deepcopy, `to_empty`, `load_state_dict(assign=True)`): `check_tags` finds that. In a group of one nothing is
    changed.

    sequence_parallel: in training, between the sharded layers, a rank has 1/n of the tokens alone; n divides the
        length of every sequence then.
    """
    if group.size == 1:
        return
    to = Target(model.config, group, sequence_parallel)
    # A tied matrix is cut under both of its names, and becomes one again at the end.
    for name, module in list(model.named_modules()):
        rules = [rule for pattern, rule in PLAN if re.fullmatch(pattern, name)]
        if rules or any(True for _ in module.parameters(recurse=False)):
            assert len(rules) == 1, f"{len(rules)} rules of the plan are for {name or 'the model itself'}"
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, rules[0].apply(name, module, to))
    model.tie_weights()
    model.train(model.training)


def check_tags(model: LanguageModel, group: Group, sequence_parallel: bool = False) -> None:
    """AssertionError where a parameter is not what `shard_model` with the same arguments makes of it on this rank, or
    where the gradient's norm would not count every weight of the whole model once.

    Compared are names, shapes, placements, tags and hooks with those of a model without memory. The norm sums over the
    group what is tagged, and takes the rest from one rank: as many elements as the whole model has.
    """
    with torch.device("meta"):
        planned = LanguageModel(model.config)
    whole = {name: parameter.numel() for name, parameter in planned.named_parameters()}
    shard_model(planned, group, sequence_parallel)
    plan, counted = dict(planned.named_parameters()), Counter[str]()
    for name, parameter in model.named_parameters():
        assert name in plan, f"{name} is no parameter of a model on rank {group.rank} of {group.size}"
        placement, tagged = placement_of(name, parameter), getattr(parameter, "tensor_model_parallel", False)
        assert tagged == placement.sliced, f"{name} is {'' if tagged else 'not '}tagged tensor_model_parallel"
        counted[placement.name] += math.prod(shape_of(parameter)) * (group.size if tagged else 1)
    for name in whole.keys() | counted.keys():
        assert counted[name] == whole.get(name), (
            f"the norm would count {counted[name]:,} elements of {name}, which has {whole.get(name, 0):,}: "
            "a sliced parameter without the tag tensor_model_parallel, or one with it that is not"
        )
    for name, parameter in model.named_parameters():
        placement, expected = placement_of(name, parameter), placement_of(name, plan[name])
        assert placement == expected, f"{name} is {placement}, and rank {group.rank} of {group.size} has {expected}"
        shape = shape_of(plan[name])
        assert shape_of(parameter) == shape, f"{name} is {shape_of(parameter)}, and its placement {shape}"
        summed, expected = _is_summed(parameter), _is_summed(plan[name]) and parameter.requires_grad
        assert summed == expected, f"the gradient of {name} is {'' if summed else 'not '}summed over the ranks"


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


class SumParts:
    """Hook of a parameter: the sum of the parts of its gradient that the ranks compute, in fp32, rounded once: the
    parts are few, and what they are of is small."""

    def __init__(self, group: Group):
        self.group = group

    def __call__(self, gradient: Tensor) -> Tensor:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.to(wide, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group.process_group)
        return total.to(gradient.dtype)


def _sum_gradient(parameter: nn.Parameter, group: Group) -> None:
    """Have the parts summed once a backward pass, before DeepSpeed sees the gradient.

    A hook of the leaf runs when all its uses have been added up, and before what DeepSpeed does with the result. An
    operation on the weight instead would keep a view of it in the graph, past the time that ZeRO-3 gives it.
    """
    if parameter.requires_grad:
        parameter.register_hook(SumParts(group))


def _is_summed(parameter: nn.Parameter) -> bool:
    return any(isinstance(hook, SumParts) for hook in (parameter._backward_hooks or {}).values())
