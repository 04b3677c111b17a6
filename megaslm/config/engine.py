"""The engine config (`--ds_config FILE`): how to train. From a DeepSpeed JSON file to deepspeed.initialize's dict.

What the run config owns (batch sizes, clipping, optimizer, schedule, logging, checkpoints) is filled in or refused
here, never overruled in silence. Facts about DeepSpeed are those of 0.19.8, the version that setup.py asks for.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from megaslm.config.engine_schema import REFUSED, REMOVED, STAGES, EngineConfig
from megaslm.config.explain import explain, listing
from megaslm.config.load import BatchLayout, read_json_object
from megaslm.config.schema import RunConfig
from megaslm.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]

# The recipe for models of this size: one reduction per optimizer step, accumulated in fp32. The same as
# ds_configs/zero1.json (a test compares them); here so that an installed package has it too.
_DEFAULT = {
    "bf16": {"enabled": "auto"},
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {"stage": 1, "overlap_comm": False, "reduce_bucket_size": 50_000_000},
}
_OWNED_BY_RUN = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_HALF = ("bf16", "fp16")

# Keys of zero_optimization that do not go with tensor parallelism: the value that switches each off, and why. For the
# first two DeepSpeed cuts the ranks into blocks of its own, one after the other, whatever the mpu says; tensor-parallel
# ranks lie side by side, and such a block would mix the weights or gradients of different parts of the model.
_BLOCKS_OF_RANKS = "DeepSpeed 0.19.8 would group ranks that hold different parts of the model"
_NOT_WITH_TENSOR_PARALLELISM = {
    "zero_hpz_partition_size": (1, _BLOCKS_OF_RANKS),
    "zero_quantized_gradients": (False, _BLOCKS_OF_RANKS),
    "zero_quantized_weights": (False, "the numbers of the two together are not verified"),
}

# DeepSpeed's own defaults of dynamic loss scaling, written out so that the recorded engine config shows them.
_LOSS_SCALING = {
    "loss_scale": 0,  # dynamic
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "consecutive_hysteresis": False,
    "min_loss_scale": 1,
}

_adapter = TypeAdapter(EngineConfig)


def default_engine_config() -> dict[str, Any]:
    """The engine config of a run without --ds_config: ZeRO-1, bf16 where the device has it, fp32 accumulation."""
    return copy.deepcopy(_DEFAULT)


def load_engine_config(path: str | Path) -> dict[str, Any]:
    """Read and check an engine config; the result is as in the file, with "auto" still in it.

    Raises UserError that lists every mistake: missing file, broken JSON, keys that DeepSpeed does not know, has removed
    or that belong to the run config, values out of range, keys that do nothing in the chosen ZeRO stage.
    """
    raw = read_json_object(Path(path), "engine config")
    check_engine_config(raw, f"Engine config {path}")
    return raw


def check_engine_config(raw: dict[str, Any], title: str = "Engine config") -> None:
    """Raise UserError, headed by `title`, unless every key is one that megaslm hands on and every value fits."""
    checked = copy.deepcopy(raw)
    mistakes = [f"{key}: {reason}; remove it" for key, reason in {**REMOVED, **REFUSED}.items() if _pop(checked, key)]
    for key in (*_OWNED_BY_RUN, "gradient_clipping"):
        if checked.get(key) == "auto":
            del checked[key]
    try:
        _adapter.validate_python(checked)
    except ValidationError as error:
        mistakes += explain(error, EngineConfig, lambda location: "")
    else:
        mistakes += _idle_keys(checked)
        mistakes += _offload_mistakes(checked)
        if all(checked.get(half, {}).get("enabled") is True for half in _HALF):
            mistakes.append("bf16.enabled and fp16.enabled are both true; choose one")
    if mistakes:
        raise UserError(listing(title, mistakes))


def requested_precision(raw: dict[str, Any], train_precision: str, auto: Callable[[], str]) -> Precision:
    """The precision of the run: fp32, bf16 or fp16.

    A fixed `"enabled"` in the bf16 or fp16 block of the engine config decides; `train_precision` (train.precision of
    the run config) decides where that is "auto" or absent; `"bf16": {"enabled": "auto"}` alone asks `auto()`, which
    returns "bf16" or "fp32" for the device at hand. ZeRO stage 0 is fp32 only.

    Raises UserError where the two configs contradict each other, or stage 0 is asked to train in half precision.
    """
    enabled = {half: raw.get(half, {}).get("enabled") for half in _HALF}
    stage = zero_stage(raw)
    if train_precision == "auto":
        precision = next((half for half in _HALF if enabled[half] is True), None)
        if precision is None:
            precision = auto() if enabled["bf16"] == "auto" and stage > 0 else "fp32"
    else:
        precision = train_precision
        for half in _HALF:
            if isinstance(enabled[half], bool) and enabled[half] != (precision == half):
                raise UserError(
                    f"train.precision={precision} contradicts {half}.enabled = {str(enabled[half]).lower()} of the "
                    'engine config; change one of them, or write "auto" in the engine config'
                )
    assert precision in ("fp32", *_HALF), precision
    if stage == 0 and precision != "fp32":
        # Its wrapper takes an optimizer step on zero gradients at start, so Adam begins at step 1 (the first update is
        # 0.74 of what it should be), and its norm is wrong under tensor parallelism.
        raise UserError(
            f"ZeRO stage 0 in {precision}: DeepSpeed 0.19.8 starts Adam at the wrong step there, so stage 0 is for "
            f"fp32. Take ds_configs/zero1.json for {precision}, or train.precision=fp32"
        )
    return precision


def resolve_engine_config(
    raw: dict[str, Any],
    *,
    precision: Precision,
    run: RunConfig,
    batch: BatchLayout,
    data_parallel_size: int,
) -> dict[str, Any]:
    """The dict for deepspeed.initialize: `raw` with everything filled in that the run decides.

    `precision` is what `requested_precision` returned, `batch` what `resolve_batch` returned. `raw` is left as it is.
    Raises UserError where the engine config contradicts the run config, or cannot do what that asks for.
    """
    check_engine_config(raw)
    assert precision == requested_precision(raw, precision, auto=lambda: precision)
    assert run.train.global_batch_size == batch.micro_batch_size * batch.accumulation_steps * data_parallel_size
    check_tensor_parallel(raw, run.parallel.tensor_parallel_size)
    engine = copy.deepcopy(raw)
    stage = zero_stage(raw)

    _fill(engine, "train_batch_size", run.train.global_batch_size, "train.global_batch_size")
    _fill(
        engine,
        "train_micro_batch_size_per_gpu",
        batch.micro_batch_size,
        f"train.micro_batch_size {run.train.micro_batch_size} of train.global_batch_size "
        f"{run.train.global_batch_size} on {data_parallel_size} data-parallel ranks",
    )
    _fill(
        engine,
        "gradient_accumulation_steps",
        batch.accumulation_steps,
        f"train.global_batch_size {run.train.global_batch_size} in micro-batches of {batch.micro_batch_size} "
        f"on {data_parallel_size} data-parallel ranks",
    )
    # Always written: left out it means 1.0 to DeepSpeed, not off.
    _fill(engine, "gradient_clipping", run.optimizer.gradient_clipping, "optimizer.gradient_clipping")
    if stage == 0:
        # Stage 0 returns no norm, so the training code takes the norm and clips by itself; here it must be off.
        engine["gradient_clipping"] = 0.0

    engine.setdefault("zero_optimization", {"stage": 0})
    _fill_precision(engine, precision)
    _fill_optimizer(engine, run)
    engine.setdefault("wall_clock_breakdown", False)
    # DeepSpeed's throughput timer is on by default and waits for the device in every micro-step; ours does not.
    engine.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    return engine


def resolved_precision(engine: dict[str, Any]) -> Precision:
    """The precision of an engine config that `resolve_engine_config` returned."""
    return next((half for half in _HALF if engine[half]["enabled"]), "fp32")


def check_tensor_parallel(raw: dict[str, Any], size: int) -> None:
    """Raises UserError where an engine config has what does not go with `size` tensor-parallel ranks."""
    zero = raw.get("zero_optimization", {})
    for key, (off, reason) in _NOT_WITH_TENSOR_PARALLELISM.items():
        if size > 1 and zero.get(key, off) != off:
            raise UserError(
                f"Engine config: zero_optimization.{key} does not go with parallel.tensor_parallel_size={size}: "
                f"{reason}; remove it, or take parallel.tensor_parallel_size=1"
            )


def zero_stage(raw: dict[str, Any]) -> int:
    """The ZeRO stage of an engine config; 0 without a zero_optimization block, as in DeepSpeed."""
    return raw.get("zero_optimization", {}).get("stage", 0)


def offloads_optimizer(raw: dict[str, Any]) -> bool:
    """Whether the optimizer's states live in CPU memory or on NVMe."""
    return raw.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"


def _pop(config: dict[str, Any], dotted_key: str) -> bool:
    """Take a dotted key out; whether it was there."""
    *parents, name = dotted_key.split(".")
    section: Any = config
    for parent in parents:
        section = section.get(parent) if isinstance(section, dict) else None
    if not isinstance(section, dict) or name not in section:
        return False
    del section[name]
    return True


def _idle_keys(config: dict[str, Any]) -> list[str]:
    """Keys of zero_optimization that do nothing in its stage: DeepSpeed would ignore them in silence."""
    stage = zero_stage(config)
    mistakes = []
    for key in config.get("zero_optimization", {}):
        stages = STAGES.get(key, (1, 2, 3))
        if stage not in stages:
            acts = " and ".join(map(str, stages)) if len(stages) < 3 else "1, 2 and 3"
            plural = "s" if len(stages) > 1 else ""
            mistakes.append(f"zero_optimization.{key}: acts in stage{plural} {acts}, not in {stage}; remove it")
    if stage == 0 and config.get("data_types", {}).get("grad_accum_dtype", "fp32") != "fp32":
        mistakes.append("data_types.grad_accum_dtype: stage 0 accumulates in fp32, the precision it trains in")
    return mistakes


def _offload_mistakes(config: dict[str, Any]) -> list[str]:
    mistakes = []
    for block in ("offload_optimizer", "offload_param"):
        offload = config.get("zero_optimization", {}).get(block, {})
        if offload.get("device") == "nvme" and "nvme_path" not in offload:
            mistakes.append(f"zero_optimization.{block}.nvme_path: missing, must be a folder on the NVMe drive")
    if config.get("zero_optimization", {}).get("offload_optimizer", {}).get("ratio", 1) < 1 and zero_stage(config) < 3:
        mistakes.append("zero_optimization.offload_optimizer.ratio: partial offload works in stage 3 only")
    return mistakes


def _fill(engine: dict[str, Any], key: str, value: float, reason: str) -> None:
    """Write what the run config owns; an equal value or "auto" may stand there already."""
    given = engine.get(key, "auto")
    if given not in ("auto", value):
        raise UserError(
            f"Engine config: {key} = {given}, but the run config makes it {value} ({reason}). "
            f'The run config owns it: remove {key} from the engine config or write "auto"'
        )
    engine[key] = value


def _fill_precision(engine: dict[str, Any], precision: Precision) -> None:
    for half in _HALF:
        if half == precision:
            defaults = _LOSS_SCALING if half == "fp16" else {}
            engine[half] = {**defaults, **engine.get(half, {}), "enabled": True}
        else:
            engine[half] = {"enabled": False}
    accumulation = engine.get("data_types", {}).get("grad_accum_dtype")
    if accumulation not in (None, "fp32", precision):
        # DeepSpeed takes such a mix, but with different results from stage to stage.
        raise UserError(
            f"Engine config: data_types.grad_accum_dtype = {accumulation} in a {precision} run; "
            f"must be fp32{'' if precision == 'fp32' else f' or {precision}'}"
        )


def _fill_optimizer(engine: dict[str, Any], run: RunConfig) -> None:
    offload, optimizer = offloads_optimizer(engine), run.optimizer.type
    if offload and optimizer == "apex_fused_adam":
        raise UserError(
            "optimizer.type=apex_fused_adam works on the GPU, but the engine config has "
            "zero_optimization.offload_optimizer; take optimizer.type=adamw or deepspeed_cpu_adam, or do not offload"
        )
    # Without it DeepSpeed refuses to offload any optimizer but its own CPU Adam, which needs a compiler.
    if offload and optimizer == "adamw":
        _fill(engine, "zero_force_ds_cpu_optimizer", False, "offload of optimizer.type=adamw")
    # All three optimizers are on DeepSpeed's list of tested ones (apex's where apex is installed).
    if "zero_allow_untested_optimizer" in engine:
        _fill(engine, "zero_allow_untested_optimizer", False, f"optimizer.type={optimizer} is tested")
