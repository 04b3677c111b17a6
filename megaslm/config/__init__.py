"""Configuration of a run (what to train) and of the engine (how to train it). Imports neither torch nor deepspeed."""

from megaslm.config.engine import (
    default_engine_config,
    load_engine_config,
    offloads_optimizer,
    requested_precision,
    resolve_engine_config,
    zero_stage,
)
from megaslm.config.load import (
    BatchLayout,
    list_presets,
    load_run_config,
    resolve_batch,
    save_run_config,
    to_json,
)
from megaslm.config.manual import describe_fields
from megaslm.config.schema import (
    UNNAMED_SET,
    CheckpointConfig,
    DataConfig,
    DatasetConfig,
    EvalConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TokenizerConfig,
    TrainConfig,
)

__all__ = [
    "BatchLayout",
    "CheckpointConfig",
    "DataConfig",
    "DatasetConfig",
    "EvalConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "ScheduleConfig",
    "TokenizerConfig",
    "TrainConfig",
    "UNNAMED_SET",
    "default_engine_config",
    "describe_fields",
    "list_presets",
    "load_engine_config",
    "load_run_config",
    "offloads_optimizer",
    "requested_precision",
    "resolve_batch",
    "resolve_engine_config",
    "save_run_config",
    "to_json",
    "zero_stage",
]
