#!/usr/bin/env python3
"""How fast a network trains on this machine: the step that a run takes, and those of peers, in one run.

    python tools/benchmark_throughput.py --preset slm_tiny --compare hf,ddp
    python tools/benchmark_throughput.py --preset megaslm_125m megaslm_350m --micro_batch auto --compare hf,ddp \\
        --compile on,off --output benchmarks/throughput_h200
    python tools/benchmark_throughput.py --preset megaslm_3b --world_size 8 --ds_config ds_configs/zero2.json

It reads token files: those of data.train=PREFIX or data.input=TEXT, else some that are made for it, with the preset's
vocabulary. The peers are transformers' own model with what its Trainer does in a step (hf), and our network under
torch's DistributedDataParallel without DeepSpeed (ddp). Ranks are processes of this machine: over gloo, or over NCCL
with a GPU each.

--output BASE writes the figures to BASE.json, after every round, and at the end a picture of them to BASE.png. Where
the name begins with throughput_, as in benchmarks/, RESULTS.md beside it is made anew from all such files.

A case is a network, who trains it and how. Every case runs in new processes, all cases in turn, in the opposite order
in every second round. What one cannot do is said before anything is measured; a case that fails after that is left out,
with the reason, and the others go on; what is found by then is kept, and at Ctrl-C too. Steps are optimizer steps,
through the loader of a run and with its resting garbage collector, after some to warm up. Their global batch is the
same for all cases of a preset, and of few enough micro-batches that a step is short (--max_accumulation): the
optimizer's share is then a little larger than in the run. All cases have the same initial weights and read the same
tokens, so that their losses agree; where the first or the last one differs, it is said. Of transformers' model the
vocabulary is not padded to a multiple that suits the hardware, while ours is.

    ms/step     median of the steps of all rounds; +-: half of the range between their quartiles
    tokens/s    tokens of all timed steps over their wall time, median of the rounds; per device: over the ranks
    forward, backward, optimizer
                on a CPU, wall time from the start of one to that of the next. On a GPU, the time that it is busy with
                what was launched there (a further step under torch.profiler on rank 0; what runs side by side counts
                once, and so does a collective that waits). DeepSpeed reduces gradients in the optimizer's phase under
                ZeRO-1, in backward under ZeRO-2 and 3. transformers' forward and backward can be compared with the
                others' as a sum alone: our fused loss, that of ddp too, computes its gradient within forward
    data        wall time from asking for the micro-batches to having them; on a GPU, as its stream sees it
    gap         on a GPU, the rest of the wall time: the device waits for the host; not known where the profiler may not
                see its work, and the phases are then wall times. On a CPU called rest: the loop
    TFLOP/s     model FLOPs per token (6 for each weight in a matrix product, and attention over the full sequence;
                recomputation does not count) x tokens/s per device; causal: half of the attention
    MFU         that over the device's dense bf16 peak; left out where the peak is not known
    of matmul   TFLOP/s over the rate of a product of two large square matrices in the case's precision, measured in the
                same processes, all ranks at it; the median over all cases
    GiB         most of all ranks: peak allocated on a GPU (reserved: by the allocator for it), peak resident set of the
                process on a CPU
"""

import argparse
import sys
from pathlib import Path

from megaslm.commands import interrupt_on_termination, run_command
from megaslm.errors import UserError
from megaslm.reports import check_folder_of

WARM_UP_STEPS = 3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", nargs="+", required=True, metavar="NAME", help="the networks and their batches")
    add("--ds_config", metavar="FILE", help="engine config (default: that of a run without one, ZeRO-1)")
    add("--micro_batch", metavar="auto|N", help="sequences of a forward pass: the most that fit (auto; for each case), "
        "or N (default: as the preset says)")  # fmt: skip
    add("--compare", metavar="PEER,...", default="", help="also measure peers: hf, ddp")
    add("--compile", metavar="on,off", help="with torch.compile, without, or both (default: as train.compile says; "
        "auto: on GPUs below ZeRO-3)")  # fmt: skip
    add("--max_accumulation", type=int, default=8, metavar="N", help="micro-batches of a rank in a step, at most; more "
        "where those of a preset's cases differ by more (default: 8)")  # fmt: skip
    add("--world_size", type=int, default=1, metavar="N", help="ranks (default: 1)")
    add("--steps", type=int, default=10, metavar="N", help="steps that are timed in each round (default: 10)")
    add("--rounds", type=int, default=3, metavar="N", help="times that each case is started (default: 3)")
    add("--output", metavar="BASE", help="write BASE.json and BASE.png")
    add("overrides", nargs="*", metavar="section.key=value", help="of every preset")
    return parser.parse_intermixed_args()


def check(arguments: argparse.Namespace, gpus: int) -> None:
    """UserError for what is wrong by itself; values are made what they stand for."""
    from megaslm.throughput import PEERS

    # An option with several values takes the overrides behind it for its own.
    arguments.overrides += [word for word in arguments.preset if "=" in word]
    arguments.preset = [word for word in arguments.preset if "=" not in word]
    arguments.preset = list(dict.fromkeys(arguments.preset))
    if not arguments.preset:
        raise UserError("--preset: give the name of one, before the overrides")
    for name in ("world_size", "steps", "rounds", "max_accumulation"):
        if (value := getattr(arguments, name)) < 1:
            raise UserError(f"--{name} {value}: give 1 or more")
    arguments.compare = choices("--compare", arguments.compare, PEERS) if arguments.compare else []
    if arguments.compile is not None:
        arguments.compile = choices("--compile", arguments.compile, ("on", "off"))
    if arguments.micro_batch not in (None, "auto"):
        if not arguments.micro_batch.isdecimal() or not int(arguments.micro_batch):
            raise UserError(f"--micro_batch {arguments.micro_batch}: give auto, or a number of sequences")
    for override in arguments.overrides:
        for key, option in {"train.compile": "--compile", "train.micro_batch_size": "--micro_batch"}.items():
            given = arguments.compile if key == "train.compile" else True
            if override.startswith(f"{key}=") and given:
                raise UserError(f"{override}: this command has an option for it: {option}")
    if arguments.output:
        arguments.output = arguments.output.removesuffix(".json")
        check_folder_of(f"{arguments.output}.json", "--output")
    if gpus and arguments.world_size > gpus:
        raise UserError(f"--world_size {arguments.world_size}: this machine has {gpus} GPUs, one for each rank")


def choices(option: str, given: str, known: tuple[str, ...]) -> list[str]:
    """Words between commas, each once."""
    words = list(dict.fromkeys(word for word in given.split(",") if word))
    for word in words or [given]:
        if word not in known:
            raise UserError(f"{option} {word}: give {', '.join(known)}, or several of them with commas between")
    return words


def main() -> None:
    interrupt_on_termination()  # ends the ranks
    arguments = parse_arguments()
    from megaslm.parallel import gpus_for_ranks

    gpus = gpus_for_ranks()
    check(arguments, gpus)
    from megaslm.throughput import (
        Case,
        Progress,
        draw_results,
        result_lines,
        run_benchmark,
        write_report,
        write_results,
    )

    cases = [
        Case(
            preset,
            kind,
            compiled=compiled and compiled == "on",
            overrides=tuple(arguments.overrides),
            engine_file=arguments.ds_config,
            micro_batch_size=int(arguments.micro_batch) if arguments.micro_batch not in (None, "auto") else None,
            world_size=arguments.world_size,
        )
        for preset in arguments.preset
        for kind in ("megaslm", *arguments.compare)
        for compiled in arguments.compile or [None]
    ]
    command = ["python", "tools/benchmark_throughput.py", *sys.argv[1:]]
    options = {key: value for key, value in vars(arguments).items() if key != "output"}

    def save(progress: Progress) -> None:
        if arguments.output and (results := progress.results):
            path = Path(f"{arguments.output}.json")
            write_report(path, progress.environment | {"command": command}, options, results, progress.missing)
            if path.name.startswith("throughput_"):
                write_results(path.parent)

    progress = run_benchmark(
        cases,
        warm_up_steps=WARM_UP_STEPS,
        steps=arguments.steps,
        rounds=arguments.rounds,
        fit=arguments.micro_batch == "auto",
        say=lambda line: print(line, flush=True),
        save=save,
        max_accumulation=arguments.max_accumulation,
    )
    print("", *result_lines(progress.results, progress.missing), sep="\n")
    if arguments.output:
        facts = progress.environment
        draw_results(progress.results, f"{facts['device']}, {facts['date']}", f"{arguments.output}.png")


if __name__ == "__main__":
    run_command(main)
