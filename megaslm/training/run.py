"""`train(run, ...)`: config -> data -> model -> engine -> loop, top to bottom."""

import contextlib
from collections.abc import Iterator

import torch
from megaslm_kernels import Ops

from megaslm.checkpoint import Checkpoint, check_engine, clear_leftovers
from megaslm.config import RunConfig, check_tensor_parallel, compiles, zero_stage
from megaslm.errors import UserError, first_line
from megaslm.model import DTYPES, LanguageModel, build_model
from megaslm.parallel import Ranks, check_sizes, check_tags, host, init_distributed, shard_model
from megaslm.training import report
from megaslm.training.device import choose_attention
from megaslm.training.engine import TrainingEngine, compile_blocks
from megaslm.training.float8 import check_float8, use_float8
from megaslm.training.loop import Training, dry_run
from megaslm.training.preparation import Options, Plan, make_plan
from megaslm.training.progress import Progress, conclude_late
from megaslm.training.run_dir import RunLock
from megaslm.training.start import find_checkpoint, find_weights

LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "NCCL")


def train(run: RunConfig, engine_file: dict, options: Options) -> None:
    """Train `run` under the engine config `engine_file`, continuing what `options.run_dir` holds.

    Every rank calls this. Raises UserError for what a user can mend.
    """
    joined_here = not torch.distributed.is_initialized()
    ranks = init_distributed(run.parallel.tensor_parallel_size)
    plan = make_plan(run, engine_file, options, ranks)
    with RunLock(options.run_dir) as lock:
        # Before the look at what it holds: a run that is about to end may still save there.
        host.on_first(lambda: lock.take() if options.run_dir.is_dir() and not options.dry_run else None)
        checkpoint = None if options.dry_run else find_checkpoint(plan)
        weights = find_weights(plan) if options.resume == "weights" and checkpoint is None else None
        if checkpoint is not None and checkpoint.step >= plan.steps:
            host.on_first(lambda: tidy_finished(plan, checkpoint))
            plan.say(report.finished(plan, checkpoint.step))
        else:
            with understood_errors(plan):
                engine, compiled = engine_of(plan)
                plan.say(report.header(plan, compiled))
                if options.dry_run:
                    plan.say(dry_run(plan, engine))
                else:
                    Training(plan, engine, lock, compiled).go(checkpoint, weights)
    # Only at a good end: after a failure the other ranks may be gone, and this would wait for them. A caller's group
    # stays, since DeepSpeed cannot be set up again in a process whose first group is gone.
    if joined_here:
        host.set_group(None)
        torch.distributed.destroy_process_group()


def tidy_finished(plan: Plan, checkpoint: Checkpoint) -> None:
    """What a kill after the last save left undone: no later step will do it."""
    clear_leftovers(plan.options.run_dir / "checkpoints")
    conclude_late(plan, Progress(**checkpoint.global_state["progress"]))


def engine_of(plan: Plan) -> tuple[TrainingEngine, str]:
    """`build_engine` of what is planned. Collective."""
    masked_targets = plan.data.training.ignore_repeated_eod is not None
    sizes = plan.layout.micro_batch_size, masked_targets
    return build_engine(plan.run, plan.engine_config, plan.ranks, plan.ops, plan.precision, *sizes)


def build_engine(
    run: RunConfig,
    engine_config: dict,
    ranks: Ranks,
    ops: Ops,
    precision: str,
    micro_batch_size: int,
    masked_targets: bool,
) -> tuple[TrainingEngine, str]:
    """The network of `run` inside the engine; and how compilation went, as `build_network` says it. Collective.

    engine_config: resolved, for micro-batches of `micro_batch_size` sequences.
    masked_targets: whether targets of the training data may be -100, as in `TrainingEngine`.
    Raises UserError: an option of train cannot be had here.
    """
    model, compiled = build_network(run, ranks, ops, precision, micro_batch_size, zero_stage(engine_config))
    engine = TrainingEngine(model, run, engine_config, ranks, masked_targets)
    check_engine(engine.deepspeed)
    return engine, compiled


def build_network(
    run: RunConfig, ranks: Ranks, ops: Ops, precision: str, micro_batch_size: int, stage: int
) -> tuple[LanguageModel, str]:
    """Model with its initial weights, sharded and compiled where asked for, to be trained under ZeRO `stage`; and how
    compilation went: "off", "every block" or why it fell back. Collective.

    Raises UserError: train.attention or train.float8 cannot be had here.
    """
    choose_attention(run, precision, ranks.device, ranks.tensor_parallel.size)
    model = build_model(run.model, run.train.seed, ranks.device, ops)
    shard_model(model, ranks.tensor_parallel, run.parallel.sequence_parallel)
    check_tags(model, ranks.tensor_parallel, run.parallel.sequence_parallel)
    model.decoder.activation_checkpointing = run.train.activation_checkpointing
    model.head.z_loss = run.train.z_loss
    if run.train.float8 != "off":
        check_float8(run, precision, ranks.device, micro_batch_size)
        use_float8(model, run.train.float8)
    compiled = "off"
    if compiles(run.train.compile, ranks.device.type == "cuda", stage):
        failure = compile_blocks(model, run, micro_batch_size, DTYPES[precision])
        compiled = f"fell back to eager: {failure}" if failure else "every block"
    return model, compiled


@contextlib.contextmanager
def understood_errors(plan: Plan) -> Iterator[None]:
    """Say what to do about a full device and about a rank that is gone, instead of a traceback."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "ALLOC_FAILED" in text:
            raise out_of_memory(plan, error) from error
        if plan.ranks.world_size > 1 and any(sign in text for sign in LOST_RANK):
            raise UserError(
                f"rank {plan.ranks.rank} lost its connection to another rank, which has ended; that rank's own message "
                f"says why. The same command continues from the last checkpoint. ({first_line(error)})",
                on_one_rank=True,
            ) from error
        raise


def out_of_memory(plan: Plan, error: Exception) -> UserError:
    """What to lower, in the order that costs least."""
    run, micro = plan.run, plan.layout.micro_batch_size
    size = run.parallel.tensor_parallel_size
    advice = []
    if size > 1 and not run.parallel.sequence_parallel and run.seq_length % size == 0:
        advice.append("parallel.sequence_parallel=true")
    if micro > 1:
        advice.append(f"train.micro_batch_size={micro // 2} (the global batch stays the same)")
    if not run.train.activation_checkpointing:
        advice.append("train.activation_checkpointing=true")
    if zero_stage(plan.engine_config) < 3:
        advice.append("--ds_config ds_configs/zero3.json (or zero3_offload.json)")
    advice += _more_tensor_parallel(plan)
    advice.append(f"data.seq_length={run.seq_length // 2}")
    return UserError(
        f"rank {plan.ranks.rank} ran out of memory with micro-batch {micro} x {run.seq_length} tokens; "
        f"lower: {'; '.join(advice)}. ({first_line(error)})",
        on_one_rank=True,
    )


def _more_tensor_parallel(plan: Plan) -> list[str]:
    """The next larger tensor-parallel size that the model, the engine config, the ranks of a node and the length allow,
    if there is one."""
    ranks, size = plan.ranks, plan.run.parallel.tensor_parallel_size
    for larger in range(2 * size, ranks.local_world_size + 1, size):
        with contextlib.suppress(UserError):
            check_sizes(plan.run.model, larger)
            check_tensor_parallel(plan.engine_config, larger)
            numbers = ranks.world_size, ranks.local_world_size, plan.run.seq_length
            if all(number % larger == 0 for number in numbers):
                return [f"parallel.tensor_parallel_size={larger} parallel.sequence_parallel=true"]
    return []
