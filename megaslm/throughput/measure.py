"""One measurement: the steps of a case, in the ranks that take them.

Every kind of case reads the same windows of the same files through the loader that a run has, with the same clipping,
the same optimizer and the same constant learning rate, which moves the weights and keeps the loss from exploding; and
Python's garbage collector rests for all, as it does in a run.
"""

import gc
import time
from dataclasses import dataclass, replace

import torch

from megaslm.config import BatchLayout, RunConfig
from megaslm.model import DTYPES
from megaslm.parallel import Ranks, host, memory_used
from megaslm.throughput.case import Case
from megaslm.throughput.examine import prepare
from megaslm.throughput.matmul import matmul_flops
from megaslm.throughput.stepper import Stepper, build, kernels_of
from megaslm.throughput.trace import ProfilerClock, busy_seconds, events_of
from megaslm.training import NO_CLOCK, DeviceClock, HostClock, StepBatches, StepClock, peak_flops

LR_OF_PEAK = 0.1
PROFILED_STEPS = 1  # on a GPU, after those that are timed; a trace of more takes the host gigabytes
PROBE_STEPS, PROBE_ACCUMULATION = 2, 2


@dataclass(frozen=True)
class Measurement:
    """What the processes of one case found. All but `seconds` and the memory, which are the most of all ranks, is of
    rank 0.

    seconds: of all timed steps together.
    steps: for each timed step, seconds by phase, which add up to its wall time.
    busy: on a GPU, seconds by phase that it worked in a step; None on a CPU, and where its driver tells nothing.
    matmul_flops: FLOP/s of a rank's matrix products, all ranks at it.
    """

    run: RunConfig
    layout: BatchLayout
    parameters: int
    compiled: str
    kernels: str
    seconds: float
    steps: list[dict[str, float]]
    busy: dict[str, float] | None
    memory: dict[str, int]
    first_loss: float
    last_loss: float
    matmul_flops: float
    peak_flops: float | None


def measure(case: Case, warm_up_steps: int, steps: int) -> Measurement:
    """The steps of a case whose precision is resolved. Every rank calls this.

    Raises UserError for what a user can mend, torch.OutOfMemoryError.
    """
    run, ranks, data = prepare(case)
    layout = case.batch(run)
    stepper = build(case, run, ranks, data)
    on_gpu = ranks.device.type == "cuda"
    lr = LR_OF_PEAK * run.optimizer.lr
    clock = DeviceClock() if on_gpu else HostClock()
    total = warm_up_steps + steps + PROFILED_STEPS * on_gpu
    with StepBatches(data.training, layout, ranks, run.data.first_sample, total) as batches:
        sums = take_steps(stepper, batches, lr, warm_up_steps, NO_CLOCK)
        gc.collect()  # as in a run, once its first step is done
        gc.freeze()
        _together(ranks)
        started = time.perf_counter()
        sums += take_steps(stepper, batches, lr, steps, clock)
        if on_gpu:
            torch.cuda.synchronize(ranks.device)
        seconds = time.perf_counter() - started
        memory = memory_used(ranks.device)
        busy = _profile(stepper, batches, lr, ranks) if on_gpu else None
    of_ranks = host.gather({"seconds": seconds, **memory})
    first, last = ((loss / targets).item() for loss, targets in (ranks.sum(sums[0]), ranks.sum(sums[-1])))
    return Measurement(
        run,
        layout,
        stepper.parameters,
        stepper.compiled,
        kernels_of(case, run, ranks),
        max(one["seconds"] for one in of_ranks),
        clock.steps(),
        busy,
        {name: max(one[name] for one in of_ranks) for name in memory},
        first,
        last,
        matmul_flops(DTYPES[case.precision], ranks.device),
        peak_flops(ranks.device),
    )


def take_steps(stepper: Stepper, batches: StepBatches, lr: float, count: int, clock: StepClock) -> list[torch.Tensor]:
    """`count` steps; of each, sum of losses and number of targets of this rank. Waits for nothing."""
    sums = []
    for _ in range(count):
        clock.enter("data")
        micro_batches = batches.next()
        sums.append(stepper.step(micro_batches, lr, clock))
        clock.enter("rest")
    clock.enter("data")  # ends the last step, and begins none that is complete
    return sums


def probe(case: Case) -> dict[str, int]:
    """Two optimizer steps of the case: the peak memory (`memory_used`), the most of all ranks. Every rank calls this.

    Raises torch.OutOfMemoryError where they do not fit, and UserError for what a user can mend.
    """
    run, ranks, data = prepare(case)
    stepper = build(case, run, ranks, data)
    with StepBatches(data.training, case.batch(run), ranks, run.data.first_sample, PROBE_STEPS) as batches:
        take_steps(stepper, batches, LR_OF_PEAK * run.optimizer.lr, PROBE_STEPS, NO_CLOCK)
    _together(ranks)
    of_ranks = host.gather(memory_used(ranks.device))
    return {name: max(one[name] for one in of_ranks) for name in of_ranks[0]}


def probed(case: Case, micro_batch_size: int, accumulation_steps: int, copies: int) -> Case:
    """The case with that micro-batch. More than PROBE_ACCUMULATION of them take no more memory."""
    accumulation = max(1, min(accumulation_steps, PROBE_ACCUMULATION))
    return replace(case, micro_batch_size=micro_batch_size, global_batch_size=micro_batch_size * accumulation * copies)


def _together(ranks: Ranks) -> None:
    """Wait for the device, and for the other ranks."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    host.gather(None)


def _profile(stepper: Stepper, batches: StepBatches, lr: float, ranks: Ranks) -> dict[str, float] | None:
    """Seconds by phase that the GPU of rank 0 worked in a step, the mean of those profiled; None as `busy_seconds`. The
    other ranks take the same steps, of which nothing is kept. Collective."""
    if not ranks.is_first:
        _together(ranks)
        take_steps(stepper, batches, lr, PROFILED_STEPS, NO_CLOCK)
        _together(ranks)
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    clock = ProfilerClock()
    with torch.profiler.profile(activities=activities) as profiler:
        _together(ranks)
        take_steps(stepper, batches, lr, PROFILED_STEPS, clock)
        _together(ranks)
        clock.leave()
    busy = busy_seconds(events_of(profiler))
    return None if busy is None else {phase: seconds / PROFILED_STEPS for phase, seconds in busy.items()}
