"""transformers computes the same logits from our parameters, in memory, for every family at several shapes."""

import pytest
import torch

from megaslm.checkpoint import as_transformers
from megaslm.checkpoint.huggingface.families import family_of
from megaslm.checkpoint.huggingface.mapping import parameter_groups
from megaslm.config import ModelConfig
from megaslm.model import LanguageModel

BASE = {"vocab_size": 300, "context_length": 64, "num_layers": 2, "hidden_size": 48, "num_heads": 4}
LLAMA = {**BASE, "ffn_hidden_size": 80}
GPT2 = {**LLAMA, "norm": "layernorm", "position": "learned", "feed_forward": "gelu_tanh", "bias": True}
NEOX = {**LLAMA, "norm": "layernorm", "feed_forward": "gelu", "bias": True, "rope_fraction": 0.5}
TIED, PARALLEL = {"tie_embeddings": True}, {"parallel_residual": True}


def stretched(method: str, factor: float) -> dict:
    return {"rope_scaling": method, "rope_scaling_factor": factor}


SHAPES = {
    "llama": ("llama", LLAMA),
    "llama, 2 queries a key, biases, tied": ("llama", {**LLAMA, "num_kv_heads": 2, "bias": True, **TIED}),
    "llama, 4 queries a key, linear": (
        "llama",
        {**LLAMA, "num_kv_heads": 1, "head_dim": 16, **stretched("linear", 3.0)},
    ),
    "llama, ntk": ("llama", {**LLAMA, **stretched("ntk", 2.0)}),
    "llama, yarn": ("llama", {**LLAMA, **stretched("yarn", 4.0)}),
    "llama, llama3": ("llama", {**LLAMA, **stretched("llama3", 4.0)}),
    "llama, vocabulary of whole tiles": ("llama", {**LLAMA, "vocab_size": 256}),
    "mistral": ("mistral", {**LLAMA, "num_heads": 10, "num_kv_heads": 5, "head_dim": 8, **stretched("yarn", 2.0)}),
    "qwen3, tied": ("qwen3", {**LLAMA, "qk_norm": True, "num_kv_heads": 2, "head_dim": 20, **TIED}),
    "qwen3, linear": ("qwen3", {**LLAMA, "qk_norm": True, **stretched("linear", 2.0)}),
    "gpt2": ("gpt2", GPT2),
    "gpt2, tied, exact": ("gpt2", {**GPT2, **TIED, "feed_forward": "gelu"}),
    "gpt2, no biases of ours": ("gpt2", {**GPT2, "bias": False}),
    "gpt_neox, half of the heads, parallel": ("gpt_neox", {**NEOX, **PARALLEL}),
    "gpt_neox, a quarter, tanh, tied": ("gpt_neox", {**NEOX, "num_heads": 3, "rope_fraction": 0.25, **TIED}),
    "gpt_neox, yarn, parallel": (
        "gpt_neox",
        {**NEOX, **PARALLEL, **stretched("yarn", 4.0), "feed_forward": "gelu_tanh"},
    ),
    "gpt_neox, whole heads, no biases of ours": ("gpt_neox", {**NEOX, "bias": False, "rope_fraction": 1.0}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_has_its_place_and_comes_back(shape, scramble):
    family, switches = SHAPES[shape]
    model = scramble(LanguageModel(ModelConfig(**switches)))
    ours, groups = dict(model.named_parameters()), parameter_groups(model.config, family)
    assert sorted(group.ours for group in groups if group.ours) == sorted(ours)
    for group in groups:
        if group.ours is not None:
            whole = ours[group.ours].detach().clone()
            if group.ours in ("decoder.embedding.weight", "head.weight"):
                whole[model.config.vocab_size :] = 0
            parts = group.split(whole)
            assert tuple(tuple(part.shape) for part in parts) == group.shapes
            assert torch.equal(group.join(parts), whole)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_equal(shape, scramble):
    family, switches = SHAPES[shape]
    config = ModelConfig(**switches)
    assert family_of(config) == family
    model = scramble(LanguageModel(config))
    tokens = torch.randint(config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = as_transformers(model)(tokens).logits, model(tokens)
    assert 5 < expected.abs().max() < 100  # of a size at which a mistake shows, and rounding does not
    assert (found - expected).abs().max() <= 1e-4
