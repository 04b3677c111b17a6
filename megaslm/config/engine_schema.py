"""The keys of a DeepSpeed 0.19.8 engine config that megaslm takes, and those it refuses with the reason.

DeepSpeed ignores unknown keys at the top level in silence, and its own checks end in a traceback; so the tables stand
here. tests/config/test_engine_schema.py compares them with the installed DeepSpeed's, so they can't drift.
"""

from typing import Annotated, Literal, Required

from annotated_types import Ge, Gt, Le
from pydantic import BeforeValidator, ConfigDict
from typing_extensions import TypedDict

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Count = Annotated[int, Ge(0)]
Size = Annotated[int, Gt(0)]
Share = Annotated[float, Ge(0), Le(1)]
Stage = Annotated[int, Ge(0), Le(3)]
Dtype = Literal["fp32", "bf16", "fp16"]


def _not_a_number(value):
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise ValueError("must be true, false or auto")  # to Python, and so to Literal, 1 is True
    return value


Enabled = Annotated[Literal[True, False, "auto"], BeforeValidator(_not_a_number)]


class OffloadParam(TypedDict, total=False):
    __pydantic_config__ = _STRICT
    device: Required[Literal["none", "cpu", "nvme"]]
    nvme_path: str
    buffer_count: Count
    buffer_size: Count
    max_in_cpu: Count
    pin_memory: bool


class OffloadOptimizer(TypedDict, total=False):
    __pydantic_config__ = _STRICT
    device: Required[Literal["none", "cpu", "nvme"]]
    nvme_path: str
    buffer_count: Count
    pin_memory: bool
    pipeline_read: bool
    pipeline_write: bool
    fast_init: bool
    ratio: Share


class ZeroOptimization(TypedDict, total=False):
    __pydantic_config__ = _STRICT
    stage: Required[Stage]
    contiguous_gradients: bool
    reduce_scatter: bool
    reduce_bucket_size: Size
    use_multi_rank_bucket_allreduce: bool
    allgather_bucket_size: Size
    overlap_comm: bool
    offload_param: OffloadParam
    offload_optimizer: OffloadOptimizer
    sub_group_size: Size
    stage3_prefetch_bucket_size: Count
    stage3_param_persistence_threshold: Count
    stage3_model_persistence_threshold: Count
    stage3_max_live_parameters: Count
    stage3_max_reuse_distance: Count
    stage3_module_granularity_threshold: Count
    stage3_use_all_reduce_for_fetch_params: bool
    stage3_allgather_sequential: bool
    ignore_unused_parameters: bool
    round_robin_gradients: bool
    parameter_alignment: bool
    zero_hpz_partition_size: Size
    zero_quantized_weights: bool
    zero_quantized_gradients: bool
    memory_efficient_linear: bool
    override_module_apply: bool
    log_trace_cache_warnings: bool
    enable_sanity_checks: bool


class BF16(TypedDict, total=False):
    __pydantic_config__ = _STRICT
    enabled: Required[Enabled]
    immediate_grad_update: bool
    check_grad_overflow: bool


class FP16(TypedDict, total=False):
    __pydantic_config__ = _STRICT
    enabled: Required[Enabled]
    loss_scale: Annotated[float, Ge(0)]
    initial_scale_power: Count
    loss_scale_window: Size
    hysteresis: Size
    consecutive_hysteresis: bool
    min_loss_scale: Size


class DataTypes(TypedDict, total=False):
    __pydantic_config__ = _STRICT
    grad_accum_dtype: Dtype


class CommsLogger(TypedDict, total=False):
    __pydantic_config__ = _STRICT
    enabled: bool
    prof_all: bool
    prof_ops: list[str]
    verbose: bool
    debug: bool


class AsyncIO(TypedDict, total=False):
    __pydantic_config__ = _STRICT
    block_size: Size
    queue_depth: Size
    intra_op_parallelism: Size
    single_submit: bool
    overlap_events: bool
    use_gds: bool


class ThroughputTimer(TypedDict, total=False):
    __pydantic_config__ = _STRICT
    enabled: bool
    synchronized: bool


class Timers(TypedDict, total=False):
    __pydantic_config__ = _STRICT
    throughput: ThroughputTimer


class EngineConfig(TypedDict, total=False):
    __pydantic_config__ = _STRICT
    # Owned by the run config: filled in by megaslm, "auto" and equal values are fine.
    train_batch_size: Size
    train_micro_batch_size_per_gpu: Size
    gradient_accumulation_steps: Size
    gradient_clipping: Annotated[float, Ge(0)]
    # Follow from the optimizer, likewise.
    zero_force_ds_cpu_optimizer: bool
    zero_allow_untested_optimizer: bool
    # Mechanics.
    zero_optimization: ZeroOptimization
    bf16: BF16
    fp16: FP16
    data_types: DataTypes
    communication_data_type: Dtype
    prescale_gradients: bool
    gradient_predivide_factor: Annotated[float, Gt(0)]
    disable_python_gc: bool
    aio: AsyncIO
    comms_logger: CommsLogger
    timers: Timers
    steps_per_print: Size
    wall_clock_breakdown: bool
    memory_breakdown: bool
    dump_state: bool
    log_level: Literal["debug", "info", "warning", "error", "critical"]


# Keys that DeepSpeed itself no longer has; it would raise on the top-level ones.
REMOVED = {
    "amp": 'DeepSpeed removed apex amp; take the bf16 or fp16 block, or "train.precision" of the run config',
    "compression_training": "DeepSpeed removed its compression library",
    "curriculum_learning": "DeepSpeed removed this form of curriculum; the sample order is megaslm's",
    "eigenvalue": "DeepSpeed removed mixture-of-quantization",
    "elasticity": "DeepSpeed removed elastic training; a megaslm run resumes on any number of ranks",
    "graph_harvesting": "DeepSpeed removed graph harvesting",
    "nebula": "DeepSpeed removed Nebula; see checkpoint.* of the run config",
    "progressive_layer_drop": "DeepSpeed removed progressive layer dropping",
    "quantize_training": "DeepSpeed removed mixture-of-quantization",
    "sparse_attention": "DeepSpeed removed sparse attention",
    "sparse_gradients": "DeepSpeed removed sparse gradients of dense embeddings",
    "zero_optimization.mics_hierarchical_params_gather": "DeepSpeed removed MiCS",
    "zero_optimization.mics_shard_size": "DeepSpeed removed MiCS; see zero_hpz_partition_size",
    "zero_optimization.zeropp_loco_param": "DeepSpeed removed LoCo",
}

_MONITOR = "say it in the run config: logging.tensorboard, logging.wandb (metrics.jsonl is always written)"
_CHECKPOINT = "megaslm writes its own checkpoints: see checkpoint.* of the run config"
_MASTER = "megaslm keeps fp32 master weights and moments"
_DEPRECATED_OFFLOAD = 'deprecated; write "offload_optimizer": {"device": "cpu"} or "offload_param": {"device": "cpu"}'
_NO_EXPERTS = "megaslm has no experts to place"
_NO_EFFECT = "DeepSpeed 0.19.8 reads it without effect"

# Keys of DeepSpeed that would fight with megaslm's own part, or do nothing in it.
REFUSED = {
    "activation_checkpointing": "say it in the run config: train.activation_checkpointing",
    "autotuning": "megaslm does not start DeepSpeed's autotuner",
    "bfloat16": 'the block is named "bf16"',
    "checkpoint": _CHECKPOINT,
    "comet": _MONITOR,
    "compile": "say it in the run config: train.compile",
    "csv_monitor": _MONITOR,
    "data_efficiency": "megaslm reads and orders the data itself: see data.* of the run config",
    "dataloader_drop_last": "megaslm reads the data itself: see data.* of the run config",
    "datastates_ckpt": _CHECKPOINT,
    "disable_allgather": _NO_EFFECT,
    "expert_parallel": _NO_EXPERTS,
    "flops_profiler": "megaslm reports FLOPs and MFU itself, from the definition in its documentation",
    "gradient_allreduce_op": "the gradient is that of the mean over the global batch's target tokens, always",
    "hybrid_engine": "it is for reinforcement learning",
    "managed_gradient_accumulation": "megaslm counts the accumulation steps: train.global_batch_size",
    "optimizer": "say it in the run config: optimizer.*",
    "pipeline": "megaslm has no pipeline parallelism",
    "scheduler": "say it in the run config: schedule.*",
    "seq_parallel_communication_data_type": "megaslm does not use DeepSpeed's sequence parallelism",
    "sequence_parallel_size": "megaslm does not use DeepSpeed's; see parallel.sequence_parallel of the run config",
    "tensor_parallel": "say it in the run config: parallel.tensor_parallel_size",
    "tensorboard": _MONITOR,
    "torch_autocast": 'a run is in one precision; take the bf16 or fp16 block, or "train.precision" of the run config',
    "use_data_before_expert_parallelism": _NO_EXPERTS,
    "vocabulary_size": "say it in the run config: model.vocab_size",
    "wandb": _MONITOR,
    "weight_quantization": "it is for inference",
    "bf16.bf16_master_weights_and_grads": _MASTER,
    "bf16.bf16_optimizer_states": _MASTER,
    "fp16.auto_cast": "the inputs are token ids, there is nothing to cast",
    "fp16.fp16_master_weights_and_grads": _MASTER,
    "data_types.buffer_dtype": "buffers keep the dtype the model gives them",
    "data_types.keep_in_fp32_modules": "buffers keep the dtype the model gives them",
    "data_types.param_dtype": 'it follows from the bf16 and fp16 blocks and "train.precision" of the run config',
    "zero_optimization.allgather_partitions": _NO_EFFECT,
    "zero_optimization.compute_grad_norm": "the norm is clipped and reported",
    "zero_optimization.cpu_offload": _DEPRECATED_OFFLOAD,
    "zero_optimization.cpu_offload_param": _DEPRECATED_OFFLOAD,
    "zero_optimization.cpu_offload_use_pin_memory": _DEPRECATED_OFFLOAD,
    "zero_optimization.elastic_checkpoint": _CHECKPOINT,
    "zero_optimization.leaf_module": _NO_EXPERTS,
    "zero_optimization.legacy_stage1": "DeepSpeed has no legacy stage 1 any more",
    "zero_optimization.load_from_fp32_weights": _CHECKPOINT,
    "zero_optimization.pipeline_loading_checkpoint": _CHECKPOINT,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "megaslm does not use DeepSpeed's Muon",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _CHECKPOINT,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _CHECKPOINT,
    "zero_optimization.zenflow": "it replaces the optimizer, which is the run config's: optimizer.*",
    "zero_optimization.zero_quantized_nontrainable_weights": "every weight is trained",
    "zero_optimization.offload_optimizer.super_offload": "it replaces the optimizer, the run config's: optimizer.*",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "it belongs to super_offload, which megaslm refuses",
}

# Stages in which a key of zero_optimization acts, where that is not 1, 2 and 3.
STAGES = {
    "stage": (0, 1, 2, 3),
    "use_multi_rank_bucket_allreduce": (1, 2),
    "allgather_bucket_size": (1, 2),
    "ignore_unused_parameters": (1, 2),
    "round_robin_gradients": (1, 2),
    "parameter_alignment": (1, 2),
    "offload_param": (3,),
    "sub_group_size": (3,),
    "zero_hpz_partition_size": (3,),
    "zero_quantized_weights": (3,),
    "zero_quantized_gradients": (3,),
    "memory_efficient_linear": (3,),
    "override_module_apply": (3,),
    "log_trace_cache_warnings": (3,),
    "enable_sanity_checks": (3,),
    **{
        f"stage3_{name}": (3,)
        for name in (
            "prefetch_bucket_size",
            "param_persistence_threshold",
            "model_persistence_threshold",
            "max_live_parameters",
            "max_reuse_distance",
            "module_granularity_threshold",
            "use_all_reduce_for_fetch_params",
            "allgather_sequential",
        )
    },
}
