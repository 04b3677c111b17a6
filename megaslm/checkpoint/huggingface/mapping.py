"""Which parameters of a transformers model hold the numbers of which of ours, as data.

Most are one to one. What differs:

- ours pads the vocabulary with rows that are never looked at: cropped in theirs, zeros when read
- ours packs queries, keys and values, and gate and up, into one matrix each; llama, mistral and qwen3 have them apart
- gpt2 keeps matrices transposed (Conv1D: [in, out])
- gpt_neox packs by head: [H, 3, D, E] where ours is [3, H, D, E]
- gpt2 and gpt_neox always have biases, zeros where ours has none (gpt_neox can leave out those of attention)
- a tied output head is not stored; ours has no parameter of that name either

Shapes: H query heads, K key/value heads, D head size, E width, F feed-forward width, V vocabulary, C context.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megaslm.config import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """One parameter of ours and those of theirs that hold its numbers.

    Attributes:
        ours: name; None where theirs are zeros that ours does not have.
        theirs: names.
        shapes: of theirs, in that order.
        split: our tensor to theirs. Views, but for gpt_neox's packed queries, keys and values.
        join: theirs to our tensor, of the same type. A group of zeros has neither: it is `torch.zeros` of its shapes.
    """

    ours: str | None
    theirs: tuple[str, ...]
    shapes: tuple[Shape, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]] | None
    join: Callable[[tuple[Tensor, ...]], Tensor] | None


def parameter_groups(config: ModelConfig, family: str) -> list[Group]:
    """Every parameter of `config`'s network, and every one of theirs, once each, in the order of the network.

    Args:
        config: with its vocabulary.
        family: one that holds it; llama and mistral name the same parameters.
    """
    if family == "gpt2":
        return _gpt2(config)
    if family == "gpt_neox":
        return _gpt_neox(config)
    return _llama(config)


def _same(ours: str | None, theirs: str, *shape: int) -> Group:
    if ours is None:
        return Group(None, (theirs,), (shape,), None, None)
    return Group(ours, (theirs,), (shape,), lambda tensor: (tensor,), lambda tensors: tensors[0])


def _transposed(ours: str, theirs: str, *shape: int) -> Group:
    return Group(ours, (theirs,), (shape,), lambda tensor: (tensor.t(),), lambda tensors: tensors[0].t())


def _packed(ours: str, theirs: tuple[str, ...], rows: tuple[int, ...], *rest: int) -> Group:
    """Ours is theirs one below the other."""
    return Group(ours, theirs, tuple((n, *rest) for n in rows), lambda tensor: tensor.split(rows), torch.cat)


def _vocabulary(ours: str, theirs: str, config: ModelConfig) -> Group:
    size, padded = config.vocab_size, config.padded_vocab_size

    def join(tensors: tuple[Tensor, ...]) -> Tensor:
        (tensor,) = tensors
        return torch.cat((tensor, tensor.new_zeros(padded - size, tensor.size(1)))) if padded > size else tensor

    return Group(ours, (theirs,), ((size, config.hidden_size),), lambda tensor: (tensor[:size],), join)


def _by_head(ours: str, theirs: str, heads: int, *rest: int) -> Group:
    """Queries, keys and values: [3, H, ...] in ours, [H, 3, ...] in theirs, `rest` being [D, E] or [D]."""

    def swap(tensor: Tensor, leading: tuple[int, int]) -> Tensor:
        return tensor.reshape(*leading, *rest).transpose(0, 1).reshape(tensor.shape)

    return Group(
        ours,
        (theirs,),
        ((3 * heads * rest[0], *rest[1:]),),
        lambda tensor: (swap(tensor, (3, heads)),),
        lambda tensors: swap(tensors[0], (heads, 3)),
    )


def _llama(config: ModelConfig) -> list[Group]:
    """llama, mistral and qwen3."""
    width, inner = config.hidden_size, config.ffn_hidden_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    groups = [_vocabulary("decoder.embedding.weight", "model.embed_tokens.weight", config)]
    for i in range(config.num_layers):
        ours, theirs = f"decoder.blocks.{i}", f"model.layers.{i}"
        groups.append(_same(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight", width))
        for kind in ("weight", "bias") if config.bias else ("weight",):
            matrix = kind == "weight"
            packed = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
            columns = (width,) if matrix else ()
            groups.append(_packed(f"{ours}.attention.qkv.{kind}", packed, (queries, keys, keys), *columns))
            shape = (width, queries) if matrix else (width,)
            groups.append(_same(f"{ours}.attention.out.{kind}", f"{theirs}.self_attn.o_proj.{kind}", *shape))
            packed = tuple(f"{theirs}.mlp.{part}_proj.{kind}" for part in ("gate", "up"))
            groups.append(_packed(f"{ours}.feed_forward.gate_up.{kind}", packed, (inner, inner), *columns))
            shape = (width, inner) if matrix else (width,)
            groups.append(_same(f"{ours}.feed_forward.down.{kind}", f"{theirs}.mlp.down_proj.{kind}", *shape))
        if config.qk_norm:
            for part in "qk":
                norm = f"{ours}.attention.qk_norm.{part}_weight"
                groups.append(_same(norm, f"{theirs}.self_attn.{part}_norm.weight", config.head_dim))
        groups.append(_same(f"{ours}.feed_forward_norm.weight", f"{theirs}.post_attention_layernorm.weight", width))
    groups.append(_same("decoder.norm.weight", "model.norm.weight", width))
    return groups + _head("lm_head.weight", config)


def _gpt2(config: ModelConfig) -> list[Group]:
    width, inner = config.hidden_size, config.ffn_hidden_size
    groups = [
        _vocabulary("decoder.embedding.weight", "transformer.wte.weight", config),
        _same("decoder.position_embedding.weight", "transformer.wpe.weight", config.context_length, width),
    ]
    for i in range(config.num_layers):
        ours, theirs = f"decoder.blocks.{i}", f"transformer.h.{i}"
        groups += _norm(f"{ours}.attention_norm", f"{theirs}.ln_1", config)
        for part, name, rows, columns in (
            ("attention.qkv", "attn.c_attn", 3 * width, width),
            ("attention.out", "attn.c_proj", width, width),
        ):
            groups += _conv1d(f"{ours}.{part}", f"{theirs}.{name}", rows, columns, config)
        groups += _norm(f"{ours}.feed_forward_norm", f"{theirs}.ln_2", config)
        groups += _conv1d(f"{ours}.feed_forward.up", f"{theirs}.mlp.c_fc", inner, width, config)
        groups += _conv1d(f"{ours}.feed_forward.down", f"{theirs}.mlp.c_proj", width, inner, config)
    return groups + _norm("decoder.norm", "transformer.ln_f", config) + _head("lm_head.weight", config)


def _gpt_neox(config: ModelConfig) -> list[Group]:
    width, inner, heads, size = config.hidden_size, config.ffn_hidden_size, config.num_heads, config.head_dim
    groups = [_vocabulary("decoder.embedding.weight", "gpt_neox.embed_in.weight", config)]
    for i in range(config.num_layers):
        ours, theirs = f"decoder.blocks.{i}", f"gpt_neox.layers.{i}"
        groups += _norm(f"{ours}.attention_norm", f"{theirs}.input_layernorm", config)
        packed = f"{ours}.attention.qkv", f"{theirs}.attention.query_key_value"
        groups.append(_by_head(f"{packed[0]}.weight", f"{packed[1]}.weight", heads, size, width))
        groups.append(_same(f"{ours}.attention.out.weight", f"{theirs}.attention.dense.weight", width, width))
        if config.bias:  # else attention_bias is false
            groups.append(_by_head(f"{packed[0]}.bias", f"{packed[1]}.bias", heads, size))
            groups.append(_same(f"{ours}.attention.out.bias", f"{theirs}.attention.dense.bias", width))
        groups += _norm(f"{ours}.feed_forward_norm", f"{theirs}.post_attention_layernorm", config)
        for part, name, rows, columns in (
            ("up", "dense_h_to_4h", inner, width),
            ("down", "dense_4h_to_h", width, inner),
        ):
            groups.append(_same(f"{ours}.feed_forward.{part}.weight", f"{theirs}.mlp.{name}.weight", rows, columns))
            groups.append(_bias(f"{ours}.feed_forward.{part}", f"{theirs}.mlp.{name}", rows, config))
    groups += _norm("decoder.norm", "gpt_neox.final_layer_norm", config)
    # Its name until transformers 5, which still reads it.
    return groups + _head("embed_out.weight", config)


def _bias(ours: str, theirs: str, size: int, config: ModelConfig) -> Group:
    """A bias that theirs always has."""
    return _same(f"{ours}.bias" if config.bias else None, f"{theirs}.bias", size)


def _norm(ours: str, theirs: str, config: ModelConfig) -> list[Group]:
    """LayerNorm, whose bias theirs always has."""
    weight = _same(f"{ours}.weight", f"{theirs}.weight", config.hidden_size)
    return [weight, _bias(ours, theirs, config.hidden_size, config)]


def _conv1d(ours: str, theirs: str, rows: int, columns: int, config: ModelConfig) -> list[Group]:
    """Our matrix [rows, columns] as theirs, transposed, and the bias [rows] that theirs always has."""
    weight = _transposed(f"{ours}.weight", f"{theirs}.weight", columns, rows)
    return [weight, _bias(ours, theirs, rows, config)]


def _head(theirs: str, config: ModelConfig) -> list[Group]:
    return [] if config.tie_embeddings else [_vocabulary("head.weight", theirs, config)]
