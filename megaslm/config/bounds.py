"""Where train.compile=auto, train.float8 and train.cuda_graphs can be had, from the configs and facts of a GPU: one
answer for runs, which ask their device, and for plans, whose GPU need not be there."""

from typing import Any, Literal

from megaslm.config.engine import Precision, offloads_optimizer, zero_stage
from megaslm.config.schema import RunConfig

FLOAT8_MULTIPLE = 16  # of what the sizes of a float8 product must be (torch._scaled_mm)


def compiles(setting: bool | Literal["auto"], on_gpu: bool, stage: int) -> bool:
    """Whether train.compile=`setting` compiles under ZeRO `stage`. auto: on GPUs, where no fetch of weights breaks the
    graphs."""
    return on_gpu and stage < 3 if setting == "auto" else setting


def float8_problem(
    run: RunConfig, precision: Precision, device: str, has_float8: bool, micro_batch_size: int
) -> str | None:
    """Why train.float8, which is not off, cannot be had for micro-batches of so many sequences, and what to do; None
    where it can.

    device: its name, for people. has_float8: whether it is an NVIDIA GPU that multiplies float8 matrices.
    """
    asked = f"train.float8={run.train.float8}"
    if not has_float8:
        return (
            f"{asked} needs an NVIDIA GPU with float8 matrix products (sm_89 or later: L4, H100, H200, ...), which "
            f"{device} does not have; use train.float8=off"
        )
    if precision != "bf16":
        return f"{asked} is made for bf16, and this run is in {precision}; use train.precision=bf16"
    if run.parallel.tensor_parallel_size > 1:
        return (
            f"{asked} does not go with parallel.tensor_parallel_size={run.parallel.tensor_parallel_size}: the products "
            "of parts of a matrix have code of their own; use train.float8=off, or data parallelism alone"
        )
    model = run.model
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size": model.ffn_hidden_size,
        "model.num_heads x head_dim": model.num_heads * model.head_dim,
        "the width of queries, keys and values": (model.num_heads + 2 * model.num_kv_heads) * model.head_dim,
        "the tokens of a micro-batch": micro_batch_size * run.seq_length,
    }
    if odd := [f"{name} ({size:,})" for name, size in sizes.items() if size % FLOAT8_MULTIPLE]:
        return f"{asked} needs multiples of {FLOAT8_MULTIPLE}, which these are not: {', '.join(odd)}"
    return None


def cuda_graphs_problem(
    run: RunConfig, precision: Precision, engine_config: dict[str, Any], on_gpu: bool
) -> str | None:
    """Why train.cuda_graphs cannot be had, and what to do; None where it can. engine_config: resolved or not."""
    size, instruments = run.parallel.tensor_parallel_size, _instruments(engine_config)
    if not on_gpu:
        problem = "needs a GPU"
    elif precision != "bf16" or not _has_bf16_optimizer(engine_config):
        problem = "goes with bf16 under ZeRO-1 with fp32 accumulation alone (ds_configs/zero1.json): others do more in "
        problem += "a backward pass than compute"
    elif run.optimizer.type != "adamw":
        problem = f"does not go with optimizer.type={run.optimizer.type}: DeepSpeed's step asks Python which gradients "
        problem += "there are; use optimizer.type=adamw"
    elif engine_config.get("bf16", {}).get("immediate_grad_update"):
        problem = "does not go with bf16.immediate_grad_update of the engine config, whose hooks in Python add up and "
        problem += "release each gradient by itself"
    elif instruments:
        problem = f"does not go with {', '.join(instruments)} of the engine config: a replay runs no instrument"
    elif run.data.mask_documents:
        problem = "does not go with data.mask_documents, whose shapes vary"
    elif size > 1:
        problem = f"does not go with parallel.tensor_parallel_size={size}, which communicates within the passes"
    else:
        return None
    return f"train.cuda_graphs {problem}; use train.cuda_graphs=false"


def _has_bf16_optimizer(engine_config: dict[str, Any]) -> bool:
    """Whether DeepSpeed makes a BF16_Optimizer of it in bf16 (DeepSpeedEngine._do_optimizer_sanity_check)."""
    accumulation = engine_config.get("data_types", {}).get("grad_accum_dtype")
    return zero_stage(engine_config) == 1 and accumulation == "fp32" and not offloads_optimizer(engine_config)


def _instruments(engine_config: dict[str, Any]) -> list[str]:
    """What DeepSpeed would start and stop around the network's forward pass."""
    switches = {
        "wall_clock_breakdown": engine_config.get("wall_clock_breakdown"),
        "memory_breakdown": engine_config.get("memory_breakdown"),
        "timers.throughput": engine_config.get("timers", {}).get("throughput", {}).get("enabled"),
    }
    return [name for name, on in switches.items() if on]
