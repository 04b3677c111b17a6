"""What a person reads: the header, one line per logging interval, the summary table and the curves."""

import math
import os
from pathlib import Path

import torch
from megaslm_kernels import separates_by_flash, triton_obstacle

from megaslm.config import ParallelConfig, zero_stage
from megaslm.data import TrainingData, ValidationData
from megaslm.model import DTYPES, count_parameters, flops_per_token
from megaslm.parallel import memory_used
from megaslm.training.device import device_name
from megaslm.training.metrics import read_metrics
from megaslm.training.preparation import Plan


def format_count(number: float) -> str:
    """1234567 -> 1.23M."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def format_bytes(number: float) -> str:
    """Binary units: 1.50 GiB."""
    for limit, suffix in ((2**30, "GiB"), (2**20, "MiB")):
        if number >= limit:
            return f"{number / limit:.2f} {suffix}"
    return f"{number / 2**10:.0f} KiB"


def format_duration(seconds: float) -> str:
    """3:07, 1:02:33 or 4d 01:00."""
    minutes, second = divmod(int(round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


def format_table(title: str, rows: list[tuple[str, str]]) -> str:
    """Two aligned columns under a title."""
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def header(plan: Plan, compiled: str) -> str:
    """What is about to happen, before it happens. `compiled`: how compilation went."""
    run, model, layout, ranks, data = plan.run, plan.run.model, plan.layout, plan.ranks, plan.data
    parameters = count_parameters(model)
    tokens = plan.steps * run.tokens_per_step
    flops = tokens * flops_per_token(model, run.seq_length)
    attention = f"{model.num_heads} heads of {model.head_dim}, {model.num_kv_heads} key/value"
    order = f"{run.data.order} order" + (f" from sample {run.data.first_sample:,} on" if run.data.first_sample else "")
    validation = " + ".join(f"{part.num_targets:,} {name}" + _padding(part) for name, part in data.validation.items())
    epochs = plan.steps * run.train.global_batch_size / data.training.samples_per_epoch
    rows = [
        ("parameters", f"{format_count(parameters)} ({parameters:,}), vocabulary {model.vocab_size:,}"),
        ("model", f"{model.num_layers} layers, width {model.hidden_size}, {attention}, {model.feed_forward} "
                  f"{model.ffn_hidden_size}, {model.norm}, {model.position}"),
        ("tokens", f"{format_count(tokens)} in {plan.steps:,} steps of {run.tokens_per_step:,} "
                   f"({tokens / parameters:.3g} per parameter, {epochs:.3g} epochs)"),
        ("FLOPs", f"{flops:.3g} ({flops / parameters:.3g} per parameter)"),
        ("data", f"{data.training.tokens_per_epoch:,} training tokens{_padding(data.training)} in {order}, "
                 f"{validation} targets"
                 + (", documents apart" if run.data.mask_documents else "")),
        ("layout", f"{ranks.world_size} x {device_name(ranks.device)}, ZeRO {zero_stage(plan.engine_config)}, "
                   f"micro-batch {layout.micro_batch_size} x {layout.accumulation_steps} accumulation "
                   f"x {ranks.data_parallel_size} data parallel{_model_parallel(run.parallel)}"),
        ("backends", f"kernels {plan.ops.backend}, {torch.distributed.get_backend()}, optimizer {run.optimizer.type}, "
                     f"compile {compiled}, attention {run.train.attention}, "
                     + ("CUDA graphs, " if run.train.cuda_graphs else "") + f"{ranks.num_threads} threads a rank"),
        ("precision", plan.precision + _float8(run.train.float8)),
        ("run folder", str(plan.options.run_dir)),
        # The signal reaches all ranks through this one. A Ctrl-C goes to deepspeed too, which kills after 30 s.
        ("to stop", f"kill -TERM {os.getpid()} saves and leaves; so does Ctrl-C"
                    + (", within the 30 s that the deepspeed launcher grants" if ranks.launched else "")),
    ]  # fmt: skip
    if len(data.training.weights) > 1:
        shares = ", ".join(f"{share:.4f}" for share in data.training.realised_weights)
        rows.append(("blend", f"{shares} of the samples, in the order of data.train"))
    rows += [("note", note) for note in _notes(plan, compiled)]
    return format_table(f"{run.name}: {run.description}" if run.description else run.name, rows)


def _model_parallel(parallel: ParallelConfig) -> str:
    if parallel.tensor_parallel_size == 1:
        return ""
    along = ", sequence parallel" if parallel.sequence_parallel else ""
    return f" x {parallel.tensor_parallel_size} tensor parallel{along}"


def _float8(recipe: str) -> str:
    return "" if recipe == "off" else f", products of the blocks in float8 ({recipe})"


def _padding(data: TrainingData | ValidationData) -> str:
    """How much of what the numbers of tokens of packed files count is not trained or evaluated on."""
    return f" ({100 * data.padding_share:.1f} % padding)" if data.padding_share else ""


def _notes(plan: Plan, compiled: str) -> list[str]:
    """What has no or less effect than one may think."""
    notes = []
    warmup, micro = plan.run.schedule.warmup_steps, plan.run.train.micro_batch_size
    if warmup >= plan.steps:
        notes.append(f"the warmup of {warmup:,} steps is longer than the run: the learning rate never reaches its peak")
    if plan.run.train.kernels == "auto" and plan.ranks.device.type == "cuda" and plan.ops.backend == "reference":
        notes.append(f"PyTorch's operations instead of the fused kernels: {triton_obstacle(plan.ranks.device)}")
    if plan.run.train.float8 != "off" and compiled != "every block":
        notes.append(
            "float8 without train.compile: the scaling takes kernels of its own, which cost more than is gained"
        )
    device, head_dim, dtype = plan.ranks.device, plan.run.model.head_dim, DTYPES[plan.precision]
    if plan.run.data.mask_documents and device.type == "cuda" and not separates_by_flash(device, head_dim, dtype):
        notes.append(
            "documents are kept apart by a mask; flash attention, which is faster, needs bf16 or fp16, sm_80 or later, "
            "and heads of a multiple of 8 up to 256"
        )
    size, on_a_node = plan.run.parallel.tensor_parallel_size, plan.ranks.local_world_size
    if on_a_node % size:
        notes.append(
            f"{size} tensor-parallel ranks do not lie on one node, which has {on_a_node}: every block waits for the "
            "network between nodes; prefer a parallel.tensor_parallel_size that divides the ranks of a node"
        )
    per_rank = plan.run.train.global_batch_size // plan.ranks.data_parallel_size
    if plan.layout.micro_batch_size < min(micro, per_rank):
        notes.append(
            f"micro-batch {plan.layout.micro_batch_size} instead of {micro}: the largest that divides the "
            f"{per_rank} sequences of a rank's share of the global batch"
        )
    return notes


def finished(plan: Plan, step: int) -> str:
    """The run has nothing left to do."""
    return (
        f"{plan.options.run_dir} is finished: step {step} of {plan.steps}; to go on, raise train.max_steps "
        "(or max_tokens, max_epochs), or choose another --run_dir"
    )


def dry_run_table(plan: Plan, loss: float, grad_norm: float, seconds: float) -> str:
    """What one step with the largest batch took."""
    run = plan.run
    memory = memory_used(plan.ranks.device)
    rows = [
        ("loss", f"{loss:.4f} (ln vocabulary: {math.log(run.model.vocab_size):.4f})"),
        ("grad norm", f"{grad_norm:.3f}"),
        ("memory", ", ".join(f"{key} {format_bytes(value)}" for key, value in memory.items())),
        ("FLOPs", f"{run.tokens_per_step * flops_per_token(run.model, run.seq_length):.3g} a step"),
        ("time", f"{seconds:.2f} s for the first step (with start-up costs)"),
    ]
    return format_table("dry run: one step, no run folder written", rows)


def train_line(record: dict, total_steps: int, eta_seconds: float | None) -> str:
    """The terminal's line for one interval."""
    width = len(str(total_steps))
    parts = [
        f"step {record['step']:>{width}}/{total_steps}",
        f"loss {record['loss']:.4f}",
        f"grad norm {record['grad_norm']:.3f}",
        f"lr {record['lr']:.2e}",
        f"{record['tokens_per_s']:,.0f} tokens/s",
        f"{record['tflops']:.3g} TFLOP/s",
    ]
    if record.get("mfu") is not None:
        parts.append(f"MFU {100 * record['mfu']:.1f}%")
    parts.append(f"mem {format_bytes(record['memory_bytes'])}")
    if record.get("loss_scale") is not None:
        parts.append(f"loss scale {record['loss_scale']:.0f}")
    if record.get("skipped_steps"):
        parts.append(f"skipped {record['skipped_steps']}")
    if eta_seconds is not None:
        parts.append(f"ETA {format_duration(eta_seconds)}")
    return " | ".join(parts)


def eval_line(record: dict) -> str:
    """The terminal's line for one evaluation, and one for each named set."""
    sets = record.get("sets") or {}
    width = max(map(len, sets), default=0)
    lines = [f"eval {record['step']}: {_loss(record)} in {record['seconds']:.1f} s"]
    return "\n".join([*lines, *(f"    {name:<{width}}  {_loss(part)}" for name, part in sets.items())])


def _loss(record: dict) -> str:
    bits = f" | {record['bits_per_byte']:.4f} bits/byte" if record.get("bits_per_byte") is not None else ""
    return f"loss {record['loss']:.4f} | perplexity {record['perplexity']:,.2f}{bits} | {record['targets']:,} targets"


def summary_table(summary: dict) -> str:
    """The run in a few lines."""
    rows = [
        ("steps", f"{summary['steps']:,} of {summary['total_steps']:,} ({summary['stopped_by']})"),
        ("tokens", f"{summary['tokens']:,}"),
        ("time", format_duration(summary["seconds"])),
        ("memory", format_bytes(summary["memory_bytes"])),
    ]
    if summary["train_loss"] is not None:
        rows += [
            ("tokens/s", f"{summary['tokens_per_s']:,.0f} (median of the intervals)"),
            ("training loss", f"{summary['train_loss']:.4f}"),
        ]
    if summary["validation_loss"] is not None:
        gain = 100 * (1 - summary["validation_loss"] / summary["ln_vocabulary"])
        bits = summary["bits_per_byte"]
        rows += [
            ("validation loss", f"{summary['validation_loss']:.4f} ({gain:.0f} % under ln(vocabulary) "
                                f"{summary['ln_vocabulary']:.3f})"),
            ("perplexity", f"{summary['perplexity']:,.2f}"),
            *([("bits per byte", f"{bits:.4f}")] if bits is not None else []),
            *((f"  {name}", f"{part['loss']:.4f}") for name, part in summary["validation_sets"].items()),
            ("best", f"{summary['best_validation_loss']:.4f} at step {summary['best_step']}"),
        ]  # fmt: skip
    if summary["skipped_steps"]:
        rows.append(("skipped steps", f"{summary['skipped_steps']} with a gradient that was not finite"))
    return format_table("summary", rows)


def write_curves(run_dir: Path) -> Path | None:
    """Draw loss, learning rate, gradient norm and tokens/s from metrics.jsonl into curves.png."""
    records = read_metrics(run_dir / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    evals = [r for r in records if r["kind"] == "eval"]
    if not train:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    steps = [r["step"] for r in train]
    panels = (("loss", "loss (nats)"), ("lr", "learning rate"), ("grad_norm", "gradient norm"))
    for axis, (key, label) in zip(axes.flat, (*panels, ("tokens_per_s", "tokens/s")), strict=True):
        values = [math.nan if r[key] is None else r[key] for r in train]
        axis.plot(steps, values, linewidth=1.2, label="train")
        if key == "loss" and evals:
            axis.plot([r["step"] for r in evals], [r["loss"] for r in evals], "o-", label="validation")
            for name in dict.fromkeys(name for r in evals for name in r.get("sets", {})):
                points = [(r["step"], r["sets"][name]["loss"]) for r in evals if name in r.get("sets", {})]
                axis.plot(*zip(*points, strict=True), "--", linewidth=1, label=name)
            axis.legend()
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    figure.suptitle(run_dir.name)
    path = run_dir / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
