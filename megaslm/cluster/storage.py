"""What a run will put on the disk, and what is free there. (How large a checkpoint is, and how many are kept:
megaslm.planning.)"""

import os
import shutil
from pathlib import Path

from megaslm.config import ModelConfig, RunConfig, with_expected_vocabulary
from megaslm.data import vocab_size_of


def model_of(run: RunConfig) -> ModelConfig | None:
    """The run's model with its vocabulary; None where only the tokenizer, which is yet to be trained, knows it.

    Raises UserError: the first token file can't be read.
    """
    if run.expected_vocab_size is not None:
        return with_expected_vocabulary(run).model
    if not run.data.train:
        return None
    return run.model.model_copy(update={"vocab_size": vocab_size_of(run.data.train[0].prefix)})


def uncounted_settings(run: RunConfig) -> list[str]:
    """Settings whose checkpoints `megaslm.planning.checkpoints_kept` does not count: how many those are, an epoch's
    length decides, which the data tells."""
    policy = run.checkpoint
    settings = {
        "checkpoint.keep_every": policy.keep_every and run.step_limit is None,
        "checkpoint.every_epoch": policy.every_epoch,
    }
    return [name for name, applies in settings.items() if applies]


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest one above it that is there; it may be a file."""
    path = Path(os.path.abspath(path))
    return next(one for one in (path, *path.parents) if one.exists())


def free_for_run(run_dir: Path) -> tuple[int, int]:
    """Bytes that may still be written where the run folder is, and those that its checkpoints take already."""
    taken = 0
    for folder, _, names in os.walk(run_dir / "checkpoints"):
        for name in names:
            try:
                taken += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue  # a run that is about to end deletes what it does not keep
    return shutil.disk_usage(existing_parent(run_dir)).free, taken
