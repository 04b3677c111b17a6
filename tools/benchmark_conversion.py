#!/usr/bin/env python3
"""What the conversion to a Hugging Face folder costs, against a copy of the same bytes on the same disk.

    python tools/benchmark_conversion.py --directory /path/on/the/disk
    torchrun --nproc_per_node 4 tools/benchmark_conversion.py ...        with a checkpoint in the pieces of four ranks

A checkpoint of made-up weights and moments is written, its model the preset with the overrides. In each round, one
after the other and in a new process each: the files of its weights copied and fsynced; the weights converted to fp32,
which are the same bytes, the hashes of what is read and written and the fsync included. The logits check is left out:
it is work of the processor alone. The page cache lets go of the files before each part. Medians, their ratio, and the
memory of the conversion beside the largest tensor are printed; --json FILE keeps them.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from megaslm.commands import run_command
from megaslm.config import load_run_config
from megaslm.errors import UserError

MIB = 2**20
TWO_GIGABYTES = ["model.num_layers=30", "model.vocab_size=32000"]  # of slm_large's weights


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="slm_large")
    parser.add_argument("--directory", type=Path, default=Path(), help="folder on the disk to measure (this one)")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="to convert to (fp32)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument(
        "overrides", nargs="*", default=TWO_GIGABYTES, metavar="section.key=value", help=" ".join(TWO_GIGABYTES)
    )
    return parser.parse_intermixed_args()


def write_made_up(directory: Path, run) -> Path:
    """A checkpoint of the run's model, each rank writing an equal part of every tensor. Collective."""
    import torch

    from megaslm.checkpoint import Piece, write_checkpoint
    from megaslm.model import LanguageModel
    from megaslm.parallel import host

    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LanguageModel(run.model).named_parameters()}

    def piece(shape: tuple[int, ...]) -> Piece:
        numel = torch.Size(shape).numel()
        start, stop = (numel * rank // host.world_size() for rank in (host.rank(), host.rank() + 1))
        return Piece(shape, start, torch.randn(stop - start))

    kinds = ("weights", "exp_avg", "exp_avg_sq")
    pieces = {name: piece(shape) for name, shape in shapes.items()}
    return write_checkpoint(
        directory,
        dict.fromkeys(kinds, pieces),
        step=1,
        run_config=run.model_dump(mode="json"),
        global_state={},
        optimizer={"type": "adam", "moments": list(kinds[1:]), "steps": dict.fromkeys(shapes, 1), "loss_scaler": None},
    )


def copy(checkpoint: Path, target: Path, _: str, results) -> None:
    """The same bytes from file to file, and on the disk."""
    files = sorted(checkpoint.glob("weights_*.safetensors"))
    started = time.perf_counter()
    target.mkdir()
    for path in files:
        with open(path, "rb") as read, open(target / path.name, "wb") as written:
            shutil.copyfileobj(read, written, 16 * MIB)
            written.flush()
            os.fsync(written.fileno())
    results.put((time.perf_counter() - started, None))


def convert(checkpoint: Path, target: Path, dtype: str, results) -> None:
    """The conversion without its logits check, and the largest memory of its process in bytes."""
    from megaslm.checkpoint import export_checkpoint, open_model

    started = time.perf_counter()
    source = open_model(checkpoint, verify=False)
    options = {"without_tokenizer": True, "check": False, "report": lambda line: None}
    export_checkpoint(source, target, dtype=dtype, **options)
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()  # the figure of getrusage begins with that of the parent
    results.put((seconds, 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])))


def forget(folder: Path) -> None:
    """Let the page cache go of the files of a folder, and the disk finish what it was given."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def measure(checkpoint: Path, dtype: str, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of each part, by round, and the largest memory of a conversion."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[float]] = {"copy": [], "conversion": []}
    memory = 0
    for _ in range(rounds):
        for name, part in (("copy", copy), ("conversion", convert)):
            forget(checkpoint)
            results, target = context.SimpleQueue(), checkpoint.parent / "output"
            process = context.Process(target=part, args=(checkpoint, target, dtype, results))
            process.start()
            process.join()
            if process.exitcode:
                raise UserError(f"the {name} failed, as said above; give a --directory with room")
            seconds, used = results.get()
            found[name].append(seconds)
            memory = max(memory, used or 0)
            shutil.rmtree(target)
    return found, memory


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
        measured = host.on_first(partial(measure, path, arguments.dtype, arguments.rounds))
        shapes = open_checkpoint(path, verify=False).shapes
    finally:
        host.gather(None)
        if ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)
    if ranks.is_first:
        report(arguments, run, ranks.world_size, shapes, *measured)


def report(arguments, run, world_size: int, shapes: dict, seconds: dict[str, list[float]], memory: int) -> None:
    import torch

    sizes = [4 * torch.Size(shape).numel() for shape in shapes.values()]
    medians = {part: statistics.median(values) for part, values in seconds.items()}
    print(
        f"{run.name}: {sum(sizes) / 1e9:.2f} GB of weights from {world_size} ranks to {arguments.dtype}, the page "
        "cache empty at the start of each part"
    )
    for part, values in seconds.items():
        each = ", ".join(f"{value:.2f}" for value in values)
        print(f"  {part:<11} {medians[part]:>7.2f} s {sum(sizes) / medians[part] / 1e6:>8,.0f} MB/s   ({each})")
    ratio = medians["copy"] / medians["conversion"]
    print(f"  copy / conversion   {ratio:.2f}")
    print(f"  largest memory      {memory / 1e6:,.0f} MB, of which the largest tensor is {max(sizes) / 1e6:,.0f} MB")
    if arguments.json:
        figures = {
            "machine": {"system": platform.system(), "cores": os.cpu_count(), "torch": torch.__version__},
            "command": {"preset": arguments.preset, "overrides": arguments.overrides, "dtype": arguments.dtype},
            "ranks": world_size,
            "bytes": sum(sizes),
            "seconds": seconds,
            "copy / conversion": ratio,
            "memory_bytes": memory,
            "largest_tensor_bytes": max(sizes),
        }
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
