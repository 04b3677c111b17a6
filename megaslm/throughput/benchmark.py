"""From cases to results: what fits, then all cases in turn, round after round.

The docstring of tools/benchmark_throughput.py defines the figures.
"""

import contextlib
import dataclasses
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from megaslm.config import zero_stage
from megaslm.errors import UserError
from megaslm.model import flops_per_token
from megaslm.parallel import uses_gpus
from megaslm.planning import LeftOut, Result
from megaslm.throughput.case import Case, divisors, names_data
from megaslm.throughput.examine import examine
from megaslm.throughput.fitting import largest_micro_batch
from megaslm.throughput.measure import PROFILED_STEPS, Measurement, measure, probe, probed
from megaslm.throughput.ranks import start_ranks
from megaslm.throughput.tokens import write_tokens

MAX_ACCUMULATION = 8
NO_GAP = 0.02  # of a step: a GPU that was busy for longer than the step by less than this was busy all the time
Say = Callable[[str], None]


@dataclass
class Progress:
    """What is known so far.

    environment: what of the machine and the versions may change a figure; empty before the machine was examined.
    found: for each case its rounds.
    left_out: for each case that failed, why.
    """

    say: Say
    environment: dict[str, Any] = field(default_factory=dict)
    found: dict[Case, list[Measurement]] = field(default_factory=dict)
    left_out: dict[Case, str] = field(default_factory=dict)

    def leave_out(self, case: Case, reason: str) -> None:
        self.left_out[case] = reason
        self.say(f"{case}: left out: {reason}")

    def attempt(self, case: Case, work: Callable[[], Any]) -> Any | None:
        """What `work` returns; None where it fails, and the case is then left out: the others go on."""
        try:
            return work()
        except torch.OutOfMemoryError as error:
            reason = f"a rank ran out of memory ({error})"
        except (ProcessRaisedException, ProcessExitedException) as error:
            self.say(str(error))
            reason = f"a rank failed: {str(error).strip().splitlines()[-1]}"
        except UserError as error:
            reason = str(error)
        self.leave_out(case, reason)
        return None

    @property
    def results(self) -> list[Result]:
        """Of the cases that went through a round at least."""
        # One rate for all cases whose products are the same: a machine drifts between processes.
        rates: dict[tuple, list[float]] = {}
        for case, of_rounds in self.found.items():
            rates.setdefault((case.precision, case.world_size), []).extend(one.matmul_flops for one in of_rounds)
        return [
            Result(**result_of(case, of_rounds, statistics.median(rates[case.precision, case.world_size])))
            for case, of_rounds in self.found.items()
            if of_rounds
        ]

    @property
    def missing(self) -> list[LeftOut]:
        return [
            LeftOut(
                preset=case.run_config().name,
                case=case.kind,
                compiled=case.compiled,
                rounds=len(self.found.get(case, [])),
                reason=reason,
            )
            for case, reason in self.left_out.items()
        ]


def run_benchmark(
    cases: list[Case],
    *,
    warm_up_steps: int,
    steps: int,
    rounds: int,
    fit: bool,
    say: Say,
    save: Callable[[Progress], None] = lambda progress: None,
    max_accumulation: int = MAX_ACCUMULATION,
) -> Progress:
    """Measure all cases on this machine, in turn, and in the opposite order in every second round.

    fit: with the largest micro-batch that fits, not the one of the case.
    say: gets lines of progress.
    save: gets what is known after every round, and when this is interrupted.
    max_accumulation: a step that is measured has at most so many micro-batches; all cases of a preset take steps of the
        same global batch, so one with a smaller micro-batch than the others' may need more.

    Raises UserError: a case that this machine or the configs do not allow, before anything is measured; all that fail.
    """
    check_cases(cases)
    world_size, on_gpus = cases[0].world_size, uses_gpus()
    progress = Progress(say)
    with token_files(cases, warm_up_steps + steps + PROFILED_STEPS) as cases:
        machine = start_ranks(examine, (cases,), world_size, on_gpus)
        progress.environment = machine.environment
        for case, reason in machine.obstacles.items():
            progress.leave_out(case, reason)
        cases = [case for case in machine.cases if case not in machine.obstacles]
        if fit:
            fitted = [fitting(case, machine.memory_limit, on_gpus, progress) for case in cases]
            cases = [case for case in fitted if case is not None]
        cases = with_common_batch(cases, max_accumulation)
        progress.found = {case: [] for case in cases}
        try:
            for turn in range(rounds):
                for case in cases if turn % 2 == 0 else cases[::-1]:
                    if case in progress.left_out:
                        continue
                    say(f"round {turn + 1} of {rounds}: {case}")
                    arguments = measure, (case, warm_up_steps, steps), world_size, on_gpus
                    one = progress.attempt(case, lambda arguments=arguments: start_ranks(*arguments))
                    progress.found[case] += [one] if one is not None else []
                save(progress)
        except KeyboardInterrupt:
            save(progress)
            raise
    if not any(progress.found.values()):
        reasons = {f"{case}: {reason}": reason for case, reason in progress.left_out.items()}
        alike = set(reasons.values())
        raise UserError(f"no case could be measured: {'; '.join(alike if len(alike) == 1 else reasons)}")
    return progress


def check_cases(cases: list[Case]) -> None:
    """Raise UserError for what the configs alone show to be wrong."""
    assert len({case.world_size for case in cases}) == 1
    presets: dict[str, str] = {}  # by the name of their run
    for case in cases:
        name = case.run_config().name
        if presets.setdefault(name, case.preset) != case.preset:
            raise UserError(
                f"--preset {presets[name]} and {case.preset} are both called {name}, by which results go: give one of "
                "them another name"
            )
        case.check()


def fitting(case: Case, limit: float, on_gpus: bool, progress: Progress) -> Case | None:
    """The case with the largest micro-batch that fits, of those that divide a rank's share of the global batch; None,
    and it is left out: none does. limit: bytes of a rank."""
    run = case.run_config()
    copies = case.copies(run)
    share = run.train.global_batch_size // copies

    def peak(size: int) -> int:
        one = probed(case, size, share // size, copies)
        found = start_ranks(probe, (one,), case.world_size, on_gpus)
        return found.get("memory_reserved_bytes", found["memory_bytes"])

    def search() -> Case:
        size = largest_micro_batch(divisors(share), peak, limit, lambda line: progress.say(f"{case}: {line}"))
        if size is None:
            advice = ["a shorter data.seq_length"]
            if not run.train.activation_checkpointing:
                advice.append("train.activation_checkpointing=true")
            if case.kind == "megaslm":
                advice.append("a higher ZeRO stage (--ds_config)")
            raise UserError(
                f"not even a micro-batch of 1 fits in {limit / 2**30:.1f} GiB of a rank: take {' or '.join(advice)}"
            )
        return dataclasses.replace(case, micro_batch_size=size)

    return progress.attempt(case, search)


def with_common_batch(cases: list[Case], max_accumulation: int) -> list[Case]:
    """The cases with the global batch of the steps to measure: of all cases of a preset the same, of which every
    micro-batch is a divisor, and for the smallest at most `max_accumulation` of them where the others let it."""
    micro_batches: dict[str, list[int]] = {}
    for case in cases:
        micro_batches.setdefault(case.preset, []).append(case.batch(case.run_config()).micro_batch_size)
    sized = []
    for case in cases:
        run, sizes = case.run_config(), micro_batches[case.preset]
        multiple = math.lcm(*sizes)
        share = run.train.global_batch_size // case.copies(run)
        share = min(share, multiple * max(1, max_accumulation * min(sizes) // multiple))
        micro = case.batch(run).micro_batch_size
        sized.append(dataclasses.replace(case, micro_batch_size=micro, global_batch_size=share * case.copies(run)))
    return sized


@contextlib.contextmanager
def token_files(cases: list[Case], steps: int) -> Iterator[list[Case]]:
    """The cases, those without data with a token file to read, which is there inside of the block."""
    with tempfile.TemporaryDirectory() as folder:
        prefixes: dict[str, str] = {}
        given = []
        for case in cases:
            run = case.run_config()
            if not names_data(run):
                if run.name not in prefixes:
                    prefixes[run.name] = str(Path(folder) / f"tokens{len(prefixes)}")
                    tokens = max(steps * run.tokens_per_step, 64 * run.seq_length)
                    write_tokens(prefixes[run.name], run.expected_vocab_size, tokens * 10 // 9)
                case = dataclasses.replace(case, token_file=prefixes[run.name])
            given.append(case)
        yield given


def result_of(case: Case, rounds: list[Measurement], matmul_flops: float) -> dict[str, Any]:
    """The figures of a case, of all rounds, as JSON values. matmul_flops: rate of a device's matrix products."""
    one = rounds[0]
    run, model, ours = one.run, one.run.model, case.kind == "megaslm"
    milliseconds = [1e3 * sum(step.values()) for found in rounds for step in found.steps]
    quartiles = statistics.quantiles(milliseconds, n=4) if len(milliseconds) > 1 else [milliseconds[0]] * 3
    ms_per_step = statistics.median(milliseconds)
    tokens_per_s = statistics.median(len(found.steps) * run.tokens_per_step / found.seconds for found in rounds)
    per_device = tokens_per_s / case.world_size
    tflops, tflops_causal = (
        flops_per_token(model, run.seq_length, causal) * per_device / 1e12 for causal in (False, True)
    )
    peak = one.peak_flops
    return {
        "preset": run.name,
        "case": case.kind,
        "compiled": one.compiled,
        "model": model.model_dump(mode="json"),
        "parameters": one.parameters,
        "seq_length": run.seq_length,
        "global_batch_size": run.train.global_batch_size,
        "run_global_batch_size": dataclasses.replace(case, global_batch_size=None).run_config().train.global_batch_size,
        "micro_batch_size": one.layout.micro_batch_size,
        "accumulation_steps": one.layout.accumulation_steps,
        "world_size": case.world_size,
        "zero_stage": zero_stage(case.engine_config()) if ours else None,
        "tensor_parallel_size": run.parallel.tensor_parallel_size,
        "activation_checkpointing": run.train.activation_checkpointing,
        "float8": run.train.float8 if ours else "off",
        "cuda_graphs": run.train.cuda_graphs and ours,
        "attention": run.train.attention,
        "precision": case.precision,
        "kernels": one.kernels,
        "steps": len(one.steps),
        "rounds": len(rounds),
        "ms_per_step": ms_per_step,
        "spread_ms": (quartiles[2] - quartiles[0]) / 2,
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_device": per_device,
        "phases_ms": phases_of(rounds, ms_per_step),
        "tflops": tflops,
        "tflops_causal": tflops_causal,
        "mfu": 1e12 * tflops / peak if peak else None,
        "mfu_causal": 1e12 * tflops_causal / peak if peak else None,
        "matmul_tflops": matmul_flops / 1e12,
        "of_matmul_rate": 1e12 * tflops / matmul_flops,
        **{name: max(found.memory[name] for found in rounds) for name in one.memory},
        "first_loss": one.first_loss,
        "last_loss": one.last_loss,
    }


def phases_of(rounds: list[Measurement], ms_per_step: float) -> dict[str, float | None]:
    """How the milliseconds of a step divide: they add up to `ms_per_step`. On a GPU with the gap, see `Result`."""
    steps = [step for found in rounds for step in found.steps]
    wall = sum(sum(step.values()) for step in steps)
    shares = {phase: sum(step[phase] for step in steps) / wall * ms_per_step for phase in steps[0]}
    if "memory_reserved_bytes" not in rounds[0].memory:
        return shares
    if any(found.busy is None for found in rounds):
        return shares | {"gap": None}
    passes = ("forward", "backward", "optimizer")
    busy = {phase: 1e3 * statistics.median(found.busy.get(phase, 0.0) for found in rounds) for phase in passes}
    total, most = sum(busy.values()), ms_per_step - shares["data"]
    if not 0 < total <= most + NO_GAP * ms_per_step:
        return shares | {"gap": None}
    scale = min(1.0, most / total)
    busy = {phase: scale * milliseconds for phase, milliseconds in busy.items()}
    return {"data": shares["data"], **busy, "gap": most - sum(busy.values())}
