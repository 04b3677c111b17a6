#!/usr/bin/env python3
"""What the conversion to a Hugging Face folder costs, against a copy of the same bytes on the same disk.

    python tools/benchmark_conversion.py --directory /path/on/the/disk
    torchrun --nproc_per_node 4 tools/benchmark_conversion.py ...        with a checkpoint in the pieces of four ranks

A checkpoint of made-up weights and moments is written, its model the preset with the overrides. In each round, one
after the other and in a new process each: the files of its weights copied as cp does, through one buffer, and fsynced;
the weights converted to fp32, which are the same bytes, and to bf16, the hashes of what is read and written and the
fsync included. The logits check is left out: it is work of the processor alone. The page cache lets go of the files
before each part. Medians, their ratio to the copy, the processor's time, and the memory of the conversion beside the
largest tensor are printed; --json FILE keeps them.
"""

import argparse
import multiprocessing
import os
import platform
import re
import resource
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from megaslm.commands import run_command
from megaslm.config import load_run_config
from megaslm.errors import UserError
from megaslm.reports import write_json

BUFFER = 256 * 1024  # bytes, as cp has
DTYPES = ("fp32", "bf16")  # that are converted to
TWO_GIGABYTES = ["model.num_layers=30", "model.vocab_size=32000"]  # of slm_large's weights


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="slm_large", help="of the model (slm_large)")
    parser.add_argument("--directory", type=Path, default=Path(), help="folder on the disk to measure (this one)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each part is measured (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=TWO_GIGABYTES,
        metavar="section.key=value",
        help=f"changes to the preset ({' '.join(TWO_GIGABYTES)})",
    )
    return parser.parse_intermixed_args()


def write_made_up(directory: Path, run) -> Path:
    """A checkpoint of the run's model, each rank writing an equal part of every tensor. Collective."""
    import torch

    from megaslm.checkpoint import Part, Piece, write_checkpoint
    from megaslm.model import LanguageModel
    from megaslm.parallel import Block, host

    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LanguageModel(run.model).named_parameters()}

    def piece(name: str, shape: tuple[int, ...]) -> Piece:
        numel = torch.Size(shape).numel()
        start, stop = (numel * rank // host.world_size() for rank in (host.rank(), host.rank() + 1))
        return Piece(name, shape, Part(Block.whole(shape), start, stop), torch.randn(stop - start))

    kinds = ("weights", "exp_avg", "exp_avg_sq")
    pieces = [piece(name, shape) for name, shape in shapes.items()]
    return write_checkpoint(
        directory,
        dict.fromkeys(kinds, pieces),
        step=1,
        run_config=run.model_dump(mode="json"),
        global_state={},
        optimizer={"type": "adam", "moments": list(kinds[1:]), "steps": dict.fromkeys(shapes, 1), "loss_scaler": None},
    )


def copy(checkpoint: Path, target: Path, _: str) -> None:
    """The same bytes from file to file, and on the disk."""
    target.mkdir()
    buffer = memoryview(bytearray(BUFFER))
    for path in sorted(checkpoint.glob("weights_*.safetensors")):
        with open(path, "rb", buffering=0) as read, open(target / path.name, "wb", buffering=0) as written:
            while count := read.readinto(buffer):
                written.write(buffer[:count])
            os.fsync(written.fileno())


def convert(checkpoint: Path, target: Path, dtype: str) -> None:
    """The conversion without its logits check."""
    from megaslm.checkpoint import export_checkpoint, open_model

    source = open_model(checkpoint, verify=False)
    export_checkpoint(source, target, dtype=dtype, without_tokenizer=True, check=False, report=lambda line: None)


def timed(part, checkpoint: Path, target: Path, dtype: str, results) -> None:
    """In a process of its own: seconds by the clock and of the processor, and its largest memory in bytes."""
    if part is convert:
        import megaslm.checkpoint  # noqa: F401  # which is no part of the work
    used, started = processor_seconds(), time.perf_counter()
    part(checkpoint, target, dtype)
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()  # the figure of getrusage begins with that of the parent
    results.put((seconds, processor_seconds() - used, 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])))


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def forget(folder: Path) -> None:
    """Let the page cache go of the files of a folder, and the disk finish what it was given."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def measure(checkpoint: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Figures of each part, by round."""
    context = multiprocessing.get_context("spawn")
    parts = {"copy": (copy, "fp32"), **{f"to {dtype}": (convert, dtype) for dtype in DTYPES}}
    found: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "processor_seconds": [], "memory_bytes": []} for name in parts
    }
    for _ in range(rounds):
        for name, (part, dtype) in parts.items():
            forget(checkpoint)
            results, target = context.SimpleQueue(), checkpoint.parent / "output"
            process = context.Process(target=timed, args=(part, checkpoint, target, dtype, results))
            process.start()
            process.join()
            if process.exitcode:
                raise UserError(f"the part {name!r} failed, as said above; give a --directory with room")
            for figures, value in zip(found[name].values(), results.get(), strict=True):
                figures.append(value)
            shutil.rmtree(target)
    return found


def main() -> None:
    arguments = parse_arguments()
    if not hasattr(os, "posix_fadvise"):
        raise UserError("this system has no way to empty the page cache, and not the disk would be measured: use Linux")
    run = load_run_config(arguments.preset, arguments.overrides)
    if run.model.vocab_size is None:
        raise UserError(f"the preset {run.name} takes its vocabulary from its data: give model.vocab_size=N too")
    from megaslm.checkpoint import open_checkpoint
    from megaslm.parallel import host, init_distributed

    ranks = init_distributed()
    folder = Path(host.broadcast(tempfile.mkdtemp(dir=arguments.directory) if ranks.is_first else None))
    try:
        path = write_made_up(folder, run)
        measured = host.on_first(partial(measure, path, arguments.rounds))
        shapes = open_checkpoint(path, verify=False).shapes
    finally:
        host.gather(None)
        if ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)
    if ranks.is_first:
        report(arguments, run, ranks.world_size, shapes, measured)


def report(arguments, run, world_size: int, shapes: dict, measured: dict[str, dict[str, list[float]]]) -> None:
    import torch

    sizes = [4 * torch.Size(shape).numel() for shape in shapes.values()]
    medians = {part: statistics.median(figures["seconds"]) for part, figures in measured.items()}
    print(
        f"{run.name}: {sum(sizes) / 1e9:.2f} GB of fp32 weights from {world_size} ranks, the page cache empty at the "
        "start of each part"
    )
    for part, figures in measured.items():
        each = ", ".join(f"{value:.2f}" for value in figures["seconds"])
        processor = statistics.median(figures["processor_seconds"])
        print(
            f"  {part:<8} {medians[part]:>7.2f} s {sum(sizes) / medians[part] / 1e6:>8,.0f} MB/s read, "
            f"{processor:.2f} s of the processor   ({each})"
        )
    ratios = {part: medians["copy"] / seconds for part, seconds in medians.items() if part != "copy"}
    for part, ratio in ratios.items():
        print(f"  copy / {part}   {ratio:.2f}")
    memory = max(max(figures["memory_bytes"]) for part, figures in measured.items() if part != "copy")
    print(f"  largest memory   {memory / 1e6:,.0f} MB, of which the largest tensor is {max(sizes) / 1e6:,.0f} MB")
    if arguments.json:
        figures = {
            "machine": {"system": platform.system(), "cores": os.cpu_count(), "torch": torch.__version__},
            "command": {"preset": arguments.preset, "overrides": arguments.overrides},
            "ranks": world_size,
            "bytes": sum(sizes),
            "measured": measured,
            "copy / conversion": ratios,
            "largest_tensor_bytes": max(sizes),
        }
        write_json(arguments.json, figures)


if __name__ == "__main__":
    run_command(main)
