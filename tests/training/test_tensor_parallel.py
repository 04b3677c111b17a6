"""Layout never changes the numbers: tensor-parallel size, data-parallel size, ZeRO stage and sequence parallelism."""

import pytest
from layout_engines import run_config

STAGES = (0, 1, 2, 3)
# The largest sizes first: what an engine of tensor-parallel ranks leaves in DeepSpeed must not reach the next one.
# One layer: between the ranks of this machine, every collective takes a millisecond.
MODEL = {"num_layers": 1}


def case(tensor: int, data: int, stage: int, along_sequence: bool) -> dict:
    """Two micro-batches a step, whatever the data-parallel size."""
    parallel = {"tensor_parallel_size": tensor, "sequence_parallel": along_sequence}
    return {"run": run_config(MODEL, parallel=parallel, train={"micro_batch_size": 2 // data}), "stage": stage}


LAYOUTS = {
    f"TP {tensor} x DP {data}, ZeRO-{stage}" + (", sequence parallel" if along_sequence else ""): (
        tensor * data, case(tensor, data, stage, along_sequence)
    )
    for tensor in (4, 2, 1) for data in (1, 2) for stage in STAGES for along_sequence in (False, True)[:tensor]
}  # fmt: skip
REFERENCE = "TP 1 x DP 1, ZeRO-0"


@pytest.fixture(scope="module")
def result(train_layouts):
    """result(name) of a layout; the ranks are started once for all layouts of so many."""
    found = {}

    def of(name: str) -> dict:
        if name not in found:
            ranks, _ = LAYOUTS[name]
            cases = {other: case for other, (needed, case) in LAYOUTS.items() if needed == ranks}
            found.update(train_layouts(cases, ranks))
        return found[name]

    return of


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_the_same_model_on_the_same_samples(result, name):
    expected, found = result(REFERENCE), result(name)
    assert found["initial weights"], "other parts of the whole model's"
    assert len(found["losses"]) == 10
    for key in ("losses", "norms"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5)
    # Sequences of lengths that no number of ranks divides.
    assert found["fingerprint"] == pytest.approx(expected["fingerprint"], rel=1e-5, abs=1e-6)
    assert found["validation"] == pytest.approx(expected["validation"], rel=1e-5)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name.endswith("sequence parallel")])
def test_under_sequence_parallelism_a_rank_has_its_part_of_the_stream(result, name):
    tensor = LAYOUTS[name][1]["run"]["parallel"]["tensor_parallel_size"]
    assert result(name)["tokens in the stream"] == 16 // tensor
    assert result(name.removesuffix(", sequence parallel"))["tokens in the stream"] == 16


def test_the_reference_run_clips_and_learns(result):
    found = result(REFERENCE)
    assert min(found["norms"]) > 0.3, "clipping is not active"
    assert found["losses"][-1] < found["losses"][0]
