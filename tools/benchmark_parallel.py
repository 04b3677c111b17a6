#!/usr/bin/env python3
"""What parallelism costs on this machine: tensor parallelism and every ZeRO stage against one rank, in one run.

    python tools/benchmark_parallel.py                                   a small network on 1, 2 and 4 ranks
    python tools/benchmark_parallel.py --preset megaslm_1.2b --precision bf16 --world_sizes 1 8 --json FILE
    python tools/benchmark_parallel.py --paper                           the tables of docs/scaling.md; measures nothing

All layouts take the same optimizer step as a run would: the same network and global batch, on random tokens. None is
compiled, where nothing else is given: train.compile=auto would compile all on GPUs but ZeRO-3. One rank under ZeRO-1 is
what they are compared with. A round goes through all of them, each with new processes; medians over the steps of all
rounds, and the spread (half of the range between the quartiles). Printed for each layout:

    ms          wall time of a step
    CPU ms      processor time of a step, of all ranks together: the figure to look at where ranks share cores. Not on
                GPUs, where a processor that waits for its GPU counts as busy
    host ms     processor time of a step on one rank, or wall time on GPUs, of a network with as many layers and
                weights, but at widths so small that the arithmetic is next to nothing: what Python, hooks and messages
                cost, and a GPU waits for
    calls, MB   collectives of a step on one rank and what it hands to them, MB sent: what a ring then sends. In the
                data-parallel and the tensor-parallel group; by operation in the file of --json

Ranks are processes of this machine: over gloo, with one thread each, or over NCCL with a GPU each.
"""

import argparse
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megaslm.commands import interrupt_on_termination, run_command
from megaslm.config import (
    RunConfig,
    load_engine_config,
    load_run_config,
    resolve_batch,
    resolve_engine_config,
    with_expected_vocabulary,
)
from megaslm.errors import UserError
from megaslm.reports import check_folder_of, table, write_json

ROOT = Path(__file__).resolve().parents[1]
PRESET = "slm_small"
# Of the default preset: 6M parameters, whose step takes about half a second on two cores.
SHAPE = [
    "model.num_layers=4", "model.hidden_size=256", "model.head_dim=32", "model.ffn_hidden_size=1024",
    "model.vocab_size=8000", "data.seq_length=128", "train.global_batch_size=8", "train.micro_batch_size=2",
]  # fmt: skip
# Of any: as many layers and weights, and hardly anything to multiply. ZeRO-3 would not shard weights so small.
THIN = [
    "model.hidden_size=32", "model.head_dim=8", "model.ffn_hidden_size=64", "model.vocab_size=128",
    "data.seq_length=16",
]  # fmt: skip
THIN_ENGINE = {"stage3_param_persistence_threshold": 0}
DEFAULTS = {"precision": "fp32", "world_sizes": [1, 2, 4], "rounds": 3, "steps": 3}
QUICK_DEFAULTS = DEFAULTS | {"world_sizes": [1, 2], "rounds": 1, "steps": 1}
QUICK = ["model.num_layers=1", "model.hidden_size=32", "model.head_dim=4", "data.seq_length=16"]
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Arrangement:
    """A layout to measure."""

    world_size: int
    stage: int
    tensor_parallel_size: int = 1
    sequence_parallel: bool = False

    def __str__(self) -> str:
        parts = [f"{self.world_size} rank{'s' * (self.world_size > 1)}, ZeRO-{self.stage}"]
        if self.tensor_parallel_size > 1:
            parts.append(f"TP {self.tensor_parallel_size}")
        return ", ".join(parts + ["SP"] * self.sequence_parallel)

    @property
    def overrides(self) -> list[str]:
        """Of a run in this layout; its stage is that of the engine config."""
        if self.tensor_parallel_size == 1:
            return []
        switch = str(self.sequence_parallel).lower()
        return [f"parallel.tensor_parallel_size={self.tensor_parallel_size}", f"parallel.sequence_parallel={switch}"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", help=f"the network and the batch (default: {PRESET}, made smaller)")
    add("--precision", choices=("fp32", "bf16"), help="arithmetic (default: fp32)")
    add("--world_sizes", nargs="+", type=int, metavar="N", help="ranks, beside one (default: 1 2 4)")
    add("--rounds", type=int, metavar="N", help="times that each layout is started (default: 3)")
    add("--steps", type=int, metavar="N", help="steps that are timed each time (default: 3)")
    add(
        "--quick",
        action="store_true",
        help="one step of a tiny network in few layouts of 2 ranks: does it work?",
    )
    add("--paper", action="store_true", help="print the tables of docs/scaling.md and leave")
    add("--json", metavar="FILE", help="also write the figures there")
    add("overrides", nargs="*", metavar="section.key=value", help="of the preset")
    arguments = parser.parse_intermixed_args()
    if arguments.paper:
        names = ("preset", "precision", "world_sizes", "rounds", "steps", "json")
        given = [f"--{name}" for name in names if getattr(arguments, name) is not None]
        given += ["--quick"] * arguments.quick + arguments.overrides
        if given:
            raise UserError(f"--paper prints the same tables whatever is given beside it: leave out {', '.join(given)}")
        return arguments
    for name, value in (QUICK_DEFAULTS if arguments.quick else DEFAULTS).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for name, value in [
        ("rounds", arguments.rounds),
        ("steps", arguments.steps),
        *(("world_sizes", n) for n in arguments.world_sizes),
    ]:
        if value < 1:
            raise UserError(f"--{name} {value}: give 1 or more")
    if max(arguments.world_sizes) == 1:
        raise UserError("--world_sizes 1: one rank is what the others are compared with: give more")
    for override in arguments.overrides:
        if override.startswith(("parallel.", "train.precision=")):
            option = "--precision" if override.startswith("train.") else "--world_sizes"
            raise UserError(f"{override}: this command chooses the layouts and the arithmetic: see {option}")
    if arguments.json:
        check_folder_of(arguments.json, "--json")
    return arguments


def main() -> None:
    interrupt_on_termination()  # ends the ranks
    arguments = parse_arguments()
    if arguments.paper:
        from megaslm.planning import paper_tables

        print("\n".join(paper_tables()))
        return
    from megaslm.parallel import gpus_for_ranks
    from megaslm.throughput import start_ranks

    gpus = gpus_for_ranks()
    if gpus and max(arguments.world_sizes) > gpus:
        raise UserError(f"--world_sizes {max(arguments.world_sizes)}: this machine has {gpus} GPUs, one for each rank")
    overrides = [*([] if arguments.preset else SHAPE), *(QUICK if arguments.quick else []), *arguments.overrides]
    arrangements = choose_arrangements({1, *arguments.world_sizes}, arguments.precision, arguments.quick)
    for thin in ([], THIN):  # a mistake is one message, not one of every rank
        check(load(arguments.preset, [*overrides, *thin]), arrangements, "cuda" if gpus else "cpu")
    job = {"preset": arguments.preset, "overrides": overrides, "precision": arguments.precision}
    results: dict[str, dict] = {}
    for turn in range(arguments.rounds):
        for world_size in sorted({a.world_size for a in arrangements}):
            mine = [a for a in arrangements if a.world_size == world_size]
            if turn == 0:
                print(f"round 1 of {arguments.rounds}: {world_size} rank{'s' * (world_size > 1)}", flush=True)
            job |= {"arrangements": mine, "steps": arguments.steps, "counts": turn == 0}
            for found in start_ranks(measure_all, (job,), world_size, bool(gpus)):
                collect(results, found)
    summaries = [summary_of(one) for one in results.values()]
    compiled = "; ".join(sorted({one["built"]["compiled"] for one in summaries}))
    facts = environment(gpus, arguments) | summaries[0]["built"] | {"compiled": compiled}
    print("\n".join(report(load(arguments.preset, overrides), summaries, facts)))
    if arguments.json:
        options = {key: value for key, value in vars(arguments).items() if key != "json"}
        write_json(arguments.json, {"environment": facts, "options": options, "results": summaries})


def choose_arrangements(world_sizes: set[int], precision: str, quick: bool) -> list[Arrangement]:
    """One rank; and for each number of ranks every ZeRO stage, and ZeRO-1 with each tensor-parallel size; where it is
    to be quick only ZeRO-3 and the smallest size."""
    found = [Arrangement(1, 1)]
    for world_size in sorted(world_sizes - {1}):
        if quick:
            found.append(Arrangement(world_size, 3))
            found += [Arrangement(world_size, 1, 2, sequence_parallel=True)] * (world_size % 2 == 0)
            continue
        stages = (0, 1, 2, 3) if precision == "fp32" else (1, 2, 3)  # stage 0 is fp32 alone
        found += [Arrangement(world_size, stage) for stage in stages]
        sizes = [size for size in (2, 4, 8) if world_size % size == 0]
        found += [
            Arrangement(world_size, 1, size, along_sequence) for size in sizes for along_sequence in (False, True)
        ]
    return found


def load(preset: str | None, overrides: list[str]) -> RunConfig:
    return with_expected_vocabulary(load_run_config(preset or PRESET, ["train.compile=false", *overrides]))


def check(run: RunConfig, arrangements: list[Arrangement], device: str) -> None:
    """UserError for sizes that do not divide among the ranks, and kernels that do not run."""
    import torch

    from megaslm.parallel import check_sizes
    from megaslm.training import choose_kernels

    choose_kernels(run.train.kernels, torch.device(device))
    for one in arrangements:
        check_sizes(run.model, one.tensor_parallel_size)
        ranks = one.world_size // one.tensor_parallel_size
        resolve_batch(run.train.global_batch_size, run.train.micro_batch_size, ranks)
        if one.sequence_parallel and run.seq_length % one.tensor_parallel_size:
            raise UserError(f"{one}: data.seq_length {run.seq_length} is no multiple of {one.tensor_parallel_size}")


def measure_all(job: dict[str, Any]) -> list[dict[str, Any]]:
    """One rank: every layout of `job`, one after the other."""
    found = []
    for arrangement in job["arrangements"]:
        one, thin = (
            measure(load(job["preset"], [*job["overrides"], *extra, *arrangement.overrides]), arrangement, job, zero)
            for extra, zero in (([], {}), (THIN, THIN_ENGINE if arrangement.stage == 3 else {}))
        )
        host = [statistics.mean(of_ranks) for of_ranks in thin["cpu_seconds"]] or thin["seconds"]
        found.append({"arrangement": asdict(arrangement), **one, "host_seconds": host})
    return found


def measure(run: RunConfig, arrangement: Arrangement, job: dict[str, Any], zero: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step, processor seconds of each step on every rank (none on GPUs), the traffic of one step
    where `job` asks for counts, and what the network was built with.

    zero: goes into zero_optimization of the engine config of ds_configs/.
    traffic: [operation, group, calls, bytes, bytes sent], of the groups "data" and "tensor". Collective.
    """
    import torch

    from megaslm.parallel import count_traffic, host, init_distributed, wire_bytes
    from megaslm.training import TrainingEngine, build_network, choose_kernels

    ranks = init_distributed(arrangement.tensor_parallel_size)
    on_gpus = ranks.device.type == "cuda"
    if not on_gpus:
        torch.set_num_threads(1)  # those that wait for others spin, which would count as work
    batch = resolve_batch(run.train.global_batch_size, run.train.micro_batch_size, ranks.data_parallel_size)
    engine_config = load_engine_config(ROOT / f"ds_configs/zero{arrangement.stage}.json")
    engine_config["zero_optimization"] |= zero
    engine_config = resolve_engine_config(
        engine_config, run=run, precision=job["precision"], batch=batch, data_parallel_size=ranks.data_parallel_size
    )
    ops = choose_kernels(run.train.kernels, ranks.device)
    model, compiled = build_network(run, ranks, ops, job["precision"], batch.micro_batch_size, arrangement.stage)
    engine = TrainingEngine(model, run, engine_config, ranks)
    batches = [random_batch(run, batch.micro_batch_size, ranks.device)] * batch.accumulation_steps

    def step() -> tuple[float, float]:
        host.gather(None)  # together
        started, worked = time.perf_counter(), time.process_time()
        engine.train_step(batches, lr=1e-4)
        if on_gpus:
            torch.cuda.synchronize()
        return time.perf_counter() - started, time.process_time() - worked

    for _ in range(WARM_UP_STEPS):
        step()
    timed = host.gather([step() for _ in range(job["steps"])])
    with count_traffic(tensor=ranks.tensor_parallel, data=ranks.data_parallel) as traffic:
        if job["counts"]:
            engine.train_step(batches, lr=1e-4)
    engine.deepspeed.destroy()
    steps = list(zip(*timed, strict=True))
    return {
        "seconds": [max(seconds for seconds, _ in of_ranks) for of_ranks in steps],
        "cpu_seconds": [] if on_gpus else [[worked for _, worked in of_ranks] for of_ranks in steps],
        "traffic": [
            [operation, group, *count, wire_bytes(operation, traffic.sizes[group], count.bytes)]
            for (operation, group), count in sorted(traffic.counts.items())
            if group in ("data", "tensor") and traffic.sizes[group] > 1
        ],
        "built": {"kernels": ops.backend, "collectives": torch.distributed.get_backend(), "compiled": compiled},
    }


def random_batch(run: RunConfig, micro_batch_size: int, device: Any) -> Any:
    """A micro-batch, of which each sequence is a document where data.mask_documents keeps them apart."""
    import torch

    from megaslm.training import MicroBatch

    tokens = torch.randint(run.model.vocab_size, (micro_batch_size, run.seq_length), device=device)
    if not run.data.mask_documents:
        return MicroBatch(tokens, tokens, None, None)
    positions = torch.arange(run.seq_length, dtype=torch.int32, device=device).repeat(micro_batch_size, 1)
    return MicroBatch(tokens, tokens, positions, micro_batch_size)


def collect(results: dict[str, dict], found: dict[str, Any]) -> None:
    """Add a round's figures of a layout to those before."""
    lists = ("seconds", "cpu_seconds", "host_seconds")
    one = results.setdefault(str(Arrangement(**found["arrangement"])), found | {key: [] for key in lists})
    for key in lists:
        one[key] += found[key]


def summary_of(one: dict[str, Any]) -> dict[str, Any]:
    """Medians in ms; the processor time of all ranks together (None on GPUs), and of the host that of one."""
    milliseconds = [1000 * value for value in one["seconds"]]
    quartiles = statistics.quantiles(milliseconds, n=4) if len(milliseconds) > 1 else [milliseconds[0]] * 3
    rows = one["traffic"]
    return one | {
        "layout": str(Arrangement(**one["arrangement"])),
        "ms": statistics.median(milliseconds),
        "spread_ms": (quartiles[2] - quartiles[0]) / 2,
        "cpu_ms": 1000 * statistics.median(map(sum, one["cpu_seconds"])) if one["cpu_seconds"] else None,
        "host_ms": 1000 * statistics.median(one["host_seconds"]),
        "calls": sum(row[2] for row in rows),
        "bytes": sum(row[3] for row in rows),
        "sent_bytes": sum(row[4] for row in rows),
    }


def report(run: RunConfig, summaries: list[dict[str, Any]], facts: dict[str, Any]) -> list[str]:
    from megaslm.model import count_parameters

    base = summaries[0]
    header = ["layout", "ms", "+-", "ratio", *([] if facts["gpus"] else ["CPU ms", "ratio"]), "host ms", "calls", "MB"]
    header.append("MB sent")
    rows = []
    for one in summaries:
        cells = [one["layout"], f"{one['ms']:,.1f}", f"{one['spread_ms']:.1f}", f"{one['ms'] / base['ms']:.2f}"]
        if not facts["gpus"]:
            cells += [f"{one['cpu_ms']:,.1f}", f"{one['cpu_ms'] / base['cpu_ms']:.2f}"]
        cells += [f"{one['host_ms']:.1f}", str(one["calls"])]
        rows.append(cells + [f"{one[key] / 1e6:,.2f}" for key in ("bytes", "sent_bytes")])
    lines = [
        f"{run.name}, {count_parameters(run.model) / 1e6:.1f}M parameters, steps of {run.train.global_batch_size} x "
        f"{run.seq_length} tokens, {facts['precision']}; kernels {facts['kernels']}, compiled {facts['compiled']}",
        f"{facts['device']}, {facts['collectives']}, torch {facts['torch']}, deepspeed {facts['deepspeed']}",
        *table(header, rows, "<" + ">" * (len(header) - 1)),
    ]
    most = max(one["arrangement"]["world_size"] for one in summaries)
    if not facts["gpus"]:
        lines.append(f"Each rank has one thread, on {facts['cores']} cores.")
        if most > facts["cores"]:
            lines.append(f"{most} ranks take turns on them: there, compare CPU ms, not ms.")
    return lines


def environment(gpus: int, arguments: argparse.Namespace) -> dict[str, Any]:
    from importlib.metadata import version

    import torch

    from megaslm.parallel import available_cores

    return {
        "device": torch.cuda.get_device_name(0) if gpus else torch.backends.cpu.get_cpu_capability(),
        "gpus": gpus,
        "cores": available_cores(),
        "precision": arguments.precision,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
    }


if __name__ == "__main__":
    run_command(main)
