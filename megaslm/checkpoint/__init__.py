"""Checkpoints free of layout: save, verify, resume and retain. The format is described in format.py."""

from megaslm.checkpoint.background import BackgroundSave
from megaslm.checkpoint.buffers import HostBuffers
from megaslm.checkpoint.folder import (
    Retention,
    SaveFailed,
    apply_retention,
    checkpoint_name,
    checkpoint_step,
    clear_leftovers,
    latest_sound,
    list_checkpoints,
    write_checkpoint,
)
from megaslm.checkpoint.format import Checkpoint, DamagedCheckpoint, Piece, open_checkpoint
from megaslm.checkpoint.inspection import (
    CheckpointReport,
    Comparison,
    Contents,
    FolderReport,
    KindComparison,
    TensorStatistics,
    compare_checkpoints,
    inspect_path,
    report_json,
)
from megaslm.checkpoint.save import (
    NoHostMemory,
    Snapshot,
    check_compatible,
    check_engine,
    restore,
    save_checkpoint,
    take_snapshot,
)

__all__ = [
    "BackgroundSave",
    "Checkpoint",
    "CheckpointReport",
    "Comparison",
    "Contents",
    "DamagedCheckpoint",
    "FolderReport",
    "KindComparison",
    "HostBuffers",
    "NoHostMemory",
    "Piece",
    "Retention",
    "SaveFailed",
    "Snapshot",
    "TensorStatistics",
    "apply_retention",
    "check_compatible",
    "check_engine",
    "checkpoint_name",
    "checkpoint_step",
    "clear_leftovers",
    "compare_checkpoints",
    "inspect_path",
    "latest_sound",
    "list_checkpoints",
    "open_checkpoint",
    "report_json",
    "restore",
    "save_checkpoint",
    "take_snapshot",
    "write_checkpoint",
]
