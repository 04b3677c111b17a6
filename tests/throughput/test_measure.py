"""What the ranks of a case do: on a clock that is made up, on a GPU that is, and what is looked at before."""

import gc
import json
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import megaslm.training.clock
import megaslm.training.run
from megaslm.errors import UserError
from megaslm.parallel import uses_gpus
from megaslm.throughput import Case, examine, measure
from megaslm.throughput.benchmark import result_of, token_files
from megaslm.throughput.stepper import build
from megaslm.training import HostClock, MicroBatch

SHAPE = (
    "model.num_layers=1", "model.hidden_size=32", "model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=8",
    "model.ffn_hidden_size=64", "model.vocab_size=256", "data.seq_length=16", "train.global_batch_size=8",
    "train.micro_batch_size=4",
)  # fmt: skip
CPU_S = {"forward": 0.25, "backward": 0.5, "optimizer": 0.125}


@pytest.fixture
def joined(ranks, monkeypatch):
    """The ranks that `prepare` joins; joined(device=...) for others."""

    def join(**changes):
        others = replace(ranks, **changes)
        monkeypatch.setattr(examine, "init_distributed", lambda size: others)
        return others

    join()
    return join


@pytest.fixture
def case():
    given = Case("slm_tiny", overrides=SHAPE, precision="fp32", compiled=False)
    with token_files([given], 20) as (with_data,):
        yield with_data


class Sleeper:
    """A stepper whose phases take CPU_S on a clock that only it moves on. Its loss is the number of its step."""

    parameters, compiled = 7, "off"

    def __init__(self):
        self.now, self.count, self.log = 100.0, 0, []

    def step(self, micro_batches, lr, clock):
        for phase, seconds in CPU_S.items():
            clock.enter(phase)
            self.now += seconds
        self.count += 1
        self.log.append("step")
        return torch.tensor([2.0 * self.count, 2.0], dtype=torch.float64)


@pytest.fixture
def sleeper(monkeypatch, joined):
    one = Sleeper()
    monkeypatch.setattr(measure, "build", lambda *_: one)
    clock = SimpleNamespace(perf_counter=lambda: one.now)
    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setattr(megaslm.training.clock, "time", clock)
    monkeypatch.setattr(gc, "freeze", lambda: one.log.append("freeze"))
    monkeypatch.setattr(measure, "matmul_flops", lambda dtype, device: one.log.append(dtype) or 5e9)
    return one


def test_figures_are_those_of_an_independent_clock(sleeper, case):
    found = measure.measure(case, 2, 4)
    assert sleeper.log == ["step"] * 2 + ["freeze"] + ["step"] * 4 + [torch.float32]
    assert found.seconds == 4 * 0.875 and found.steps == [{"data": 0.0, **CPU_S, "rest": 0.0}] * 4
    assert (found.first_loss, found.last_loss) == (1.0, 6.0)
    result = result_of(case, [found], found.matmul_flops)
    assert result["tokens_per_s"] == pytest.approx(8 * 16 / 0.875) and result["ms_per_step"] == pytest.approx(875)
    assert result["phases_ms"]["backward"] == pytest.approx(500)
    measure.measure(replace(case, precision="bf16"), 1, 1)
    assert sleeper.log[-1] == torch.bfloat16


def test_the_slowest_rank_and_the_largest_peak_count(sleeper, case, monkeypatch):
    def of_two(value):
        return [value, {name: 3 * number for name, number in value.items()} if value else None]

    monkeypatch.setattr(measure.host, "gather", of_two)
    monkeypatch.setattr(measure, "memory_used", lambda device: {"memory_bytes": 10})
    found = measure.measure(case, 1, 2)
    assert found.seconds == 3 * 2 * 0.875 and found.memory == {"memory_bytes": 30}
    assert measure.probe(measure.probed(case, 2, 4, 1)) == {"memory_bytes": 30}


def test_a_probe_takes_two_micro_batches_of_the_size():
    case = Case("slm_tiny", overrides=SHAPE, world_size=2)
    for size, accumulation, expected in ((4, 1, 1), (2, 2, 2), (1, 8, 2), (3, 0, 1)):
        one = measure.probed(case, size, accumulation, copies=2)
        layout = one.batch(one.run_config())
        assert (layout.micro_batch_size, layout.accumulation_steps) == (size, expected)


class Batches:
    """Stands for StepBatches, which would copy to the GPU."""

    def __init__(self, dataset, layout, ranks, first, steps):
        self.left = steps

    def __enter__(self):
        return self

    def __exit__(self, *_):
        assert self.left == 0, "asked for as many steps as were read ahead"

    def next(self):
        self.left -= 1
        return []


@pytest.mark.parametrize("rank, profiled", [(0, 1), (1, 1), (0, 2)])
def test_on_a_gpu_rank_0_profiles_further_steps(rank, profiled, sleeper, case, joined, monkeypatch):
    """Of their work it keeps that of one."""
    monkeypatch.setattr(measure, "PROFILED_STEPS", profiled)
    joined(device=torch.device("cuda", 0), rank=rank)
    opened = []

    @contextmanager
    def profile(activities):
        opened.append(len(sleeper.log))
        yield "profiler"

    work = {"ph": "X", "cat": "kernel", "name": "k", "ts": 5, "dur": profiled * 3e5, "args": {"correlation": 1}}
    launch = {"ph": "X", "cat": "cuda_runtime", "name": "l", "ts": 4, "dur": 1, "args": {"correlation": 1}}
    phase = {"ph": "X", "cat": "user_annotation", "name": "phase: forward", "ts": 1, "dur": 10}
    waits = []
    for name, fake in {
        "StepBatches": Batches,
        "DeviceClock": HostClock,
        "memory_used": lambda device: {"memory_bytes": 1, "memory_reserved_bytes": 2},
        "kernels_of": lambda *_: "triton",
        "peak_flops": lambda device: 8e14,
        "events_of": lambda profiler: [phase, launch, work],
    }.items():
        monkeypatch.setattr(measure, name, fake)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    monkeypatch.setattr(torch.profiler, "profile", profile)
    monkeypatch.setattr(torch.profiler, "record_function", lambda name: nullcontext())
    found = measure.measure(case, 1, 2)
    steps = ["step", "freeze", "step", "step"] + profiled * ["step"]
    assert sleeper.log[:-1] == steps, "all ranks take the steps that one profiles"
    assert opened == ([4] if rank == 0 else []) and found.busy == ({"forward": 0.3} if rank == 0 else None)
    assert found.seconds == 2 * 0.875 and len(found.steps) == 2 and len(waits) == 4
    phases = result_of(case, [found], 1e14)["phases_ms"]
    expected = {"data": 0.0, "forward": 300, "backward": 0.0, "optimizer": 0.0, "gap": 575}
    assert phases == (pytest.approx(expected) if rank == 0 else phases | {"gap": None})


@pytest.mark.parametrize("kind", ["megaslm", "ddp", "hf"])
def test_compile_on_compiles(kind, case, joined, monkeypatch):
    """And off does not."""
    compiled = []
    monkeypatch.setattr(megaslm.training.run, "compile_blocks", lambda *_: compiled.append("every block"))
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append("whole model"))
    for on in (False, True):
        one = replace(case, kind=kind, compiled=on)
        run, ranks, data = examine.prepare(one)
        stepper = build(one, run, ranks, data)
        expected = "whole model" if kind == "hf" else "every block"
        assert compiled == ([expected] if on else []) and stepper.compiled == (expected if on else "off")


@pytest.mark.parametrize("stage", [0, 2])
def test_the_engine_is_that_of_a_run_and_follows_its_config(stage, case, joined, monkeypatch):
    checked = []
    monkeypatch.setattr(megaslm.training.run, "check_engine", checked.append)
    one = replace(case, engine_file=str(Path(__file__).parents[2] / "ds_configs" / f"zero{stage}.json"))
    run, ranks, data = examine.prepare(one)
    engine = build(one, run, ranks, data).step.__self__.deepspeed
    assert engine.zero_optimization_stage() == stage and checked == [engine]
    assert engine.gradient_accumulation_steps() == 2


def test_what_the_machine_says_to_a_case(case, joined, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    given = [replace(case, kind=kind, precision=None, compiled=None) for kind in ("megaslm", "hf")]
    found = examine.examine(given)
    assert {(one.precision in ("fp32", "bf16"), one.compiled) for one in found.cases} == {(True, False)}
    assert found.obstacles == {} and found.memory_limit > 2**20
    facts = found.environment
    assert facts["threads_per_rank"] >= 1 and facts["variables"]["NCCL_DEBUG"] == "WARN" and facts["device"]
    assert facts["float32_matmul_precision"] and "HOME" not in json.dumps(facts["variables"])


def test_a_missing_compiler_is_found_before_the_measuring(case, joined, monkeypatch):
    def fail(function):
        raise RuntimeError("no compiler here\nat all")

    monkeypatch.setattr(torch, "compile", fail)
    given = [replace(case, kind=kind, compiled=on) for kind in ("megaslm", "hf") for on in (True, False)]
    found = examine.examine(given)
    reason = "torch.compile does not run here (RuntimeError: no compiler here)"
    assert found.obstacles == {one: reason for one in given if one.compiled} and found.cases == given


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"overrides": (*SHAPE, "train.attention=flash")}, "train.attention=flash does not run on"),
        ({"overrides": (*SHAPE, "train.float8=rowwise")}, "train.float8=rowwise needs"),
        ({"overrides": (*SHAPE, "train.cuda_graphs=true")}, "train.cuda_graphs needs a GPU"),
        ({"overrides": (*SHAPE, "train.kernels=triton")}, "train.kernels=triton"),
        ({"kind": "hf", "precision": "fp16"}, "fp16"),
        ({"token_file": "nowhere"}, "token file nowhere.bin does not exist"),
    ],
)
def test_what_cannot_be_had_is_refused_before_the_measuring(changes, says, case, joined):
    with pytest.raises(UserError, match=says):
        examine.examine([case, replace(case, **changes)])


def test_a_switch_decides_whether_gpus_are_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert uses_gpus()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert not uses_gpus()


def test_a_batch_is_what_a_stepper_gets(case, joined, sleeper, monkeypatch):
    """Of the case's size, through the loader of a run."""
    seen = []
    step = sleeper.step
    monkeypatch.setattr(sleeper, "step", lambda batches, lr, clock: seen.append(batches) or step(batches, lr, clock))
    measure.measure(case, 0, 1)
    ((first, second),) = seen
    assert isinstance(first, MicroBatch) and first.tokens.shape == second.tokens.shape == (4, 16)
