"""One rank that runs launch/pretrain.py several times: starting the ranks takes longer than a tiny run.

    several_commands.py COMMANDS.json

COMMANDS.json: a list of commands; of their keys only the first is needed.

    arguments       of launch/pretrain.py
    signal          [name, step, rank]: it reaches that rank while it works on that step
    save_restored   folder to which the engine's state right after the restore, before any step, is saved once more
    code            the exit code of every rank, 0 if not given
    of_last_rank    arguments of the last rank, after those of all
    environment     variables, for this command alone
    spoiled         name of a parameter which the last rank changes before the first step, by itself
    stream          file that gets the number of tokens of a sequence in the residual stream of the first rank
"""

import contextlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed import destroy_process_group

from megaslm.checkpoint import restore, save_checkpoint
from megaslm.model import LanguageModel
from megaslm.parallel import init_distributed
from megaslm.training import loop, report
from megaslm.training.engine import TrainingEngine

PRETRAIN = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"


def run(command: dict, rank: int, is_last: bool) -> None:
    name, at_step, to_rank = command.get("signal") or ("SIGTERM", -1, -1)
    train_step, steps = TrainingEngine.train_step, 0

    def train_step_and_more(engine, *batch):
        nonlocal steps
        steps += 1
        if steps == at_step and rank == to_rank:
            os.kill(os.getpid(), signal.Signals[name])
        if steps == 1 and is_last and "spoiled" in command:
            engine.model.get_parameter(command["spoiled"]).data += 0.01
        if steps == 1 and rank == 0 and "stream" in command:
            watch_stream(engine.model, Path(command["stream"]))
        return train_step(engine, *batch)

    TrainingEngine.train_step = train_step_and_more
    linear = torch.nn.functional.linear
    sys.argv = [str(PRETRAIN), *command["arguments"], *(command.get("of_last_rank", []) if is_last else [])]
    before = dict(os.environ)
    os.environ.update(command.get("environment", {}))
    try:
        runpy.run_path(str(PRETRAIN), run_name="__main__")
    except SystemExit as end:
        if (end.code or 0) != command.get("code", 0):
            raise
    finally:
        os.environ.clear()
        os.environ.update(before)
        TrainingEngine.train_step = train_step
        # ZeRO-3 puts its own in the place of linear and leaves it there; in bf16 it rounds the bias otherwise, and the
        # commands after it would not be what they are in a process of their own.
        torch.nn.functional.linear = linear


def watch_stream(model: LanguageModel, file: Path) -> None:
    def note_length(module: torch.nn.Module, inputs: tuple) -> None:
        if module.training:
            file.write_text(str(inputs[0].size(1)))

    model.decoder.norm.register_forward_pre_hook(note_length)


@contextlib.contextmanager
def saving_what_is_restored(directory: str | None) -> Iterator[None]:
    def restore_and_save(checkpoint, engine, **options):
        state = restore(checkpoint, engine, **options)
        save_checkpoint(directory, engine, step=checkpoint.step, run_config=checkpoint.run_config, global_state=state)
        return state

    if directory is not None:
        loop.restore = restore_and_save
    try:
        yield
    finally:
        loop.restore = restore


def main() -> None:
    commands = json.loads(Path(sys.argv[1]).read_text())
    report.write_curves = lambda run_dir: None  # takes longer than a tiny run
    ranks = init_distributed()  # once: train() leaves a group alone that it finds
    for command in commands:
        with saving_what_is_restored(command.get("save_restored")):
            run(command, ranks.rank, ranks.rank == ranks.world_size - 1)
    destroy_process_group()


if __name__ == "__main__":
    main()
