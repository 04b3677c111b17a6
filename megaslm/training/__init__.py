"""Training: the engine, the loop, schedules, metrics, evaluation."""

from megaslm.training.engine import build_optimizer
from megaslm.training.preparation import Options, prepare_data
from megaslm.training.report import format_count
from megaslm.training.run import train
from megaslm.training.schedule import learning_rate

__all__ = ["Options", "build_optimizer", "format_count", "learning_rate", "prepare_data", "train"]
