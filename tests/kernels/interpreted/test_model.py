"""A whole model on the Triton kernels against the same on the reference: what the single ops' tests can't see."""

import pytest
import torch
from megaslm_kernels import REFERENCE, TRITON, select_backend

from megaslm.config import ModelConfig
from megaslm.model import build_model

SIZES = dict(vocab_size=40, context_length=12, num_layers=2, hidden_size=48, num_heads=4, ffn_hidden_size=64)
FAMILIES = {
    "qwen3": dict(num_kv_heads=2, qk_norm=True, head_dim=20),
    "llama": dict(num_kv_heads=1, tie_embeddings=True),
    "neox": dict(rope_fraction=0.5, parallel_residual=True, norm="layernorm", feed_forward="gelu", bias=True),
    "learned": dict(position="learned", qk_norm=True, feed_forward="swiglu"),
}


# Three documents in each row.
POSITIONS = torch.arange(12, dtype=torch.int32).remainder(5).repeat(2, 1)


def losses_and_gradients(ops, config, dtype, checkpointing=False, positions=None):
    model = build_model(config, seed=3, ops=ops)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norm weights of one would hide a missing factor
            generator = torch.Generator().manual_seed(len(name))
            parameter.data.add_(torch.rand(parameter.shape, generator=generator) - 0.5)
    model.to(dtype)
    model.decoder.activation_checkpointing = checkpointing
    model.head.z_loss = 1e-2
    tokens = torch.arange(24).view(2, 12) * 7 % 40
    targets = tokens.roll(1)
    targets[0, :3] = -100
    objective, loss = model(tokens, targets, positions)
    objective.backward()
    model.eval()
    with torch.no_grad():
        evaluated = model(tokens, targets, positions)[1]
        logits = model(tokens, positions_BS=positions)
    assert torch.equal(evaluated, loss)
    return objective.detach(), logits.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "checkpointing, positions", [(False, None), (True, POSITIONS)], ids=["", "checkpointing, documents"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_the_kernels_is_the_reference(family, checkpointing, positions):
    config = ModelConfig(**SIZES | FAMILIES[family])
    assert select_backend("auto", torch.device("cpu")) is TRITON  # the interpreter serves CPU tensors
    ours = losses_and_gradients(TRITON, config, torch.float32, checkpointing, positions)
    theirs = losses_and_gradients(REFERENCE, config, torch.float32, positions=positions)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    assert all(gradient.any() for gradient in ours[2].values())


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_in_bf16_the_kernels_are_no_farther_from_fp32_than_the_reference(family):
    config = ModelConfig(**SIZES | FAMILIES[family])
    exact = losses_and_gradients(REFERENCE, config, torch.float32)[2]
    errors = []
    for ops in (TRITON, REFERENCE):
        gradients = losses_and_gradients(ops, config, torch.bfloat16)[2]
        errors.append({name: (g.float() - exact[name]).norm() / exact[name].norm() for name, g in gradients.items()})
    for name, error in errors[0].items():
        assert error <= 1.5 * errors[1][name] + 0.005, f"{name}: {error:.4f}, reference {errors[1][name]:.4f}"
