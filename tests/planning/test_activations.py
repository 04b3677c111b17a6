"""The formulas of what autograd keeps, against what it does keep: every storage that a forward pass saves, once."""

import itertools

import pytest
import torch
from megaslm_kernels import REFERENCE

from megaslm.config import ModelConfig
from megaslm.model import build_model
from megaslm.parallel import Layout
from megaslm.planning import activations

NETWORKS = {
    "llama": {},
    "qwen3": {"qk_norm": True},
    "all heads": {"num_kv_heads": 6, "qk_norm": True},
    "neox": {
        "norm": "layernorm", "feed_forward": "gelu", "bias": True, "parallel_residual": True, "rope_fraction": 0.5,
        "num_kv_heads": 6,
    },
    "gpt2": {"norm": "layernorm", "feed_forward": "gelu_tanh", "bias": True, "position": "learned", "num_kv_heads": 6},
    "normalised heads without rotation": {"position": "learned", "qk_norm": True},
    "parallel, RMS norm": {"parallel_residual": True},
}  # fmt: skip
SHAPE = {
    "vocab_size": 100, "context_length": 24, "num_layers": 2, "hidden_size": 40, "num_heads": 6, "num_kv_heads": 2,
    "head_dim": 8, "ffn_hidden_size": 72,
}  # fmt: skip
MICRO_BATCH, LENGTH = 3, 24


def saved_bytes(model, run) -> int:
    """Of the storages that autograd saves while `run` computes, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
    kept = {}  # the tensors themselves, so that no address comes twice

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(t.untyped_storage().nbytes() for t in kept.values()), result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_block_keeps_what_the_formula_says(network, dtype):
    config = ModelConfig(**(SHAPE | NETWORKS[network]))
    model = build_model(config, 0, torch.device("cpu"), REFERENCE).to(dtype)
    precision = "fp32" if dtype == torch.float32 else "bf16"
    layout = Layout(MICRO_BATCH, 1, LENGTH, precision=precision)
    x, branch = (torch.randn(MICRO_BATCH, LENGTH, config.hidden_size, dtype=dtype) for _ in range(2))
    rotary = model.decoder.rotary_table(LENGTH) if model.decoder.rotary_table is not None else None
    block = model.decoder.blocks[0]
    found, _ = saved_bytes(model, lambda: block(x.requires_grad_() * 1, branch, rotary, None))
    assert found == activations.block_bytes(config, layout, "reference")


@pytest.mark.parametrize("network", ["llama", "gpt2"])
def test_the_last_norm_keeps_what_the_formula_says(network):
    config = ModelConfig(**(SHAPE | NETWORKS[network]))
    model = build_model(config, 0, torch.device("cpu"), REFERENCE).to(torch.bfloat16)
    layout = Layout(MICRO_BATCH, 1, LENGTH)
    x = torch.randn(MICRO_BATCH, LENGTH, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    found, _ = saved_bytes(model, lambda: model.decoder.norm(x, x))
    result = activations.stream_bytes(config, layout)  # kept by the matrix product after a norm, not by itself
    assert found == activations.norm_bytes(config, layout, "reference") - result


@pytest.mark.parametrize("name, overrides, sequence_parallel", [("llama", {}, True), ("neox", NETWORKS["neox"], False)])
def test_tensor_parallelism_divides_the_parts_of_the_formula(name, overrides, sequence_parallel):
    """By hand, for two ranks: half of the heads and of the feed-forward, and half of the tokens of the norms."""
    config = ModelConfig(**(SHAPE | overrides))
    whole = activations.block_bytes(config, Layout(MICRO_BATCH, 1, LENGTH), "reference")
    half = activations.block_bytes(
        config, Layout(MICRO_BATCH, 1, LENGTH, 1, 2, sequence_parallel=sequence_parallel), "reference"
    )
    if sequence_parallel:
        assert 2 * half == whole
    else:
        norms = 2 * activations.norm_bytes(config, Layout(MICRO_BATCH, 1, LENGTH), "reference")
        norms -= MICRO_BATCH * LENGTH * config.hidden_size * 2  # a parallel residual: one input
        assert 2 * (half - norms) == whole - norms


def test_fewer_key_heads_than_ranks_are_whole_on_every_rank():
    config = ModelConfig(**SHAPE)
    layouts = [Layout(1, 1, LENGTH, 1, n, sequence_parallel=True) for n in (2, 4)]
    with_two, with_four = (activations.Sizes.of(config.model_copy(update={"num_heads": 8}), one) for one in layouts)
    assert (with_two.heads, with_two.kv_heads) == (4, 1) and (with_four.heads, with_four.kv_heads) == (2, 1)


def test_the_documents_mask_is_kept_once():
    layout = Layout(2, 1, 16)
    assert (
        activations.mask_bytes(layout, "reference") == 2 * 16 * 16 * 2 and activations.mask_bytes(layout, "triton") == 0
    )
