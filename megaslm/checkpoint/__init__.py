"""Checkpoints free of layout: save, verify, resume and retain. The format is described in format.py."""

from megaslm.checkpoint.folder import (
    apply_retention,
    checkpoint_name,
    checkpoint_step,
    latest_sound,
    list_checkpoints,
    write_checkpoint,
)
from megaslm.checkpoint.format import Checkpoint, DamagedCheckpoint, open_checkpoint
from megaslm.checkpoint.save import check_compatible, check_engine, restore, save_checkpoint

__all__ = [
    "Checkpoint",
    "DamagedCheckpoint",
    "apply_retention",
    "check_compatible",
    "check_engine",
    "checkpoint_name",
    "checkpoint_step",
    "latest_sound",
    "list_checkpoints",
    "open_checkpoint",
    "restore",
    "save_checkpoint",
    "write_checkpoint",
]
