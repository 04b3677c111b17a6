"""The number of collectives of an optimizer step and their bytes: counted on 4 ranks, and by formula."""

import json
from pathlib import Path

import pytest
from layout_engines import as_run, run_config
from megaslm_kernels.linear_cross_entropy import REFERENCE_CHUNK_BYTES

from megaslm.parallel import HOST, Layout, rank_parameters, step_collectives

WORKER = Path(__file__).with_name("traffic_worker.py")
WORLD_SIZE = 4


def case(
    size: int,
    stage: int,
    *switches: str,
    model: dict | None = None,
    precision: str = "fp32",
    loss_chunk_bytes: int = REFERENCE_CHUNK_BYTES,
    **zero: int,
) -> dict:
    """A layout of the model of layout_engines.py: 2 blocks of width 32, micro-batches of 1 x 16 tokens. `zero` goes
    into zero_optimization, with "stage3_" before it."""
    parallel = {"tensor_parallel_size": size, "sequence_parallel": "rows" in switches}
    train = {"activation_checkpointing": "recomputed" in switches}
    return {
        "run": run_config(model, parallel=parallel, train=train),
        "stage": stage,
        "precision": precision,
        "loss_chunk_bytes": loss_chunk_bytes,
        "zero": {f"stage3_{key}": value for key, value in zero.items()},
    }


NEOX = {"norm": "layernorm", "feed_forward": "gelu", "parallel_residual": True, "bias": True, "qk_norm": False}
# Of 53,600 weights in 4 blocks, live are so many; the prefetcher takes one at a time.
SCARCE = {"max_live_parameters": 32_000, "max_reuse_distance": 32_000, "prefetch_bucket_size": 600}
CASES = {
    "tp4": case(4, 0),
    "tp4 rows": case(4, 0, "rows"),
    "tp4 recomputed": case(4, 0, "recomputed"),
    "tp4 neox rows recomputed": case(4, 0, "rows", "recomputed", model=NEOX),
    "tp2 z1": case(2, 1),
    "tp2 z2 rows": case(2, 2, "rows"),
    "tp2 z3": case(2, 3),
    "tp2 z1 bf16 rows": case(2, 1, "rows", precision="bf16", loss_chunk_bytes=512),  # 4 rows of 64 logits
    "tp2 z0 rows, learned, untied": case(
        2, 0, "rows", model=NEOX | {"position": "learned", "tie_embeddings": False, "num_kv_heads": 8}
    ),
    "z3": case(1, 3, model={"num_layers": 4, "tie_embeddings": False}, param_persistence_threshold=32, **SCARCE),
}
# The whole of what a step sends, written down: (calls, bytes), accumulation 4 with tp4 and 2 with tp2. A row of x is
# 16 tokens x 32 x 4 bytes = 2,048. With tp4: 8 + 2 all-reduces of x, 6 of weights (kv, q norm, k norm; 4,224 bytes
# together, x 2 blocks) each micro-batch, and one of the norm; 768 bytes of statistics.
WRITTEN_DOWN = {
    "tp4": {
        ("all_reduce", "tensor"): (4 * (8 + 2 + 6) + 1, 4 * (10 * 2048 + 2 * 4160) + 4),
        ("all_gather", "tensor"): (4, 4 * 768),
    },
    "tp4 rows": {
        ("all_gather", "tensor"): (4 * (12 + 2 + 1), 4 * (14 * 2048 + 768)),
        ("reduce_scatter", "tensor"): (4 * (8 + 2), 4 * 10 * 2048),
        ("all_reduce", "tensor"): (4 * (6 + 5) + 1, 4 * (2 * 4160 + 5 * 128) + 4),
    },
}
# Calls between data-parallel ranks, accumulation 2. One all-reduce is of the norm where a rank has a part of the
# gradient, and ZeRO-1 and 2 gather two groups of weights. "z3" takes 18 weights one at a time and 8 of them again; 17
# stay.
WRITTEN_DOWN_OF_ZERO = {
    "tp2 z0 rows, learned, untied": {"all_reduce": 1},
    "tp2 z1": {"all_reduce": 1 + 1, "all_gather": 2},
    "tp2 z1 bf16 rows": {"all_reduce": 1 + 1, "all_gather": 2},
    "tp2 z2 rows": {"all_reduce": 2 + 1, "all_gather": 2},
    "tp2 z3": {"all_reduce": 1, "all_gather": 2, "reduce_scatter": 2},
    "z3": {"all_reduce": 1, "all_gather": 18 + 8 + 17, "reduce_scatter": 1},
}
# Collectives of numbers, beside the formulas: our norm, as (calls, bytes).
NUMBERS = {
    (0, "fp32"): {"tensor": (1, 4)},
    (1, "fp32"): {"tensor": (1, 4), "data": (1, 4)},
    (2, "fp32"): {"tensor": (1, 4), "data": (1, 4)},
    (3, "fp32"): {"tensor": (1, 4), "data": (1, 4)},
    (1, "bf16"): {"tensor": (1, 4), "data": (1, 4)},
}


@pytest.fixture(scope="module")
def found(fork_ranks, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("traffic")
    (folder / "cases.json").write_text(json.dumps(CASES))
    finished = fork_ranks(WORKER, [folder / "cases.json", folder / "results.json"], WORLD_SIZE)
    assert finished.code == 0, finished.err
    return json.loads((folder / "results.json").read_text())


def as_counts(rows: list) -> dict:
    return {(operation, group): (calls, size) for operation, group, calls, size in rows}


def test_known_calls_are_counted_by_operation_and_group(found):
    counts = as_counts(found["known calls"])
    of_host = {key: counts.pop(key) for key in list(counts) if key[1] == HOST}
    assert of_host.keys() == {("all_gather", HOST)}
    assert counts == {
        ("all_reduce", "tensor"): (4, 6 + 12 + 12 + 12),
        ("all_gather", "data"): (2, 24 + 24),
        ("reduce_scatter", "data"): (1, 24),
        ("broadcast", "ranks 0, 1, 2, 3"): (1, 12),
        ("barrier", "ranks 0, 1, 2, 3"): (1, 0),
    }


@pytest.mark.parametrize("name", WRITTEN_DOWN)
def test_a_step_has_as_many_collectives_as_are_written_down(found, name):
    counts = as_counts(found[name]["counts"])
    assert {key: count for key, count in counts.items() if key[1] == "tensor"} == WRITTEN_DOWN[name]


@pytest.mark.parametrize("name", WRITTEN_DOWN_OF_ZERO)
def test_a_step_of_every_zero_stage_has_as_many_collectives_as_are_written_down(found, name):
    calls = {operation: calls for operation, group, calls, _ in found[name]["counts"] if group == "data"}
    assert calls == WRITTEN_DOWN_OF_ZERO[name]


def layout_of(values: dict) -> Layout:
    run = as_run(values["run"])
    size = run.parallel.tensor_parallel_size
    ranks = WORLD_SIZE // size
    return Layout(
        micro_batch_size=1,
        accumulation_steps=run.train.global_batch_size // ranks,
        seq_length=run.seq_length,
        data_parallel_size=ranks,
        tensor_parallel_size=size,
        sequence_parallel=run.parallel.sequence_parallel,
        zero_stage=values["stage"],
        activation_checkpointing=run.train.activation_checkpointing,
        precision=values["precision"],
        loss_chunk_bytes=values["loss_chunk_bytes"],
        persistence_threshold=values["zero"].get("stage3_param_persistence_threshold", 0),
        live_parameters=values["zero"].get("stage3_max_live_parameters", 10**9),
    )


@pytest.mark.parametrize("name", CASES)
def test_a_step_has_as_many_collectives_as_the_formulas_say(found, name):
    values, layout = CASES[name], layout_of(CASES[name])
    model = as_run(values["run"]).model
    numbers = NUMBERS[values["stage"], values["precision"]]
    expected = {("all_reduce", group): count for group, count in numbers.items() if layout.group_size(group) > 1}
    for one in step_collectives(model, layout):
        calls, size = expected.get((one.operation, one.group), (0, 0))
        expected[one.operation, one.group] = (calls + one.calls, size + one.bytes)
    # In a group of one nothing is sent.
    counts = {key: count for key, count in as_counts(found[name]["counts"]).items() if layout.group_size(key[1]) > 1}
    if values["stage"] == 3:
        calls, size = counts.pop(("all_gather", "data"))
        most_calls, least = expected.pop(("all_gather", "data"))
        if "stage3_prefetch_bucket_size" in values["zero"]:
            table = model.padded_vocab_size * model.hidden_size
            block = (sum(rank_parameters(model)) - 2 * table) // model.num_layers
            assert calls == most_calls and least < size < least + 4 * block
        else:  # the prefetcher takes all at once
            assert calls == layout.accumulation_steps < most_calls and size == least
    assert counts == expected


@pytest.mark.parametrize("name", CASES)
def test_a_rank_has_the_parameters_that_the_formulas_say(found, name):
    run = as_run(CASES[name]["run"])
    by_formula = rank_parameters(run.model, run.parallel.tensor_parallel_size)
    assert sorted(found[name]["parameters"]) == sorted(by_formula)
