"""Checkpoints free of layout: save, verify, resume and retain. The format is described in format.py."""

from megaslm.checkpoint.background import BackgroundSave
from megaslm.checkpoint.buffers import HostBuffers
from megaslm.checkpoint.comparison import Comparison, KindComparison, compare_checkpoints
from megaslm.checkpoint.fingerprint import (
    NUM_TOKENS,
    Fingerprint,
    FingerprintCheck,
    check_fingerprint,
    compare_fingerprints,
    take_fingerprint,
)
from megaslm.checkpoint.folder import (
    Retention,
    SaveFailed,
    apply_retention,
    checkpoint_name,
    checkpoint_step,
    clear_leftovers,
    code_versions,
    latest_sound,
    list_checkpoints,
    write_checkpoint,
)
from megaslm.checkpoint.format import WEIGHTS, Checkpoint, DamagedCheckpoint, Piece, open_checkpoint
from megaslm.checkpoint.huggingface.export import ExportResult, export_checkpoint
from megaslm.checkpoint.huggingface.families import family_of
from megaslm.checkpoint.huggingface.folder import HuggingFaceFolder
from megaslm.checkpoint.huggingface.hub import push_export, sign_in
from megaslm.checkpoint.huggingface.importing import ImportResult, import_model
from megaslm.checkpoint.huggingface.library import load_transformers
from megaslm.checkpoint.huggingface.memory import as_transformers
from megaslm.checkpoint.huggingface.parity import ExportDiffers, LogitsCheck, compare_logits
from megaslm.checkpoint.huggingface.record import EXPORT_RECORD, verify_export
from megaslm.checkpoint.inspection import (
    CheckpointReport,
    Contents,
    FolderReport,
    TensorStatistics,
    inspect_path,
    report_json,
)
from megaslm.checkpoint.opening import ModelSource, newest_checkpoint, open_model
from megaslm.checkpoint.safetensors_file import LazyTensor
from megaslm.checkpoint.save import (
    NoHostMemory,
    Snapshot,
    check_compatible,
    check_engine,
    differing_copies,
    restore,
    save_checkpoint,
    take_snapshot,
)
from megaslm.checkpoint.slices import Part

__all__ = [
    "BackgroundSave",
    "Checkpoint",
    "CheckpointReport",
    "Comparison",
    "Contents",
    "DamagedCheckpoint",
    "EXPORT_RECORD",
    "ExportDiffers",
    "ExportResult",
    "Fingerprint",
    "FingerprintCheck",
    "FolderReport",
    "HostBuffers",
    "HuggingFaceFolder",
    "ImportResult",
    "KindComparison",
    "LazyTensor",
    "LogitsCheck",
    "ModelSource",
    "NUM_TOKENS",
    "NoHostMemory",
    "Part",
    "Piece",
    "Retention",
    "SaveFailed",
    "Snapshot",
    "TensorStatistics",
    "WEIGHTS",
    "apply_retention",
    "as_transformers",
    "check_compatible",
    "check_engine",
    "check_fingerprint",
    "checkpoint_name",
    "checkpoint_step",
    "clear_leftovers",
    "code_versions",
    "compare_checkpoints",
    "compare_fingerprints",
    "compare_logits",
    "differing_copies",
    "export_checkpoint",
    "family_of",
    "import_model",
    "inspect_path",
    "latest_sound",
    "list_checkpoints",
    "load_transformers",
    "newest_checkpoint",
    "open_checkpoint",
    "open_model",
    "push_export",
    "report_json",
    "restore",
    "save_checkpoint",
    "sign_in",
    "take_fingerprint",
    "take_snapshot",
    "verify_export",
    "write_checkpoint",
]
