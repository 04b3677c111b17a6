#!/usr/bin/env python3
"""How well the formula of memory (megaslm/planning/memory.py) agrees with real training steps on this machine.

    python tools/benchmark_memory.py                         1 and 2 ranks, every ZeRO stage, a few minutes
    python tools/benchmark_memory.py --json benchmarks/memory_cpu.json

Each layout gets new processes, which take the same step as a run would, on random tokens. Measured on a CPU is the
resident set of a process at the peak of a step and between two, less what it was after a step of a network of next to
no size, which has loaded and started everything; on a GPU what torch has allocated. Printed for each layout, in MB
(10^6 bytes): the estimate, what was measured, their ratio, and the moment of the step at which the estimate peaks.

There are two networks: in one weights and their gradients are most of it, in the other activations.
"""

import argparse
import ctypes
import gc
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megaslm.commands import interrupt_on_termination, run_command
from megaslm.config import RunConfig, load_engine_config, load_run_config, resolve_batch, resolve_engine_config
from megaslm.errors import UserError
from megaslm.reports import check_folder_of, table, write_json

ROOT = Path(__file__).resolve().parents[1]
PRESET = "slm_small"
NETWORKS = {
    "weights": [
        "model.num_layers=4", "model.hidden_size=768", "model.num_heads=8", "model.num_kv_heads=4",
        "model.head_dim=96", "model.ffn_hidden_size=2048", "model.vocab_size=24064", "data.seq_length=32",
        "train.global_batch_size=4", "train.micro_batch_size=1",
    ],
    "activations": [
        "model.num_layers=6", "model.hidden_size=384", "model.num_heads=6", "model.num_kv_heads=2",
        "model.head_dim=64", "model.ffn_hidden_size=1024", "model.vocab_size=4000", "model.qk_norm=true",
        "model.context_length=512", "data.seq_length=512", "train.global_batch_size=2", "train.micro_batch_size=2",
    ],
}  # fmt: skip
# The formula is of eager mode.
EVERYWHERE = ["model.tie_embeddings=false", "model.parallel_residual=false", "train.compile=false"]
TINY = [
    "model.num_layers=1", "model.hidden_size=32", "model.num_heads=2", "model.num_kv_heads=2", "model.head_dim=16",
    "model.ffn_hidden_size=64", "model.vocab_size=128",
]  # fmt: skip
BUCKET = 4_000_000
"""Elements of a bucket of gradients: all of it is used, or else its memory would be asked for and never be taken."""
STEPS = 2
MEGABYTE = 1e6


@dataclass(frozen=True)
class Case:
    """A layout to measure."""

    network: str
    world_size: int
    stage: int
    precision: str
    tensor_parallel_size: int = 1
    recompute: bool = False

    def __str__(self) -> str:
        ranks = f"{self.world_size} rank{'s' * (self.world_size > 1)}"
        parts = [self.network, ranks, f"ZeRO-{self.stage}", self.precision]
        if self.tensor_parallel_size > 1:
            parts.append(f"TP {self.tensor_parallel_size}, SP")
        return ", ".join(parts + ["recomputed"] * self.recompute)

    @property
    def overrides(self) -> list[str]:
        found = [f"train.activation_checkpointing={str(self.recompute).lower()}"]
        if self.tensor_parallel_size > 1:
            found.append(f"parallel.tensor_parallel_size={self.tensor_parallel_size}")
            found.append("parallel.sequence_parallel=true")
        return found


CASES = [
    *(Case("weights", ranks, stage, "fp32") for ranks in (1, 2) for stage in (0, 1, 2, 3)),
    *(Case("weights", ranks, stage, "bf16") for ranks in (1, 2) for stage in (1, 2, 3)),
    Case("weights", 2, 1, "bf16", tensor_parallel_size=2),
    *(Case("activations", 1, 1, precision, recompute=on) for precision in ("fp32", "bf16") for on in (False, True)),
    Case("activations", 2, 2, "bf16"),
    Case("activations", 2, 3, "fp32"),
    Case("activations", 2, 1, "fp32", tensor_parallel_size=2),
    Case("activations", 2, 1, "bf16", tensor_parallel_size=2, recompute=True),
]
QUICK = [
    Case("weights", 1, 1, "bf16"),
    Case("activations", 2, 1, "bf16", tensor_parallel_size=2),
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK)} of the {len(CASES)} layouts")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of both networks")
    arguments = parser.parse_intermixed_args()
    for override in arguments.overrides:
        if override.startswith(("parallel.", "train.precision=", "train.activation_checkpointing=", "train.compile=")):
            raise UserError(f"{override}: this command chooses the layouts and the arithmetic by itself")
    if arguments.json:
        check_folder_of(arguments.json, "--json")
    return arguments


def main() -> None:
    interrupt_on_termination()  # ends the ranks
    arguments = parse_arguments()
    import torch

    from megaslm.parallel import gpus_for_ranks
    from megaslm.throughput import start_ranks

    gpus = gpus_for_ranks()
    if not gpus:
        check_system()
    for network in NETWORKS:
        load(Case(network, 1, 1, "fp32"), arguments.overrides)  # a mistake is one message, not one of every rank
    results = []
    for case in QUICK if arguments.quick else CASES:
        if gpus and case.world_size > gpus:
            continue
        results.append(start_ranks(measure, (case, arguments.overrides), case.world_size, bool(gpus)))
        print(f"{case}: {results[-1]['ratio']:.3f}", flush=True)
    print("\n".join(report(results)))
    if arguments.json:
        from importlib.metadata import version

        from megaslm.training import code_version

        facts = {"command": ["python", "tools/benchmark_memory.py", *sys.argv[1:]], "code_version": code_version()}
        facts |= {"gpus": gpus, "python": platform.python_version(), "deepspeed": version("deepspeed")}
        facts |= {"torch": torch.__version__, "device": torch.cuda.get_device_name(0) if gpus else "cpu"}
        write_json(arguments.json, {"format": 1, "environment": facts, "results": results})


def check_system() -> None:
    """UserError where the peak of the resident set can't be told, or is no measure of what a step takes."""
    if not Path("/proc/self/clear_refs").exists() or not hasattr(ctypes.CDLL(None), "mallopt"):
        raise UserError("without a GPU this command needs Linux and its C library: /proc/self/clear_refs and mallopt")


def load(case: Case, overrides: list[str], extra: list[str] | None = None) -> RunConfig:
    return load_run_config(PRESET, [*EVERYWHERE, *NETWORKS[case.network], *case.overrides, *overrides, *(extra or [])])


def measure(case: Case, overrides: list[str]) -> dict[str, Any]:
    """Bytes at the peak of a step and between steps, the most of all ranks, and the estimates of both. Collective."""
    import torch

    from megaslm.parallel import host, init_distributed, uses_gpus
    from megaslm.planning import memory_estimate

    if not uses_gpus():
        # Tensors get pages of their own, which go back when they are freed.
        libc = ctypes.CDLL(None)
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, 1 << 16)
        torch.set_num_threads(1)
    ranks = init_distributed(case.tensor_parallel_size)
    engine, *_ = build(case, load(case, overrides, TINY), ranks)
    step(engine, load(case, overrides, TINY), case, ranks)
    engine.deepspeed.destroy()
    del engine
    meter = Meter(ranks.device)
    run = load(case, overrides)
    engine, layout, kernels = build(case, run, ranks)
    for _ in range(STEPS - 1):
        step(engine, run, case, ranks)
    meter.reset()
    step(engine, run, case, ranks)
    peak, held = meter.peak(), meter.now()
    estimate = memory_estimate(run.model, layout, kernels)
    measured = [max(of_ranks) for of_ranks in zip(*host.gather((peak, held)), strict=True)]
    return {
        "case": asdict(case),
        "name": str(case),
        "layout": asdict(layout),
        "kernels": kernels,
        "moment": estimate.moment,
        "parts": asdict(estimate.peak),
        "estimated_bytes": estimate.total,
        "measured_bytes": measured[0],
        "ratio": estimate.total / measured[0],
        "estimated_held_bytes": estimate.held.total,
        "measured_held_bytes": measured[1],
        "held_ratio": estimate.held.total / measured[1],
    }


class Meter:
    """Bytes that this process has taken since the meter was made: resident on a CPU, allocated by torch on a GPU."""

    def __init__(self, device: Any):
        self.device, self.base = device, 0
        self.base = self.now()

    def now(self) -> int:
        import torch

        gc.collect()
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) - self.base
        return _status("VmRSS") - self.base

    def reset(self) -> None:
        import torch

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak of the resident set

    def peak(self) -> int:
        import torch

        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.base
        return _status("VmHWM") - self.base


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def build(case: Case, run: RunConfig, ranks: Any) -> tuple[Any, Any, str]:
    """The engine, the layout and the kernels of a case. Collective."""
    import dataclasses

    from megaslm.planning import engine_layout
    from megaslm.training import TrainingEngine, build_network, choose_kernels

    batch = resolve_batch(run.train.global_batch_size, run.train.micro_batch_size, ranks.data_parallel_size)
    engine_config = load_engine_config(ROOT / f"ds_configs/zero{case.stage}.json")
    if case.stage:
        engine_config["zero_optimization"]["reduce_bucket_size"] = BUCKET
    layout = dataclasses.replace(
        engine_layout(engine_config),
        micro_batch_size=batch.micro_batch_size,
        accumulation_steps=batch.accumulation_steps,
        seq_length=run.seq_length,
        data_parallel_size=ranks.data_parallel_size,
        tensor_parallel_size=case.tensor_parallel_size,
        sequence_parallel=run.parallel.sequence_parallel,
        activation_checkpointing=case.recompute,
        precision=case.precision,
    )
    engine_config = resolve_engine_config(
        engine_config, run=run, precision=case.precision, batch=batch, data_parallel_size=ranks.data_parallel_size
    )
    ops = choose_kernels(run.train.kernels, ranks.device)
    model, _ = build_network(run, ranks, ops, case.precision, batch.micro_batch_size, case.stage)
    return TrainingEngine(model, run, engine_config, ranks), layout, ops.backend


def step(engine: Any, run: RunConfig, case: Case, ranks: Any) -> None:
    import torch

    from megaslm.training import MicroBatch

    batch = resolve_batch(run.train.global_batch_size, run.train.micro_batch_size, ranks.data_parallel_size)
    shape = (batch.micro_batch_size, run.seq_length)
    tokens = torch.randint(run.model.vocab_size, shape, device=ranks.device)
    engine.train_step([MicroBatch(tokens, tokens, None, None)] * batch.accumulation_steps, lr=1e-4)


def report(results: list[dict[str, Any]]) -> list[str]:
    header = ["layout", "estimate, MB", "measured", "ratio", "held: estimate", "measured", "ratio", "peak at"]
    rows = []
    for one in results:
        row = [one["name"]]
        for kind in ("", "held_"):
            names = (f"estimated_{kind}bytes", f"measured_{kind}bytes")
            row += [f"{one[name] / MEGABYTE:,.1f}" for name in names] + [f"{one[f'{kind}ratio']:.3f}"]
        rows.append([*row, one["moment"]])
    return table(header, rows, "<" + ">" * 6 + "<")


if __name__ == "__main__":
    run_command(main)
