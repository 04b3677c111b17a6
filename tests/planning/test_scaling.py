"""The estimates of docs/scaling.md: by hand for one layout, and what they recommend."""

import dataclasses
from pathlib import Path

import pytest

from megaslm.config import load_run_config
from megaslm.parallel import rank_parameters
from megaslm.planning import GPUS, Cluster, estimate, paper_tables, recommend, scaling, state_bytes

ROOT = Path(__file__).resolve().parents[2]


def load(preset: str, *overrides: str):
    run = load_run_config(preset, overrides)
    return run.model_copy(update={"model": run.model.model_copy(update={"vocab_size": run.expected_vocab_size})})


def test_the_document_has_the_tables_that_the_command_prints():
    document = (ROOT / "docs" / "scaling.md").read_text()
    volumes, _, times = "\n".join(paper_tables()).partition("\n\n")
    assert volumes in document and times.strip() in document
    assert times.count("| 64 |") == len(scaling.PRESETS) == volumes.count("\n") - 1


def test_a_step_of_zero_1_by_hand():
    """megaslm_125m on one node and on two: 256 sequences of 2,048 tokens at 1.00 GFLOP each."""
    run = load("megaslm_125m")
    parameters = sum(rank_parameters(run.model))
    assert parameters == pytest.approx(128e6, rel=0.01)
    one, two = estimate(run, Cluster(1)), estimate(run, Cluster(2))
    assert one.compute == pytest.approx(256 * 2048 * 1.00e9 / (8 * 0.4 * 989e12), rel=0.01)
    assert two.compute == pytest.approx(one.compute / 2)
    # An all-reduce and an all-gather, in 1 + 2 calls: by NVLink, and by the port for an eighth from node to node.
    assert one.zero == pytest.approx(2 * parameters * (2 + 1) * 7 / 8 / 370e9 + 3 * 20e-6)
    # The gathers go round a ring of 16 ranks on 2 nodes.
    by_nvlink, by_port = 2 * parameters * 3 * 15 / 16 / 370e9, 2 * parameters * 3 * 15 / 16 / 8 / 46e9
    assert two.zero == pytest.approx(max(by_nvlink, by_port) + 3 * 50e-6 + 2 * (16 * 1e-6 + 2 * 5e-6))
    assert one.state_bytes == pytest.approx(parameters * (8 + 12 / 8))
    assert one.tensor_parallel == 0 and one.total == one.compute + one.zero


def test_a_step_of_tensor_parallelism_by_hand():
    """megaslm_3b on one node, TP 2 with sequence parallelism: 1,024 sequences of 2,048 tokens, 26 blocks of width 3,072
    with heads of 128; 4 data-parallel ranks with 64 micro-batches of 4."""
    run = load("megaslm_3b")
    one = estimate(run, Cluster(1), 2)
    # A block: 6 gathers and 4 scatters of x; 2 of each for embedding and head; statistics of the loss in one gather,
    # 3 x 2 numbers a token; gradients of 4 norms a block, and of the last.
    tokens, width, blocks = 4 * 2048, 3072, 26
    norms = blocks * (2 * 128 + 2 * width) + width
    sent = 1 / 2 * (10 * blocks + 4) * tokens * width * 2 + 1 / 2 * 3 * 2 * tokens * 4 + norms * 4
    calls = (10 * blocks + 4) + 1 + (4 * blocks + 1)
    assert one.tensor_parallel == pytest.approx(64 * (sent / 370e9 + calls * 20e-6))
    assert one.compute == estimate(run, Cluster(1)).compute


def test_slow_ports_are_what_several_nodes_wait_for(monkeypatch):
    run = load("megaslm_1.2b")
    one, two = estimate(run, Cluster(1)).zero, estimate(run, Cluster(2)).zero
    monkeypatch.setattr(scaling, "INFINIBAND", 1e9)
    assert estimate(run, Cluster(1)).zero == one
    parameters = sum(rank_parameters(run.model))
    by_port = 2 * parameters * 3 * 15 / 16 / 8 / 1e9
    assert estimate(run, Cluster(2)).zero == pytest.approx(by_port + 3 * 50e-6 + 2 * (16 * 1e-6 + 2 * 5e-6))
    assert estimate(run, Cluster(2)).zero > 10 * two


def test_zero_1_alone_is_recommended_while_each_gpu_has_a_sequence():
    for preset, nodes in (("megaslm_125m", 32), ("megaslm_1.2b", 64), ("megaslm_3b", 8), ("sab_3b", 8)):
        assert recommend(load(preset), Cluster(nodes)).layout.tensor_parallel_size == 1


def test_tensor_parallelism_is_recommended_where_the_batch_asks_for_it():
    assert recommend(load("sab_3b"), Cluster(16)).layout.tensor_parallel_size == 2  # 64 sequences, 128 GPUs
    assert recommend(load("neox_1.2b"), Cluster(32)) is None  # 16 sequences, 256 GPUs: not even 8 ranks for each


def test_memory_asks_for_a_higher_stage_and_not_for_tensor_parallelism():
    run = load("sab_3b")

    def best(gigabytes: float):
        gpu = dataclasses.replace(GPUS["h200"], total_bytes=gigabytes * 1e9)
        return recommend(run, Cluster(1, gpu))

    for gigabytes, stage in ((150, 1), (60, 2), (30, 3)):
        layout = best(gigabytes).layout
        assert (layout.zero_stage, layout.tensor_parallel_size) == (stage, 1)
    assert best(20) is None  # what ZeRO-3 divides by all ranks, tensor parallelism can't shrink


def test_a_layout_that_is_not_possible_has_no_estimate():
    assert estimate(load("megaslm_125m"), Cluster(1), 8) is None  # 12 heads
    assert estimate(load("megaslm_125m"), Cluster(64)) is None  # 256 sequences, 512 GPUs


def test_every_zero_stage_holds_less_than_the_one_before():
    run = load("megaslm_3b")
    held = [estimate(run, Cluster(1), zero_stage=stage).state_bytes for stage in (0, 1, 2, 3)]
    assert held == sorted(held, reverse=True) and held[0] == 16 * sum(rank_parameters(run.model))
    assert state_bytes(run.model, estimate(run, Cluster(1), 2).layout) == pytest.approx(held[1] / 2, rel=0.2)
