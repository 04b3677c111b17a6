"""How much a run will put on the disk, and what is free there. (How large one checkpoint is: megaslm.planning.)"""

import os
import shutil
from pathlib import Path

from megaslm.config import ModelConfig, RunConfig
from megaslm.data import vocab_size_of


def model_of(run: RunConfig) -> ModelConfig | None:
    """The run's model with its vocabulary; None where only the tokenizer, which is yet to be trained, knows it.

    Raises UserError: the first token file can't be read.
    """
    vocab_size = run.expected_vocab_size
    if vocab_size is None and run.data.train:
        vocab_size = vocab_size_of(run.data.train[0].prefix)
    return None if vocab_size is None else run.model.model_copy(update={"vocab_size": vocab_size})


def planned_checkpoints(run: RunConfig) -> int:
    """Checkpoints that lie on the disk at most, the one that is being written included.

    Where epochs alone say how long the run is, those that checkpoint.keep_every keeps for good are not counted.
    """
    config, train = run.checkpoint, run.train
    limits = [train.max_steps] if train.max_steps else []
    if train.max_tokens:
        limits.append(-(-train.max_tokens // run.tokens_per_step))
    steps = min(limits, default=None)
    kept = config.keep_last + (1 if config.keep_best else 0)
    if steps is not None and config.keep_every:
        kept += steps // config.keep_every
    saves = kept + 1
    if steps is not None:
        saves = 1 + (steps // config.interval if config.interval else 0) + (1 if config.keep_best else 0)
    return min(kept + 1, saves)


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
