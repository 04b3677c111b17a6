"""A checkpoint continues a run exactly, in every engine layout, and in every other one to rounding.

The ranks are processes over gloo (engine_worker.py). Each launch goes through many layouts, one after the other.
"""

import json
import math
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest

from megaslm.checkpoint import (
    EXPORT_RECORD,
    DamagedCheckpoint,
    Fingerprint,
    compare_checkpoints,
    compare_fingerprints,
    export_checkpoint,
    inspect_path,
    latest_sound,
    list_checkpoints,
    open_checkpoint,
    open_model,
)
from megaslm.evaluation import validate_model

WORKER = Path(__file__).with_name("engine_worker.py")
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
# What two ranks do not show: that one can do without the others.
ONE_RANK = ["z0", "z1", "z2", "z3", "z1_bf16_fp32_accumulation", "z2_fp16", "z3_bf16_offload"]
# Layout on 2 ranks, continued on 1 rank by another one (steps 3 to 5), continued on 2 ranks by a third (5 to 6).
CHAINS_FP32 = [("z1", "z3", "z2"), ("z2", "z0", "z3"), ("z3", "z1", "z0"), ("z0", "z2", "z1")]
CHAINS_BF16 = [("z1_bf16_fp32_accumulation", "z3_bf16", "z2_bf16_offload"), ("z3_bf16_offload", "z1_bf16", "z3_bf16")]
CHAINS = CHAINS_FP32 + CHAINS_BF16


def launch(fork_ranks, world_size: int, directory: Path, tasks: list) -> dict:
    """Rank 0's findings, by task."""
    job, output = directory / "job.json", directory / f"{world_size}.json"
    job.write_text(json.dumps({"directory": str(directory), "output": str(output), "tasks": tasks}))
    finished = fork_ranks(WORKER, [job], world_size)
    assert finished.code == 0, finished.err
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def found(fork_ranks, tmp_path_factory) -> dict:
    """Rank 0's findings, by task, of three launches: {"two": ..., "one": ..., "two_again": ...}."""
    directory = tmp_path_factory.mktemp("checkpoints")
    run = partial(launch, fork_ranks, directory=directory)
    alone = [[task, layout] for layout in ("z0", "z1", "z3") for task in ("weights_alone", "before_first_step")]
    two = run(2, tasks=[["same_layout", layout] for layout in LAYOUTS] + alone + [["failures"], ["fingerprints"]])
    first = [["chain", f"{a}_2/step_00000003", b, 3, 5] for a, b, _ in CHAINS]
    one = run(1, tasks=[["same_layout", layout] for layout in ONE_RANK] + [["failures"]] + first)
    second = [["chain", f"{a}_2-{b}_1/step_00000005", c, 5, 6] for a, b, c in CHAINS]
    return {"two": two, "one": one, "two_again": run(2, tasks=second)}


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
    assert result["two_rates"] == "parts of up.weight have 0.0 and 0.1"


# Layout and tensor-parallel size on 4 ranks: each continues what the one before it has saved.
STATIONS = [
    ("z1", 2),
    ("z2", 4),
    ("z3", 1),
    ("z0", 2),
    ("z1_bf16_fp32_accumulation", 4),
    ("z3", 2),
    ("z0", 4),
    ("z2_round_robin", 2),
    ("z3_bf16_subgroups", 4),
    ("z3_bf16_offload", 2),
    ("z0", 1),
]


# That train on: every weight is released between its uses; the loss is scaled.
STEPPED = [("z3_bf16", 2), ("z2_fp16", 4)]


@pytest.fixture(scope="module")
def on_four(fork_ranks, tmp_path_factory) -> dict:
    """Rank 0's findings, by task, of one launch."""
    tasks = [["relay", "all kinds", True, STATIONS], ["relay", "qwen3", False, STATIONS[:1]]]
    tasks += [["steps_between", "all kinds/step_00000003", *one] for one in STEPPED]
    return launch(fork_ranks, 4, tmp_path_factory.mktemp("relays"), tasks)


@pytest.fixture(scope="module")
def relayed(on_four) -> list[Path]:
    """A made-up checkpoint, and then that of every station."""
    return list(map(Path, on_four["relay all kinds True"]))


@pytest.fixture(scope="module")
def qwen3(on_four) -> list[Path]:
    """A made-up checkpoint of one rank, and that of 2 x 2."""
    return list(map(Path, on_four["relay qwen3 False"]))


@pytest.mark.parametrize("station", range(1, len(STATIONS) + 1), ids=lambda i: f"{STATIONS[i - 1]}")
def test_slices_go_from_layout_to_layout_bit_for_bit(relayed, station):
    """Weights, moments, step counts and weight decay; and what the run itself has kept there."""
    comparison = compare_checkpoints(relayed[0], relayed[station])
    assert comparison.passed, comparison.tensors
    assert len(comparison.tensors) == 3 and all(kind.compared == 26 for kind in comparison.tensors)


def test_the_layouts_are_in_the_files(relayed):
    """One piece of every element, whoever has it too; and no rank without something to write."""
    for path in relayed[1:]:
        manifest = json.loads((path / "manifest.json").read_text())
        assert len([name for name in manifest["files"] if name.startswith("weights")]) == 4
        for part in manifest["tensors"].values():
            for entry in part.values():
                assert sum(piece["numel"] for piece in entry["pieces"]) == math.prod(entry["shape"])

    def pieces(station: tuple[str, int], name: str) -> list[dict]:
        manifest = json.loads((relayed[1 + STATIONS.index(station)] / "manifest.json").read_text())
        return manifest["tensors"]["weights"][f"decoder.blocks.0.{name}"]["pieces"]

    halves = [{"offset": [0, at], "shape": [20, 14]} for at in (0, 14)]
    assert [piece["block"] for piece in pieces(("z0", 2), "feed_forward.down.weight")] == halves
    # Queries of 4 ranks, and the keys and values, which all of them have, of one.
    assert sorted((piece["start"], piece["numel"]) for piece in pieces(("z0", 4), "attention.qkv.weight")) == [
        *((120 * rank, 120) for rank in range(4)),
        (480, 480),
    ]


@pytest.mark.parametrize(("layout", "tensor_parallel"), STEPPED)
def test_what_slices_restore_is_what_the_next_steps_run_on(on_four, layout, tensor_parallel):
    """In a fresh engine and in one that has made steps: weights of the model, moments, step counts and loss scale."""
    result = on_four[f"steps_between all kinds/step_00000003 {layout} {tensor_parallel}"]
    assert values(result["losses"]) == pytest.approx(values(result["expected"]), rel=2e-3)
    assert result["again"] == result["losses"][1] != result["losses"][0]
    assert result["end again"] == result["end"]
    assert (result["unborn steps"], result["unborn moments"]) == ([0], 0)
    assert result["weights alone"] == result["losses"][0] and result["steps of weights alone"] == [1]
    assert (result["loss scaler"] or {}).get("cur_iter") == (1 if "fp16" in layout else None)


def test_the_export_of_slices_is_that_of_the_whole(qwen3, tmp_path):
    """Byte for byte, of the same weights from one rank and from 2 x 2."""
    exports = []
    for name, path in zip(("whole", "slices"), qwen3, strict=True):
        export_checkpoint(open_model(path), tmp_path / name, without_tokenizer=True, check=False)
        exports.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    whole, slices = exports
    assert whole.keys() == slices.keys() and "model.safetensors" in whole
    # These two name the checkpoint.
    assert {name for name in whole if whole[name] != slices[name]} <= {EXPORT_RECORD, "README.md"}


def test_slices_are_as_many_bytes_as_the_whole(qwen3):
    reports = [validate_model(path) for path in qwen3]
    assert all(report.passed for report in reports), reports
    assert all(report.figures["bytes_of_weights"] == 4 * report.figures["parameters"] for report in reports)
    assert reports[0].figures["parameters"] == reports[1].figures["parameters"] > 0


def test_a_damaged_slice_is_named(relayed, tmp_path):
    path = shutil.copytree(relayed[1], tmp_path / "step_00000003")
    file = path / "exp_avg_00003.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match="exp_avg_00003.safetensors is not what was written"):
        open_checkpoint(path)
    assert inspect_path(path).damage == ["exp_avg_00003.safetensors is not what was written (hash differs)"]


def test_a_rank_that_is_killed_while_it_saves_a_slice_leaves_the_last_checkpoint(fork_ranks, tmp_path):
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"directory": str(tmp_path / "run"), "output": "", "tasks": [["killed_save"]]}))
    assert fork_ranks(WORKER, [job], 2).code == -signal.SIGKILL
    assert latest_sound(tmp_path / "run", print).step == 1
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_00000001"]
    assert list((tmp_path / "run").glob(".step_00000002.*/weights_00001.safetensors")), "it had not begun to write"


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
