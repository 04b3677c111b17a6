"""Layout never changes the numbers: tensor-parallel size, data-parallel size, ZeRO stage and sequence parallelism. Held
against one rank, and, where both can, against DeepSpeed's own tensor parallelism."""

import pytest
from layout_engines import run_config

STAGES = (0, 1, 2, 3)


def case(tensor: int, data: int, stage: int, along_sequence: bool = False, num_layers: int = 2) -> dict:
    """Two micro-batches a step, whatever the data-parallel size."""
    parallel = {"tensor_parallel_size": tensor, "sequence_parallel": along_sequence}
    model = {"num_layers": num_layers}
    return {"run": run_config(model, parallel=parallel, train={"micro_batch_size": 2 // data}), "stage": stage}


def layers(tensor: int, data: int) -> int:
    """One on eight ranks: between the ranks of this machine, every collective takes a millisecond."""
    return 1 if tensor * data == 8 else 2


# The largest sizes first: what an engine of tensor-parallel ranks leaves in DeepSpeed must not reach the next one.
LAYOUTS = {
    f"TP {tensor} x DP {data}, ZeRO-{stage}" + (", sequence parallel" if along_sequence else ""): (
        tensor * data, case(tensor, data, stage, along_sequence, layers(tensor, data))
    )
    for tensor in (4, 2, 1) for data in (1, 2) for stage in STAGES for along_sequence in (False, True)[:tensor]
}  # fmt: skip
REFERENCES = {2: "TP 1 x DP 1, ZeRO-0", 1: "of one layer"}  # by the number of layers

# Without qk_norm, whose gradient DeepSpeed would not sum.
WITNESS = run_config({"qk_norm": False}, train={"max_steps": 5})
WITNESS_ON_FOUR = WITNESS | {"parallel": {"tensor_parallel_size": 2}}
OTHERS = {
    REFERENCES[1]: (1, case(1, 1, 0, num_layers=1)),
    "one rank, without qk_norm": (1, {"run": WITNESS, "stage": 0}),
    "TP 2 x DP 2, without qk_norm": (4, {"run": WITNESS_ON_FOUR, "stage": 1}),
    # The last: DeepSpeed keeps its groups in its module, from the first such engine on.
    "TP 2 x DP 2 of DeepSpeed": (4, {"run": WITNESS_ON_FOUR, "stage": 1, "autotp": True}),
}  # fmt: skip


@pytest.fixture(scope="module")
def result(train_layouts):
    """result(name) of a layout; the ranks are started once for all layouts of so many."""
    found, every = {}, LAYOUTS | OTHERS

    def of(name: str) -> dict:
        if name not in found:
            ranks, _ = every[name]
            cases = {other: case for other, (needed, case) in every.items() if needed == ranks}
            found.update(train_layouts(cases, ranks))
        return found[name]

    return of


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_the_same_model_on_the_same_samples(result, name):
    expected, found = result(REFERENCES[LAYOUTS[name][1]["run"]["model"]["num_layers"]]), result(name)
    assert found["initial weights"], "other parts of the whole model's"
    assert len(found["losses"]) == 10
    for key in ("losses", "norms"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5)
    # Sequences of lengths that no number of ranks divides.
    assert found["fingerprint"] == pytest.approx(expected["fingerprint"], rel=1e-5, abs=1e-6)
    assert found["validation"] == pytest.approx(expected["validation"], rel=1e-5)
    assert found["differing"] == []


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name.endswith("sequence parallel")])
def test_under_sequence_parallelism_a_rank_has_its_part_of_the_stream(result, name):
    tensor = LAYOUTS[name][1]["run"]["parallel"]["tensor_parallel_size"]
    assert result(name)["tokens in the stream"] == 16 // tensor
    assert result(name.removesuffix(", sequence parallel"))["tokens in the stream"] == 16


@pytest.mark.parametrize("name", [*REFERENCES.values(), "one rank, without qk_norm"])
def test_the_reference_runs_clip_and_learn(result, name):
    found = result(name)
    assert min(found["norms"]) > 0.3, "clipping is not active"
    assert found["losses"][-1] < found["losses"][0]


@pytest.mark.parametrize("name", ["one rank, without qk_norm", "TP 2 x DP 2, without qk_norm"])
def test_the_tensor_parallelism_of_deepspeed_gives_the_same_numbers(result, name):
    ours, theirs = result(name), result("TP 2 x DP 2 of DeepSpeed")
    for key in ("losses", "norms", "validation"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-5)
