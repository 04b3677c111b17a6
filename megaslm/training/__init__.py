"""Training: the engine, the loop, schedules, metrics, evaluation."""

from megaslm.training.batches import MicroBatch, StepBatches, first_samples
from megaslm.training.device import choose_kernels, preferred_precision
from megaslm.training.engine import TrainingEngine, build_optimizer
from megaslm.training.preparation import Options, prepare_data
from megaslm.training.report import format_count
from megaslm.training.run import build_network, train
from megaslm.training.run_dir import environment
from megaslm.training.saving import Saving
from megaslm.training.schedule import learning_rate

__all__ = [
    "MicroBatch",
    "Options",
    "Saving",
    "StepBatches",
    "TrainingEngine",
    "build_network",
    "build_optimizer",
    "choose_kernels",
    "environment",
    "first_samples",
    "format_count",
    "learning_rate",
    "preferred_precision",
    "prepare_data",
    "train",
]
