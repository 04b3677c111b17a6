"""A whole model on the Triton kernels against the same on the reference: what the single ops' tests can't see."""

import pytest
import torch
from megaslm_kernels import REFERENCE, TRITON, select_backend

from megaslm.config import ModelConfig
from megaslm.model import build_model

SIZES = dict(vocab_size=40, context_length=8, num_layers=2, hidden_size=48, num_heads=4, ffn_hidden_size=64)
FAMILIES = {
    "qwen3": dict(num_kv_heads=2, qk_norm=True, head_dim=20),
    "llama": dict(num_kv_heads=1, tie_embeddings=True),
    "neox": dict(rope_fraction=0.5, parallel_residual=True, norm="layernorm", feed_forward="gelu", bias=True),
    "learned": dict(position="learned", qk_norm=True, feed_forward="swiglu"),
}


TOKENS = torch.arange(16).view(2, 8) * 7 % 40
TARGETS = TOKENS.roll(1).masked_fill(torch.arange(16).view(2, 8) < 3, -100)
# Three documents in each row.
POSITIONS = torch.arange(8, dtype=torch.int32).remainder(3).repeat(2, 1)


def train(ops, config, dtype, checkpointing=False, positions=None):
    """(model, objective, loss, gradients) of a new model."""
    model = build_model(config, seed=3, ops=ops)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norm weights of one would hide a missing factor
            generator = torch.Generator().manual_seed(len(name))
            parameter.data.add_(torch.rand(parameter.shape, generator=generator) - 0.5)
    model.to(dtype)
    model.decoder.activation_checkpointing = checkpointing
    model.head.z_loss = 1e-2
    objective, loss = model(TOKENS, TARGETS, positions)
    objective.backward()
    return model, objective.detach(), loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def evaluate(model, positions):
    """(loss, logits)"""
    model.eval()
    with torch.no_grad():
        return model(TOKENS, TARGETS, positions)[1], model(TOKENS, positions_BS=positions)


@pytest.mark.parametrize(
    "checkpointing, positions", [(False, None), (True, POSITIONS)], ids=["", "checkpointing, documents"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_the_kernels_is_the_reference(family, checkpointing, positions):
    config = ModelConfig(**SIZES | FAMILIES[family])
    assert select_backend("auto", torch.device("cpu")) is TRITON  # the interpreter serves CPU tensors
    model, *ours = train(TRITON, config, torch.float32, checkpointing, positions)
    reference, *theirs = train(REFERENCE, config, torch.float32, positions=positions)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    assert all(gradient.any() for gradient in ours[-1].values())
    loss, logits = evaluate(model, positions)
    assert torch.equal(loss, ours[1])
    torch.testing.assert_close(logits, evaluate(reference, positions)[1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_in_bf16_the_kernels_are_no_farther_from_fp32_than_the_reference(family):
    config = ModelConfig(**SIZES | FAMILIES[family])
    exact = train(REFERENCE, config, torch.float32)[-1]
    errors = []
    for ops in (TRITON, REFERENCE):
        gradients = train(ops, config, torch.bfloat16)[-1]
        errors.append({name: (g.float() - exact[name]).norm() / exact[name].norm() for name, g in gradients.items()})
    for name, error in errors[0].items():
        assert error <= 1.5 * errors[1][name] + 0.005, f"{name}: {error:.4f}, reference {errors[1][name]:.4f}"
