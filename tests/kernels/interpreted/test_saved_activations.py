"""What a block under the fused kernels keeps for the backward pass, against megaslm/planning's formula of it."""

import itertools

import pytest
import torch
from megaslm_kernels import TRITON

from megaslm.config import ModelConfig
from megaslm.model import build_model
from megaslm.parallel import Layout
from megaslm.planning import activations

SHAPE = {
    "vocab_size": 100, "context_length": 4, "num_layers": 1, "hidden_size": 40, "num_heads": 6, "num_kv_heads": 2,
    "head_dim": 8, "ffn_hidden_size": 72,
}  # fmt: skip


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"qk_norm": True},
        {"qk_norm": True, "position": "learned"},
        {"parallel_residual": True, "feed_forward": "gelu"},
    ],
    ids=["llama", "qwen3", "without rotation", "parallel"],
)
def test_a_block_keeps_what_the_formula_says(switches):
    config = ModelConfig(**(SHAPE | switches))
    model = build_model(config, 0, torch.device("cpu"), TRITON).to(torch.bfloat16)
    own = {t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x, branch = (torch.randn(2, 4, config.hidden_size, dtype=torch.bfloat16) for _ in range(2))
    rotary = model.decoder.rotary_table(4) if model.decoder.rotary_table is not None else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model.decoder.blocks[0](x.requires_grad_() * 1, branch, rotary, None)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert found == activations.block_bytes(config, Layout(2, 1, 4), "triton")
    assert result[0].shape == x.shape
