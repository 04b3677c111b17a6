"""The formula of memory, by hand for one layout of each stage. What real processes take: test_real_memory.py."""

import dataclasses
import itertools

import pytest
import torch
from megaslm_kernels.linear_cross_entropy import REFERENCE_CHUNK_BYTES, linear_cross_entropy_reference
from torch.profiler import ProfilerActivity, profile

from megaslm.config import load_run_config
from megaslm.model import count_parameters
from megaslm.parallel import Layout, rank_parameters
from megaslm.planning import (
    checkpoint_bytes,
    checkpoints_kept,
    export_bytes,
    host_copy_bytes,
    memory_estimate,
    state_bytes,
)
from megaslm.planning.activations import block_bytes
from megaslm.planning.memory import _Rank


def config(preset: str = "megaslm_1.2b"):
    return load_run_config(preset).model.model_copy(update={"vocab_size": 50304})


LAYOUT = Layout(4, 2, 2048, data_parallel_size=8)


@pytest.mark.parametrize(
    "stage, weights, gradients, optimizer", [(1, 2, 4, 1.5), (2, 2, 0, 1.5), (3, 2 / 8, 4 / 8, 1.5)]
)
def test_what_is_held_between_steps_in_bf16(stage, weights, gradients, optimizer):
    n = sum(rank_parameters(config()))
    held = memory_estimate(config(), dataclasses.replace(LAYOUT, zero_stage=stage)).held
    assert (held.weights / n, held.gradients / n, held.optimizer / n) == pytest.approx((weights, gradients, optimizer))
    assert held.buffers == (2 * 50_000_000 if stage == 3 else 0)


@pytest.mark.parametrize("preset, joined", [("megaslm_350m", 4), ("megaslm_1.2b", 0)])
def test_zero_1_in_bf16_joins_gradients_of_less_than_500_million(preset, joined):
    """Larger ones, all matrices, are one tensor that DeepSpeed reduces alone."""
    n = sum(rank_parameters(config(preset)))
    reduction = memory_estimate(config(preset), LAYOUT).moments["reduction"]
    assert reduction.total == pytest.approx((2 + 4 + 12 / 8 + joined + 2) * n)


def test_fp16_accumulates_in_zero_1_as_deepspeed_zero_optimizer_does():
    layout = dataclasses.replace(LAYOUT, precision="fp16")
    estimate, n = memory_estimate(config(), layout), sum(rank_parameters(config()))
    assert estimate.held.gradients == 0
    assert estimate.moments["arrival"].gradients == (4 + 2) * n


def test_sequence_parallelism_gathers_the_hidden_states():
    layouts = [dataclasses.replace(LAYOUT, tensor_parallel_size=2, sequence_parallel=on) for on in (False, True)]
    without, with_it = (memory_estimate(config(), one).moments["loss"].logits for one in layouts)
    assert with_it - without == 4 * 2048 * 2048 * 2 / 2  # whole and half of it, in place of one whole


def test_stage_3_updates_flat_fp32_gradients_and_copies_what_it_fetches_and_reduces():
    layout, n = dataclasses.replace(LAYOUT, zero_stage=3), sum(rank_parameters(config()))
    moments = memory_estimate(config(), layout).moments
    held = memory_estimate(config(), layout).held
    assert moments["optimizer"].buffers - held.buffers == 4 * min(n, 10**9) / 8
    assert moments["forward"].buffers - moments["arrival"].buffers == 2 * layout.prefetch_bucket
    largest = max(rank_parameters(config()))  # the head's gradient, which no bucket takes
    gathered = moments["arrival"].buffers
    assert moments["reduction"].buffers - gathered == 2 * largest + 4 * largest / 8
    assert moments["reduction"].gradients == 4 * n / 8 + 2 * largest


def test_gradients_are_copied_for_the_optimizer():
    """Flat and in fp32, of this rank's part; from gradients in fp32 that lie apart."""
    n, whole = sum(rank_parameters(config())), dataclasses.replace(LAYOUT, precision="fp32")
    for layout, gradients, buffers in (
        (dataclasses.replace(whole, zero_stage=0), 4 * n, 0),
        (whole, 4 * n / 8, 4 * n / 8 + 4 * whole.reduce_bucket),
        (dataclasses.replace(LAYOUT, zero_stage=2), 4 * n / 8, 0),
    ):
        optimizer = memory_estimate(config(), layout).moments["optimizer"]
        assert (optimizer.gradients, optimizer.buffers) == (gradients, buffers)


def test_flash_attention_has_wide_gradients_of_queries_and_expanded_ones_of_keys():
    rank = _Rank(config(), LAYOUT, "triton")
    heads, kv_heads, d = rank.sizes.heads, rank.sizes.kv_heads, config().head_dim
    by_hand = 2 * (2 * heads * d + 2 * kv_heads * d) + 4 * heads * (d + 1) + 2 * 2 * heads * d
    assert heads > kv_heads and rank.attention_backward((heads + 2 * kv_heads) * d) == by_hand


@pytest.mark.parametrize("precision, bytes_of", [("bf16", 0), ("fp32", 4)])
def test_documents_have_a_mask_where_flash_attention_does_not_run(precision, bytes_of):
    layout = dataclasses.replace(LAYOUT, precision=precision)
    without, with_it = (memory_estimate(config(), layout, "triton", on).moments["loss"].total for on in (False, True))
    assert with_it - without == bytes_of * 4 * 2048**2


def test_fp32_attention_repeats_keys_under_triton():
    layout = dataclasses.replace(LAYOUT, precision="fp32")
    model = config().model_copy(update={"qk_norm": False})
    grouped = block_bytes(model, layout, "triton") - block_bytes(model, layout, "reference")
    all_heads = model.model_copy(update={"num_kv_heads": model.num_heads})
    alone = block_bytes(all_heads, layout, "triton") - block_bytes(all_heads, layout, "reference")
    assert grouped - alone == layout.micro_batch_size * 2048 * 2 * model.num_heads * model.head_dim * 4


def test_the_loss_takes_a_chunk_of_logits_and_two_gradients():
    """The fused kernel, V = 50304 in bf16: 5,336 rows would fit into the budget, and 8,192 tokens make two chunks."""
    loss = memory_estimate(config(), LAYOUT).moments["loss"]
    rows, vocabulary, width, tokens = 4096, 50304, 2048, 4 * 2048
    head = 4 * vocabulary * width  # two chunks: their sum is in fp32
    assert loss.logits == 2 * rows * vocabulary + head + 2 * 2 * tokens * width  # hidden states and their gradient


@pytest.mark.parametrize("precision, chunk_rows", [("bf16", None), ("bf16", 512), ("fp16", None), ("fp32", 512)])
def test_the_reference_loss_takes_a_block_in_fp32_and_of_sums_a_part(precision, chunk_rows):
    """Against what the op itself allocates. 1,024 rows are 16 blocks, and of half as many half a vocabulary is cast."""
    model = config().model_copy(update={"vocab_size": 16_000, "hidden_size": 64})
    element = {"fp32": 4}.get(precision, 2)
    layout = dataclasses.replace(
        LAYOUT, micro_batch_size=1, seq_length=1024, precision=precision,
        loss_chunk_bytes=chunk_rows and chunk_rows * element * model.padded_vocab_size,
    )  # fmt: skip
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    hidden, weight = (torch.randn(n, 64, dtype=dtype).requires_grad_() for n in (1024, model.padded_vocab_size))
    chunk_bytes = layout.loss_chunk_bytes or REFERENCE_CHUNK_BYTES
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        linear_cross_entropy_reference(hidden, weight, torch.zeros(1024, dtype=torch.int64), 16_000, 0.0, chunk_bytes)
    events = [(e.start_ns(), e.nbytes()) for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    taken = max(itertools.accumulate(size for _, size in sorted(events)))
    loss = memory_estimate(model, layout, "reference").moments["loss"]
    assert loss.logits - 1024 * 64 * element == pytest.approx(taken, rel=0.01)


def test_recomputation_keeps_one_tensor_a_block_and_then_one_block():
    layout = dataclasses.replace(LAYOUT, activation_checkpointing=True)
    whole, again = (_Rank(config(), one, "triton") for one in (LAYOUT, layout))
    stream = 4 * 2048 * 2048 * 2
    assert again.kept() == 22 * stream + stream + 4 * 4 * 2048  # the last norm: its sum, and a number a token
    assert again.kept_by_blocks() == 22 * stream + whole.kept_by_blocks() / 22


def test_offloading_moves_the_state_to_the_host():
    layout = dataclasses.replace(LAYOUT, zero_stage=3)
    here = memory_estimate(config(), layout)
    there = memory_estimate(config(), dataclasses.replace(layout, offload_optimizer=True, offload_parameters=True))
    state = here.held.weights + here.held.gradients + here.held.optimizer
    assert there.held.host == state and there.held.total == here.held.total - state
    assert there.total < here.total


def test_the_state_is_that_of_the_estimate():
    for stage in (1, 2, 3):
        layout = dataclasses.replace(LAYOUT, zero_stage=stage)
        arrival = memory_estimate(config(), layout).moments["arrival"]
        state = arrival.weights + arrival.gradients + arrival.optimizer
        assert state_bytes(config(), layout) == state


def test_more_of_anything_takes_no_less_memory():
    smaller = memory_estimate(config(), LAYOUT).total
    for change in ({"micro_batch_size": 8}, {"seq_length": 4096}, {"data_parallel_size": 4}):
        assert memory_estimate(config(), dataclasses.replace(LAYOUT, **change)).total > smaller
    divided = dataclasses.replace(LAYOUT, data_parallel_size=4, tensor_parallel_size=2, sequence_parallel=True)
    assert memory_estimate(config(), divided).total < 0.6 * smaller


def test_checkpoints_of_a_run_whose_length_its_data_tells():
    """The last ones, the best, and one that is being written; for 100 steps: tests/tools/test_plan.py."""
    run = load_run_config("megaslm_125m", ["checkpoint.keep_last=3", "checkpoint.keep_every=1000"])
    assert checkpoints_kept(run, None) == 3 + 1 + 1


def test_sizes_on_disk():
    model = config()
    assert checkpoint_bytes(model) == 12 * sum(rank_parameters(model))
    assert export_bytes(model) == 2 * count_parameters(model)
    assert host_copy_bytes(model, 8, 16) == checkpoint_bytes(model) / 2
