"""Training: the engine, the loop, schedules, metrics, evaluation."""

from megaslm.training.batches import MicroBatch, StepBatches, first_samples
from megaslm.training.clock import NO_CLOCK, DeviceClock, HostClock, StepClock
from megaslm.training.cuda_graphs import check_cuda_graphs
from megaslm.training.device import (
    check_precision,
    choose_attention,
    choose_kernels,
    device_name,
    peak_flops,
    preferred_precision,
)
from megaslm.training.engine import TrainingEngine, build_optimizer
from megaslm.training.float8 import check_float8
from megaslm.training.preparation import Options, RunData, prepare_data
from megaslm.training.report import format_count
from megaslm.training.run import build_engine, build_network, train
from megaslm.training.run_dir import code_version, environment
from megaslm.training.saving import Saving
from megaslm.training.schedule import learning_rate

__all__ = [
    "MicroBatch",
    "NO_CLOCK",
    "DeviceClock",
    "HostClock",
    "Options",
    "RunData",
    "Saving",
    "StepBatches",
    "StepClock",
    "TrainingEngine",
    "build_engine",
    "build_network",
    "build_optimizer",
    "check_cuda_graphs",
    "check_float8",
    "check_precision",
    "choose_attention",
    "choose_kernels",
    "code_version",
    "device_name",
    "environment",
    "first_samples",
    "format_count",
    "learning_rate",
    "peak_flops",
    "preferred_precision",
    "prepare_data",
    "train",
]
