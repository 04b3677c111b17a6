"""A plan as text and as JSON."""

from dataclasses import asdict
from typing import Any

from megaslm.parallel import GIB
from megaslm.planning.memory import MARGIN, fits
from megaslm.planning.plan import Choice, Plan, parameters_of, sizes_of
from megaslm.planning.scaling import INFINIBAND
from megaslm.reports import table

COLUMNS = (
    "layout", "weights", "gradients", "optimizer", "activations", "logits", "buffers", "total", "at",
    "recomputed", "at",
)  # fmt: skip
OF_SPEED = {
    "measured": "measured: {}",
    "estimated": "estimated from {}",
    "assumed": "assumed: {}",
}
WAITS = 0.5
"""A step that computes for less than this share of its time is warned of."""


def plan_lines(plan: Plan, price: float | None, command: str | None) -> list[str]:
    """The plan for people. price: of a GPU and hour, in any currency. command: that starts it, None where nothing
    fits."""
    lines = [_of_the_run(plan), "", *_memory_lines(plan), ""]
    if plan.best is None:
        return lines + _what_would_fit(plan)
    lines.append(f"recommended: {_described(plan.best)}, {_of_usable(plan, plan.best)}")
    lines += [f"  {command}"]
    if plan.cluster.nodes > 1:
        lines.append(f"  (hosts: a line `HOST slots={plan.cluster.gpus_per_node}` for each of the nodes)")
    if host := plan.best.memory.held.host:
        lines.append(
            f"host memory for what is offloaded: {_gigabytes(host)} GB for each rank, "
            f"{_gigabytes(host * plan.cluster.gpus_per_node)} GB a node"
        )
    return [*lines, *_batch_lines(plan), "", *_speed_lines(plan, price), *_disk_lines(plan)]


def _described(choice: Choice) -> str:
    layout = choice.layout
    parts = [
        f"{choice.name} ({choice.engine})",
        f"micro-batch {layout.micro_batch_size} x {layout.seq_length:,} tokens",
        f"accumulation {layout.accumulation_steps}",
        f"tensor parallelism {layout.tensor_parallel_size}",
        f"blocks {'recomputed' if layout.activation_checkpointing else 'not recomputed'}",
    ]
    return ", ".join(parts)


def _of_usable(plan: Plan, choice: Choice) -> str:
    total = choice.memory.total
    return f"{_gigabytes(total)} GB, {_gigabytes((1 + MARGIN) * total)} with {MARGIN:.0%} of margin, of " + (
        f"{_gigabytes(plan.cluster.gpu.usable_bytes)}"
    )


def _batch_lines(plan: Plan) -> list[str]:
    run, cluster = plan.run, plan.cluster
    size, asked = plan.best.layout.tensor_parallel_size, run.parallel.tensor_parallel_size
    if asked == 1 and size > 1 and run.train.global_batch_size % cluster.gpus:
        why = f"{run.train.global_batch_size} sequences do not divide among {cluster.gpus} GPUs"
    elif plan.step_seconds and plan.compute_seconds < WAITS * plan.step_seconds:
        why = f"a step of {run.train.global_batch_size} sequences waits for communication more than it computes"
    else:
        return []
    return [f"the batch is small for these GPUs ({why}): take a larger batch (train.global_batch_size) or fewer GPUs"]


def _of_the_run(plan: Plan) -> str:
    run, counts = plan.run, parameters_of(plan)
    return (
        f"{run.name}: {counts['all'] / 1e6:,.1f}M parameters, {counts['matmul'] / 1e6:,.1f}M of them in matrix "
        f"products, {counts['embedding'] / 1e6:,.1f}M in the input embedding; steps "
        f"of {run.train.global_batch_size:,} x {run.seq_length:,} tokens, {plan.steps:,} for "
        f"{plan.tokens / 1e9:,.1f}B; {plan.request.precision}"
    )


def _memory_lines(plan: Plan) -> list[str]:
    gpu, train = plan.cluster.gpu, plan.run.train
    rows = []
    for plain, recomputed in plan.choices:
        peak = plain.memory.peak
        name = f"{plain.name}, TP {plain.layout.tensor_parallel_size}, {plain.layout.micro_batch_size}"
        name += " x " + str(plain.layout.accumulation_steps)
        bytes_of = [
            peak.weights, peak.gradients, peak.optimizer, peak.activations, peak.logits, peak.buffers, peak.total,
        ]  # fmt: skip
        again = [_gigabytes(recomputed.memory.total), recomputed.memory.moment]
        rows.append([name, *map(_gigabytes, bytes_of), plain.memory.moment, *again])
    reserved = f"{_gigabytes(gpu.reserved_bytes)} GB are kept for"
    if plan.cluster.is_of_gpus:
        has = (
            f"{gpu.total_bytes / GIB:.1f} GiB as torch sees it ({_gigabytes(gpu.total_bytes)} GB), of which {reserved} "
        )
        has += "the context of CUDA, NCCL and fragments"
    else:
        has = f"{_gigabytes(gpu.total_bytes)} GB are available, of which {reserved} what else the system does"
    return [
        f"GB (10^9 bytes) of one {gpu.title} at the peak of a step, by layout (micro-batch x accumulation), the",
        "moment at which memory peaks, and the total and moment where blocks are recomputed:",
        *table(COLUMNS, rows, "<" + ">" * 7 + "<><"),
        f"{gpu.title}: {has} (assumed)",
        "what torch.compile, float8 and CUDA graphs take or save is not in it"
        + (f" (this run has train.float8={train.float8})" if train.float8 != "off" else ""),
    ]


def _speed_lines(plan: Plan, price: float | None) -> list[str]:
    if plan.best.layout.offload_optimizer:
        return ["speed: not known with offloading", ""]
    if plan.speed is None:
        return ["speed: not known for this device and precision; tools/benchmark_throughput.py measures it", ""]
    tokens_per_s = plan.run.tokens_per_step / plan.step_seconds
    note = OF_SPEED[plan.speed.kind].format(plan.speed.source)
    lines = [
        f"speed (computing {note}): {tokens_per_s:,.0f} tokens/s, {tokens_per_s / plan.cluster.gpus:,.0f} per GPU, "
        f"{plan.step_seconds:.3f} s a step, {plan.compute_seconds / plan.step_seconds:.0%} of it computing at "
        f"{plan.speed.utilization:.1%} of the {plan.best.layout.precision} peak",
        _link_line(plan),
        f"time: {plan.seconds / 86400:,.2f} days ({plan.seconds / 3600:,.1f} hours), without evaluation and saves",
    ]
    if plan.run.train.float8 != "off" and plan.speed.kind != "measured":
        lines.append("what float8 gains is not in the speed: it was not measured on this model")
    if price is not None:
        hours = plan.seconds / 3600 * plan.cluster.gpus
        lines.append(f"cost: {plan.cost(price):,.0f} for {hours:,.0f} GPU hours at {price:g}")
    return [*lines, ""]


def _link_line(plan: Plan) -> str:
    cluster = plan.cluster
    if plan.speed.has_communication:
        return "communication: in what was measured"
    if cluster.gpus == 1:
        return "communication: none"
    links = [f"{cluster.gpu.link_name} between the GPUs of a node at {cluster.gpu.ring_rate / 1e9:.0f} GB/s"]
    if cluster.nodes > 1:
        links.append(f"an InfiniBand port of {INFINIBAND / 1e9:.0f} GB/s for each GPU between nodes")
    return f"communication: computed, over {' and '.join(links)} (assumed)"


def _disk_lines(plan: Plan) -> list[str]:
    sizes = sizes_of(plan)
    lines = [
        f"disk: {_gigabytes(sizes['checkpoint'])} GB a checkpoint, {_gigabytes(sizes['checkpoints_kept'])} GB for the "
        f"{plan.checkpoints_kept} that are there at once at most, one half-written among them"
        f"{', and more for each epoch' if plan.run.checkpoint.every_epoch else ''}; Hugging Face export "
        f"in bf16 {_gigabytes(sizes['export'])} GB"
    ]
    if sizes["host_copy"]:
        lines.append(f"host memory of a node: {_gigabytes(sizes['host_copy'])} GB for the copy of a background save")
    return lines


def _what_would_fit(plan: Plan) -> list[str]:
    """What is missing, and what would help, each with its figure."""
    gpu, least = plan.cluster.gpu, plan.least
    missing = (1 + MARGIN) * least.memory.total - gpu.usable_bytes
    lines = [
        f"nothing fits: the least is {_described(least)}: {_of_usable(plan, least)} GB of one {gpu.title}, "
        f"{_gigabytes(missing)} GB too many"
    ]
    for words, choice in plan.helps:
        host = choice.memory.held.host
        also = f", with {_gigabytes(host)} GB of the host's memory for each rank" if host else ""
        lines.append(f"  {words} would fit: {_described(choice)}, {_gigabytes(choice.memory.total)} GB{also}")
    return lines if plan.helps else [*lines, "  nor would shorter sequences, more GPUs or offloading make it fit"]


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f}" if abs(count) >= 1e8 or count == 0 else f"{count / 1e9:.3f}"


def plan_json(plan: Plan, price: float | None, command: str | None) -> dict[str, Any]:
    """The plan for programs, of JSON values: bytes, seconds, tokens/s."""
    cluster = plan.cluster

    def choice(one: Choice) -> dict[str, Any]:
        memory = one.memory
        moments = {name: asdict(parts) | {"total": parts.total} for name, parts in memory.moments.items()}
        return {
            "engine_config": one.engine, **asdict(one.layout), "moments": moments, "peak": memory.moment,
            "total_bytes": memory.total, "fits": fits(memory.total, cluster.gpu),
        }  # fmt: skip

    speed = None
    if plan.speed is not None:
        speed = asdict(plan.speed) | {
            "step_seconds": plan.step_seconds, "compute_seconds": plan.compute_seconds, "seconds": plan.seconds,
            "tokens_per_s": plan.run.tokens_per_step / plan.step_seconds,
        }  # fmt: skip
    return {
        "format": 1,
        "run": plan.run.name,
        "parameters": parameters_of(plan),
        "gpu": asdict(cluster.gpu) | {"usable_bytes": cluster.gpu.usable_bytes},
        "margin": MARGIN,
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "precision": plan.request.precision,
        "tokens": plan.tokens,
        "steps": plan.steps,
        "choices": [choice(one) for pair in plan.choices for one in pair],
        "recommended": None if plan.best is None else choice(plan.best),
        "would_help": [{"change": words} | choice(one) for words, one in plan.helps],
        "command": command,
        "speed": speed,
        "price": price,
        "cost": plan.cost(price) if price is not None and speed is not None else None,
        "disk_bytes": sizes_of(plan),
    }
