#!/usr/bin/env python3
"""What a save costs, against what the machine can do with the same bytes: copied in memory, and copied on the disk.

    python tools/benchmark_checkpoint.py --preset slm_large model.num_layers=30 --directory /path/on/the/disk

The engine is a real one, after a step. In each round, one after the other: the state cloned in memory; a background
save, of which `held` is how long the training waits for it; the same bytes copied from file to file, and both on the
disk when the clock stops; a save at once. Medians and their ratios are printed; --json FILE keeps them.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from megaslm.commands import run_command
from megaslm.config import (
    default_engine_config,
    load_engine_config,
    load_run_config,
    requested_precision,
    resolve_batch,
    resolve_engine_config,
    with_expected_vocabulary,
)
from megaslm.errors import UserError

SEQ_LENGTH = 32  # of the one step, which is only there to give the optimizer its state
MIB = 2**20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="slm_small", help="of the model (slm_small)")
    parser.add_argument("--ds_config", type=Path, help="engine config (as ds_configs/zero1.json)")
    parser.add_argument("--directory", type=Path, default=Path(), help="folder on the disk to measure (this one)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each part is measured (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the preset")
    return parser.parse_intermixed_args()


def build_engine(arguments: argparse.Namespace, ranks):
    """The engine of the preset after one step on made-up tokens, the run config and the precision."""
    import torch

    from megaslm.model import build_model
    from megaslm.training import MicroBatch, TrainingEngine, preferred_precision

    overrides = [*arguments.overrides, f"data.seq_length={SEQ_LENGTH}"]
    run = with_expected_vocabulary(load_run_config(arguments.preset, overrides))
    run = run.model_copy(
        update={"train": run.train.model_copy(update={"global_batch_size": ranks.world_size, "micro_batch_size": 1})}
    )
    engine_file = load_engine_config(arguments.ds_config) if arguments.ds_config else default_engine_config()
    precision = requested_precision(engine_file, run.train.precision, auto=lambda: preferred_precision(ranks.device))
    engine_config = resolve_engine_config(
        engine_file,
        run=run,
        precision=precision,
        batch=resolve_batch(ranks.world_size, 1, ranks.world_size),
        data_parallel_size=ranks.world_size,
    )
    engine = TrainingEngine(build_model(run.model, run.train.seed, ranks.device), run, engine_config, ranks)
    tokens = torch.randint(run.model.vocab_size, (1, SEQ_LENGTH), device=ranks.device)
    engine.train_step([MicroBatch(tokens, tokens, None, None)], lr=1e-4)
    return engine, run, precision


def seconds_of(work, *arguments, **options) -> float:
    started = time.perf_counter()
    work(*arguments, **options)
    return time.perf_counter() - started


def clone(tensors: list) -> None:
    """All of them to host memory, at the same time there."""
    _ = [tensor.to("cpu", copy=True) for tensor in tensors]


def copy_to_disk(source: Path, target: Path) -> None:
    """The same bytes from file to file, and on the disk."""
    if not source.exists():
        raise UserError(f"the save in {source.parent} failed; choose a --directory with room")
    target.mkdir()
    for path in source.iterdir():
        with open(path, "rb") as read, open(target / path.name, "wb") as written:
            shutil.copyfileobj(read, written, 16 * MIB)
            written.flush()
            os.fsync(written.fileno())


def measure(engine, run, directory: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each part, by round. Collective; rank 0's clock."""
    from megaslm.checkpoint import checkpoint_name, take_snapshot
    from megaslm.parallel import host
    from megaslm.training import Saving

    def take(step: int, buffers, directory: Path = directory):
        options = {"step": step, "run_config": run.model_dump(mode="json"), "global_state": {}}
        return take_snapshot(directory, engine.deepspeed, **options, buffers=buffers)

    def save_at_once(step: int) -> None:
        take(step, None, directory / "at_once").write()

    say = print if host.rank() == 0 else lambda *_: None
    found: dict[str, list[float]] = {part: [] for part in ("clone", "held", "written", "disk copy", "save at once")}
    policy = {"keep_last": 1, "keep_every": 0, "rolling_names": False}
    background = Saving(run.checkpoint.model_copy(update=policy | {"background": True}), say, None)
    for step in range(1, rounds + 1):
        state = [piece.data for of_kind in take(step, None).pieces.values() for piece in of_kind]
        found["clone"].append(seconds_of(clone, state))
        settle()
        found["held"].append(seconds_of(background.save, step, partial(take, step), last=False))
        found["written"].append(seconds_of(background.finish_running))
        settle()
        saved = directory / checkpoint_name(step)
        found["disk copy"].append(host.on_first(partial(seconds_of, copy_to_disk, saved, directory / "copy")))
        if host.rank() == 0:
            shutil.rmtree(directory / "copy")
        settle()
        found["save at once"].append(seconds_of(save_at_once, step))
        if host.rank() == 0:
            shutil.rmtree(directory / "at_once")
        settle()
    return found


def settle() -> None:
    """Wait for all ranks, and for the disk: what one part left to write is not the next one's."""
    from megaslm.parallel import host

    os.sync()
    host.gather(None)


def main() -> None:
    arguments = parse_arguments()
    from megaslm.model import count_parameters
    from megaslm.parallel import host, init_distributed
    from megaslm.training import environment

    ranks = init_distributed()
    engine, run, precision = build_engine(arguments, ranks)
    folder = host.broadcast(tempfile.mkdtemp(dir=arguments.directory) if ranks.is_first else None)
    try:
        found = measure(engine, run, Path(folder), arguments.rounds)
    finally:
        host.gather(None)
        if ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)
    if not ranks.is_first:
        return
    medians = {part: statistics.median(values) for part, values in found.items()}
    size = 12 * count_parameters(run.model)
    print(f"{run.name}: {size / 12e6:.0f}M parameters, {size / 1e9:.2f} GB, {precision}, ranks: {ranks.world_size}")
    for part, values in found.items():
        each = ", ".join(f"{value:.2f}" for value in values)
        print(f"  {part:<13} {medians[part]:>7.2f} s {size / medians[part] / 1e6:>8,.0f} MB/s   ({each})")
    ratios = {
        "held / clone": medians["held"] / medians["clone"],
        "disk copy / save at once": medians["disk copy"] / medians["save at once"],
        "disk copy / (held + written)": medians["disk copy"] / (medians["held"] + medians["written"]),
    }
    for name, ratio in ratios.items():
        print(f"  {name:<30} {ratio:.2f}")
    if arguments.json:
        facts = environment(ranks, precision, engine.model.head.ops.backend)
        arguments.json.write_text(json.dumps({"environment": facts, "seconds": found, "ratios": ratios}, indent=2))


if __name__ == "__main__":
    run_command(main)
