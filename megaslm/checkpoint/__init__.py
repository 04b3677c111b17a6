"""Checkpoints free of layout: save, verify, resume and retain. The format is described in format.py."""

from megaslm.checkpoint.background import BackgroundSave
from megaslm.checkpoint.folder import (
    Retention,
    SaveFailed,
    apply_retention,
    checkpoint_name,
    checkpoint_step,
    latest_sound,
    list_checkpoints,
    write_checkpoint,
)
from megaslm.checkpoint.format import Checkpoint, DamagedCheckpoint, Piece, open_checkpoint
from megaslm.checkpoint.save import Snapshot, check_compatible, check_engine, restore, save_checkpoint, take_snapshot

__all__ = [
    "BackgroundSave",
    "Checkpoint",
    "DamagedCheckpoint",
    "Piece",
    "Retention",
    "SaveFailed",
    "Snapshot",
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
    "take_snapshot",
    "write_checkpoint",
]
