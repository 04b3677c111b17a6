"""Tiny networks of every family, with weights large enough that each token depends on those before it."""

import torch

from megaslm.config import ModelConfig
from megaslm.model import LanguageModel, build_model

VOCAB, CONTEXT = 211, 96
SIZES = dict(vocab_size=VOCAB, context_length=CONTEXT, num_layers=2, hidden_size=48, num_heads=4, ffn_hidden_size=64)
FAMILIES = {
    "llama": dict(num_kv_heads=2),
    "qwen3": dict(num_kv_heads=1, head_dim=20, qk_norm=True),
    "gpt2": dict(norm="layernorm", position="learned", feed_forward="gelu_tanh", bias=True, tie_embeddings=True),
    "gpt_neox": dict(norm="layernorm", rope_fraction=0.5, feed_forward="gelu", bias=True, parallel_residual=True),
    "linear": dict(num_kv_heads=2, rope_scaling="linear", rope_scaling_factor=3.0),
    "yarn": dict(num_kv_heads=2, rope_scaling="yarn", rope_scaling_factor=4.0),
}


def network(family: str, **switches) -> LanguageModel:
    config = ModelConfig(**{"init_std": 0.3, **SIZES, **FAMILIES[family], **switches})
    model = build_model(config, seed=6).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # norm weights of one and biases of zero would hide a mistake
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]
