"""Training: the engine, the loop, schedules, metrics, evaluation."""

from megaslm.training.schedule import learning_rate
from megaslm.training.train import Options, train

__all__ = ["Options", "learning_rate", "train"]
