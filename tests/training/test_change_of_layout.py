"""A run that is continued in another layout is the run that was not stopped: other ranks, another tensor-parallel size,
another ZeRO stage, another precision.

Every layout trains STOP steps, and in another folder to the end without a stop. Each stopped run is then continued in
other layouts, by the command, and held against the uninterrupted run of the layout that it started in.
"""

import itertools
import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from megaslm.checkpoint import Checkpoint, open_checkpoint

ROOT = Path(__file__).resolve().parents[2]
STOP = 10
WEIGHT_DECAY = 0.1
KINDS = ("weights", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Layout:
    """`engine` is a file of ds_configs, with which keys of zero_optimization replaced."""

    ranks: int
    engine: str
    micro_batch_size: int
    accumulation_steps: int
    replaced: tuple[tuple[str, int], ...] = ()
    tensor_parallel: int = 1
    sequence_parallel: bool = False

    def precision(self, of_run: str) -> str:
        return "fp32" if self.engine == "zero0" else of_run  # bf16 is refused there


LAYOUTS = {
    "TP 2, DP 2, ZeRO-1": Layout(4, "zero1", 2, 2, tensor_parallel=2),
    "TP 4, ZeRO-2": Layout(4, "zero2", 8, 1, tensor_parallel=4, sequence_parallel=True),
    # With this threshold every weight is released between its uses; without it none, as tiny as they are.
    "DP 4, ZeRO-3": Layout(4, "zero3", 2, 1, (("stage3_param_persistence_threshold", 0),)),
    "1 rank, stage 0": Layout(1, "zero0", 2, 4),
    # These only continue what others began.
    "1 rank, ZeRO-3": Layout(1, "zero3", 8, 1),
    "TP 2, DP 2, ZeRO-3, offload": Layout(
        4, "zero3_offload", 4, 1, (("stage3_param_persistence_threshold", 0),), tensor_parallel=2
    ),
}
TP_2, TP_4, DP_4, ONE, ONE_ZERO_3, TP_2_ZERO_3 = LAYOUTS
SOURCES = {"fp32": (TP_2, TP_4, DP_4, ONE), "bf16": (TP_2, TP_4, DP_4)}
PAIRS = {
    # From each to each other.
    "fp32": list(itertools.permutations(SOURCES["fp32"], 2)),
    "bf16": [(TP_4, DP_4), (DP_4, TP_2), (TP_2, ONE_ZERO_3), (DP_4, ONE), (TP_4, TP_2_ZERO_3)],
}


@dataclass(frozen=True)
class Precision:
    """Steps after the stop, the peak learning rate, and how near a continued run must come.

    loss: the requirement, relative, at every step; 1e-6 and 1e-3. The others are five to ten times what was
    measured: grad_norm, relative, at every step; state, the relative L2 distance of each tensor of the last checkpoint.
    """

    further: int
    lr: float
    loss: float
    grad_norm: float
    state: float

    @property
    def steps(self) -> int:
        return STOP + self.further


PRECISIONS = {
    "fp32": Precision(further=10, lr=3e-3, loss=1e-6, grad_norm=2e-6, state=3e-6),
    "bf16": Precision(further=30, lr=3e-4, loss=1e-3, grad_norm=1e-2, state=5e-2),
}
CHANGED = [(precision, *pair) for precision, pairs in PAIRS.items() for pair in pairs]
BEGUN = [(precision, source) for precision, sources in SOURCES.items() for source in sources]
# In bf16, and in more layouts, though of slices only a few: tests/checkpoint/test_engine_parity.py.
UNCHANGED = [("fp32", source, source) for source in SOURCES["fp32"]]


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory) -> Path:
    """`tiny` with biases, sizes that ZeRO can't divide, and logits so small that bf16 rounds them well."""
    model = {"num_layers": 1, "hidden_size": 24, "ffn_hidden_size": 44, "bias": True, "tie_embeddings": True}
    changed = {
        "model": tiny["model"] | model | {"init_std": 0.05},
        "optimizer": tiny["optimizer"] | {"weight_decay": WEIGHT_DECAY},
        "eval": {"interval": 0, "max_sequences": 2},
        "checkpoint": {"interval": 0, "keep_best": False},
    }
    path = tmp_path_factory.mktemp("preset") / "small.json"
    path.write_text(json.dumps(tiny | changed))
    return path


@pytest.fixture(scope="module")
def runs(small, pretrain_in_turn, tmp_path_factory) -> Path:
    """Folder PRECISION/SOURCE with the run folders `stopped` and `uninterrupted`, and TARGET of the continued runs.

    TARGET/restored holds a checkpoint of what the target's engine held after the restore, before its first step.
    """
    base = tmp_path_factory.mktemp("runs")
    begin, go_on = [], []
    for precision, source in BEGUN:
        folder, steps = base / precision / source, PRECISIONS[precision].steps
        begin.append((source, arguments(small, precision, source, folder / "stopped", STOP), None))
        begin.append((source, arguments(small, precision, source, folder / "uninterrupted", steps), None))
    for precision, source, target in CHANGED + UNCHANGED:
        folder, steps = base / precision / source / target, PRECISIONS[precision].steps
        go_on.append((target, arguments(small, precision, target, folder, steps), folder / "restored"))

    def launch(commands) -> None:
        for ranks in (1, 4):
            mine = [
                {"arguments": of_command, "save_restored": restored}
                for name, of_command, restored in commands
                if LAYOUTS[name].ranks == ranks
            ]
            pretrain_in_turn(mine, ranks if ranks > 1 else None)

    launch(begin)
    for precision, source, target in CHANGED + UNCHANGED:
        folder = base / precision / source
        shutil.copytree(folder / "stopped", folder / target)
    launch(go_on)
    return base


def arguments(preset: Path, precision: str, name: str, run_dir: Path, steps: int) -> list:
    """Of the command that trains to `steps` in a layout."""
    layout, settings = LAYOUTS[name], PRECISIONS[precision]
    config = json.loads((ROOT / "ds_configs" / f"{layout.engine}.json").read_text())
    config["zero_optimization"] |= dict(layout.replaced)
    engine = preset.with_name(f"{name}.json")
    engine.write_text(json.dumps(config))
    overrides = {
        "train.max_steps": steps,
        "schedule.horizon_steps": settings.steps,  # the schedule must not know where the run stops
        "train.precision": layout.precision(precision),
        "train.micro_batch_size": layout.micro_batch_size,
        "optimizer.lr": settings.lr,
    }
    if layout.tensor_parallel > 1:
        overrides["parallel.tensor_parallel_size"] = layout.tensor_parallel
        overrides["parallel.sequence_parallel"] = json.dumps(layout.sequence_parallel)
    options = ["--preset", preset, "--ds_config", engine, "--run_dir", run_dir]
    return [*options, *(f"{key}={value}" for key, value in overrides.items())]


@cache
def checkpoint(directory: Path, step: int) -> Checkpoint:
    return open_checkpoint(directory / f"step_{step:08d}")


def assert_same_bits(found: Checkpoint, expected: Checkpoint) -> None:
    """Weights, moments, step counts, decay: all of it."""
    assert found.optimizer == expected.optimizer
    assert found.shapes == expected.shapes
    for kind, name in itertools.product(KINDS, expected.shapes):
        bits = [one.read(name, kind).view(torch.int32) for one in (found, expected)]
        assert torch.equal(*bits), f"{kind} of {name}"


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize(("precision", "source", "target"), CHANGED)
def test_another_layout_goes_on_with_the_same_losses(runs, metrics, precision, source, target):
    folder, settings = runs / precision / source, PRECISIONS[precision]
    expected, found = metrics(folder / "uninterrupted"), metrics(folder / target)
    assert len(found) == settings.steps
    for key in ("step", "samples", "tokens", "lr"):
        assert [r[key] for r in found] == [r[key] for r in expected]
    assert found[:STOP] == metrics(folder / "stopped")
    for key, tolerance in (("loss", settings.loss), ("grad_norm", settings.grad_norm)):
        assert [r[key] for r in found[STOP:]] == pytest.approx([r[key] for r in expected[STOP:]], rel=tolerance, abs=0)


@pytest.mark.parametrize(("precision", "source", "target"), UNCHANGED)
def test_the_same_layout_goes_on_bit_for_bit(runs, numbers, precision, source, target):
    folder, last = runs / precision / source, PRECISIONS[precision].steps
    # The stopped run evaluated at its end, which the uninterrupted one had no reason to.
    found = [r for r in numbers(folder / target) if (r["kind"], r["step"]) != ("eval", STOP)]
    assert found == numbers(folder / "uninterrupted")
    assert_same_bits(
        checkpoint(folder / target / "checkpoints", last), checkpoint(folder / "uninterrupted" / "checkpoints", last)
    )


@pytest.mark.parametrize(("precision", "source", "target"), CHANGED + UNCHANGED)
def test_what_is_restored_is_what_was_saved_bit_for_bit(runs, precision, source, target):
    """Weights, moments, step counts and decay, as the target's engine holds them; and where the run is in its data."""
    folder = runs / precision / source
    saved = checkpoint(folder / "stopped" / "checkpoints", STOP)
    assert all(saved.read(name, kind).any() for kind in KINDS for name in saved.shapes), "nothing to compare"
    restored = checkpoint(folder / target / "restored", STOP)
    assert_same_bits(restored, saved)
    assert restored.global_state == saved.global_state


@pytest.mark.parametrize(("precision", "source", "target"), CHANGED)
def test_the_state_at_the_end_is_that_of_the_uninterrupted_run(runs, precision, source, target):
    folder, settings = runs / precision / source, PRECISIONS[precision]
    found = checkpoint(folder / target / "checkpoints", settings.steps)
    expected = checkpoint(folder / "uninterrupted" / "checkpoints", settings.steps)
    assert found.optimizer == expected.optimizer
    assert set(found.optimizer["steps"].values()) == {settings.steps}
    distances = {
        f"{kind} of {name}": distance(found.read(name, kind), expected.read(name, kind))
        for kind, name in itertools.product(KINDS, expected.shapes)
    }
    assert max(distances.values()) < settings.state, max(distances.items(), key=lambda item: item[1])


@pytest.mark.parametrize(("precision", "source", "target"), CHANGED)
def test_matrices_decay_and_vectors_do_not(runs, precision, source, target):
    """As the engine applies it, before the stop, after the restore and at the end."""
    folder = runs / precision / source
    for directory, step in (
        (folder / "stopped" / "checkpoints", STOP),
        (folder / target / "restored", STOP),
        (folder / target / "checkpoints", PRECISIONS[precision].steps),
    ):
        one = checkpoint(directory, step)
        rates = {len(shape): set() for shape in one.shapes.values()}
        for name, shape in one.shapes.items():
            rates[len(shape)].add(one.optimizer["weight_decay"][name])
        assert rates == {1: {0.0}, 2: {WEIGHT_DECAY}}


@pytest.mark.parametrize(("precision", "source", "target"), CHANGED + UNCHANGED)
def test_the_runs_were_in_the_layouts_named(runs, precision, source, target):
    folder = runs / precision / source / target
    for name, run_dir, saved in (
        (source, folder / f"before_step_{STOP:08d}", folder / "checkpoints" / f"step_{STOP:08d}"),
        (target, folder, folder / "restored" / f"step_{STOP:08d}"),
    ):
        layout = LAYOUTS[name]
        facts, engine = (json.loads((run_dir / f"{file}.json").read_text()) for file in ("environment", "engine"))
        assert (facts["ranks"], facts["precision"]) == (layout.ranks, layout.precision(precision))
        assert facts["tensor_parallel_ranks"] == layout.tensor_parallel
        assert engine["gradient_accumulation_steps"] == layout.accumulation_steps
        zero = engine["zero_optimization"]
        assert f"zero{zero['stage']}{'_offload' if 'offload_optimizer' in zero else ''}" == layout.engine
        assert {path.stem for path in saved.glob("*.safetensors")} == {
            f"{kind}_{rank:05d}" for kind in KINDS for rank in range(layout.ranks)
        }


@pytest.mark.parametrize(("precision", "source"), BEGUN)
def test_the_uninterrupted_runs_clip_and_learn(runs, metrics, precision, source):
    """Else nothing would depend on the moments."""
    records = metrics(runs / precision / source / "uninterrupted")
    assert all(record["grad_norm"] > 0.5 for record in records), "clipping is not active"
    assert records[-1]["loss"] < 0.97 * records[STOP]["loss"]
