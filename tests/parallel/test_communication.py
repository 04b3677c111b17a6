"""The formulas where no small run of ranks gets: sizes of the presets, chunks of the loss, weights that are let go of.

tests/training/test_traffic.py compares them with what ranks send.
"""

import math
from dataclasses import replace

import pytest
import torch

from megaslm.config import ModelConfig, list_presets, load_run_config
from megaslm.model import LanguageModel
from megaslm.parallel import Layout, rank_parameters, step_collectives, wire_bytes

LAYOUT = Layout(micro_batch_size=4, accumulation_steps=3, seq_length=2048, data_parallel_size=8)


def model_of(preset: str) -> ModelConfig:
    run = load_run_config(preset)
    return run.model.model_copy(update={"vocab_size": run.expected_vocab_size or 99})


def counts(config: ModelConfig, layout: Layout) -> dict:
    return {(c.purpose, c.operation, c.group): (c.calls, c.bytes) for c in step_collectives(config, layout)}


@pytest.mark.parametrize("preset", list(list_presets()))
def test_parameters_of_one_rank_are_those_of_the_network(preset):
    config = model_of(preset)
    with torch.device("meta"):
        sizes = [parameter.numel() for parameter in LanguageModel(config).parameters()]
    assert sorted(rank_parameters(config)) == sorted(sizes)


def test_one_rank_alone_sends_nothing():
    assert step_collectives(model_of("megaslm_125m"), replace(LAYOUT, data_parallel_size=1)) == []


def test_the_loss_gathers_statistics_once_a_chunk():
    """8,192 rows of 25,152 logits in bf16: 412 MB, under the budget of 512 MiB; of 32,768 rows it is four chunks."""
    config, layout = model_of("megaslm_1.2b"), replace(LAYOUT, tensor_parallel_size=2)
    once = 3 * 2 * 3 * 8192 * 4  # micro-batches, ranks, statistics, rows, bytes
    assert counts(config, layout)["loss", "all_gather", "tensor"] == (3, once)
    assert counts(config, replace(layout, micro_batch_size=16))["loss", "all_gather", "tensor"] == (3 * 4, 4 * once)


def test_stage_3_gathers_what_is_not_live_at_the_loss_again():
    """megaslm_350m: all is. megaslm_3b: 1e9 of 2.93e9 are, and of its weights, one call each, 66 % go twice."""
    layout = replace(LAYOUT, zero_stage=3)
    small = model_of("megaslm_350m")
    assert counts(small, layout)["weights", "all_gather", "data"] == gathers(small, 1.0)
    large = model_of("megaslm_3b")
    calls, size = counts(large, layout)["weights", "all_gather", "data"]
    expected_calls, expected_size = gathers(large, 2 - 1 / 2.926)
    assert calls == expected_calls and size == pytest.approx(expected_size, rel=1e-3)
    for config in (small, large):
        assert counts(config, layout)["gradients", "reduce_scatter", "data"] == (
            3,
            2 * 3 * sum(rank_parameters(config)),
        )


def gathers(config: ModelConfig, times: float) -> tuple[int, float]:
    """Of 3 micro-batches in bf16: matrices `times` each, vectors once."""
    sizes = rank_parameters(config)
    matrices = [size for size in sizes if size > config.hidden_size]
    vectors = sum(sizes) - sum(matrices)
    calls = 3 * math.ceil(times * len(matrices)) + len(sizes) - len(matrices)
    return calls, 2 * (3 * times * sum(matrices) + vectors)


def test_bytes_on_the_wire_are_those_of_a_ring():
    assert wire_bytes("all_reduce", 4, 100) == 150
    assert wire_bytes("all_gather", 4, 100) == wire_bytes("reduce_scatter", 4, 100) == 75
    assert wire_bytes("all_reduce", 1, 100) == 0
    assert (wire_bytes("send", 2, 100), wire_bytes("receive", 2, 100)) == (100, 0)
