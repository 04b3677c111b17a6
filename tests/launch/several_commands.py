"""One rank that runs launch/pretrain.py several times: starting the ranks takes longer than a tiny run.

    several_commands.py COMMANDS.json

COMMANDS.json: [{"arguments": [...], "signal": [name, step, rank], "save_restored": folder}, ...]; the signal, if any,
reaches that rank while it works on that step. With `save_restored`, the engine's state right after the restore, before
any step, is saved once more, to that folder.
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
from megaslm.parallel import init_distributed
from megaslm.training import loop, report
from megaslm.training.engine import TrainingEngine

PRETRAIN = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"


def run(arguments: list[str], rank: int, send: tuple[str, int, int] | None) -> None:
    name, at_step, to_rank = send or ("SIGTERM", -1, -1)
    train_step, steps = TrainingEngine.train_step, 0

    def train_step_and_signal(*batch):
        nonlocal steps
        steps += 1
        if steps == at_step and rank == to_rank:
            os.kill(os.getpid(), signal.Signals[name])
        return train_step(*batch)

    TrainingEngine.train_step = train_step_and_signal
    linear = torch.nn.functional.linear
    sys.argv = [str(PRETRAIN), *arguments]
    try:
        runpy.run_path(str(PRETRAIN), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        TrainingEngine.train_step = train_step
        # ZeRO-3 puts its own in the place of linear and leaves it there; in bf16 it rounds the bias otherwise, and the
        # commands after it would not be what they are in a process of their own.
        torch.nn.functional.linear = linear


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
            run(command["arguments"], ranks.rank, command.get("signal"))
    destroy_process_group()


if __name__ == "__main__":
    main()
