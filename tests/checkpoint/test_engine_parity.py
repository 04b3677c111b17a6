"""A checkpoint continues a run exactly, in every engine layout, and in every other one to rounding.

The ranks are processes over gloo (engine_worker.py). Each launch goes through many layouts, one after the other.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megaslm.checkpoint import Fingerprint, compare_fingerprints

WORKER = Path(__file__).with_name("engine_worker.py")
ROOT = WORKER.parents[2]
LAYOUTS = [
    "z0",
    "z1",
    "z2",
    "z3",
    "z1_bf16",
    "z1_bf16_fp32_accumulation",
    "z2_bf16",
    "z3_bf16",
    "z3_bf16_persistent",
    "z3_bf16_subgroups",
    "z1_fp16",
    "z2_fp16",
    "z3_fp16",
    "z2_bf16_offload",
    "z2_round_robin",
    "z3_bf16_offload",
]
ONE_RANK = [layout for layout in LAYOUTS if layout.split("_")[-1] not in ("persistent", "subgroups", "robin")]
# Layout on 2 ranks, continued on 1 rank by another one (steps 3 to 5), continued on 2 ranks by a third (5 to 6).
CHAINS_FP32 = [("z1", "z3", "z2"), ("z2", "z0", "z3"), ("z3", "z1", "z0"), ("z0", "z2", "z1")]
CHAINS_BF16 = [("z1_bf16_fp32_accumulation", "z3_bf16", "z2_bf16_offload"), ("z3_bf16_offload", "z1_bf16", "z3_bf16")]
CHAINS = CHAINS_FP32 + CHAINS_BF16


def launch(world_size: int, directory: Path, port: int, tasks: list) -> dict:
    """Run engine_worker.py on some ranks and return rank 0's findings by task."""
    output = directory / f"{world_size}.json"
    job = directory / "job.json"
    job.write_text(json.dumps({"directory": str(directory), "output": str(output), "tasks": tasks}))
    env = os.environ | {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    ranks = []
    for rank in range(world_size):
        with open(directory / f"rank{rank}.log", "w") as log:
            command = [sys.executable, str(WORKER), str(job)]
            rank_env = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=rank_env, stdout=log, stderr=subprocess.STDOUT, cwd=directory))
    try:
        codes = [process.wait(timeout=300) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    logs = "\n".join((directory / f"rank{rank}.log").read_text()[-3000:] for rank in range(world_size))
    assert codes == [0] * world_size, logs
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory, free_port) -> dict:
    """Findings of three launches: {"two": ..., "one": ..., "two_again": ...}."""
    directory = tmp_path_factory.mktemp("checkpoints")
    alone = [[task, layout] for layout in ("z0", "z1", "z3") for task in ("weights_alone", "before_first_step")]
    two = launch(
        2,
        directory,
        free_port(),
        [["same_layout", layout] for layout in LAYOUTS] + alone + [["failures"], ["fingerprints"]],
    )
    first = [["chain", f"{a}_2/step_00000003", b, 3, 5] for a, b, _ in CHAINS]
    one = launch(1, directory, free_port(), [["same_layout", layout] for layout in ONE_RANK] + [["failures"]] + first)
    second = [["chain", f"{a}_2-{b}_1/step_00000005", c, 5, 6] for a, b, c in CHAINS]
    return {"two": two, "one": one, "two_again": launch(2, directory, free_port(), second)}


def values(losses: list[str]) -> list[float]:
    return [float.fromhex(loss) for loss in losses]


@pytest.mark.parametrize(("ranks", "layout"), [("one", x) for x in ONE_RANK] + [("two", x) for x in LAYOUTS])
def test_same_layout_continues_bit_for_bit(found, ranks, layout):
    result = found[ranks][f"same_layout {layout}"]
    assert result["resumed"] == result["losses"][3:]
    assert result["restored"] == result["saved"]
    assert result["resumed_end"] == result["end"]
    assert result["resumed_again"] == result["losses"][3:]
    assert result["global_state"] == {"samples": 12}
    assert result["end"] != result["saved"]


@pytest.mark.parametrize("chain", CHAINS, ids="->".join)
def test_another_layout_continues(found, chain):
    first, then, last = chain
    tolerance = 1e-6 if chain in CHAINS_FP32 else 1e-2  # bf16 has 8 bits, and the losses come from few tokens
    expected = values(found["two"][f"same_layout {first}"]["losses"])
    one = found["one"][f"chain {first}_2/step_00000003 {then} 3 5"]
    two = found["two_again"][f"chain {first}_2-{then}_1/step_00000005 {last} 5 6"]
    # The state itself moves over without the loss of a bit.
    assert one["fingerprint"] == found["two"][f"same_layout {first}"]["saved"]
    assert values(one["losses"] + two["losses"]) == pytest.approx(expected[3:], rel=tolerance)


@pytest.mark.parametrize("layout", ["z1_fp16", "z2_fp16", "z3_fp16"])
def test_loss_scale_is_saved(found, layout):
    """After three good steps; that it goes on from there is in the fingerprints above."""
    scaler = found["two"][f"same_layout {layout}"]["loss_scaler"]
    assert scaler == {"cur_scale": 512.0, "cur_iter": 3, "last_overflow_iter": -1, "cur_hysteresis": 1}
    assert found["two"]["same_layout z1"]["loss_scaler"] is None


@pytest.mark.parametrize("layout", ["z0", "z1", "z3"])
def test_weights_alone_start_a_new_optimizer(found, layout):
    result = found["two"][f"weights_alone {layout}"]
    assert result["again"] == result["losses"]
    assert result["steps"] == [2]
    assert all("weights alone" in message for message in result["refusal"])


@pytest.mark.parametrize("layout", ["z0", "z1", "z3"])
def test_save_before_the_first_step(found, layout):
    result = found["two"][f"before_first_step {layout}"]
    assert result["steps"] == [0] and result["moments"] == 0
    assert result["resumed"] == result["losses"]


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_failures_are_told_on_every_rank(found, ranks):
    result = found[ranks]["failures"]
    for message in result["full_disk"]:
        assert "could not save the checkpoint of step 2" in message and "File too large" in message
        assert "step_00000001" in message and "free" in message
    assert result["left"] == ["step_00000001"]
    assert result["step"] == 1
    assert len(result["reports"]) == 1 and "exp_avg_0000" in result["reports"][0]
    assert all("exp_avg_0000" in message and "hash differs" in message for message in result["damaged"])
    assert result["replaced"] == 2 and result["list"] == ["step_00000001", "step_00000002"]
    assert all("up.weight is [37, 16] in the checkpoint and [38, 16]" in text for text in result["another_model"])


def test_fingerprints_of_weights_that_lie_on_several_ranks(found):
    result = found["two"]["fingerprints"]
    alone = Fingerprint.from_json(result["alone"])
    assert set(result["z3"]["spread"]) == {"NOT_AVAILABLE"} and not result["z1"]["spread"]
    for layout, precisions in (
        ("z3", {"fp32", "bf16", "fp16"}),
        ("z1", {"fp32", "bf16", "fp16"}),
        ("z3_bf16", {"bf16"}),
    ):
        here = Fingerprint.from_json(result[layout]["fingerprint"])
        assert here.figures.keys() == precisions
        assert compare_fingerprints(alone, here) is None, layout


def test_a_difference_that_one_rank_sees_stops_all(found):
    result = found["two"]["fingerprints"]
    assert result["seen"] == [True, False]
    assert all("does not compute what it did when it was saved" in message for message in result["refusal"])
