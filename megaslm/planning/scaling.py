"""Step times on paper: compute and communication of a run on nodes of GPUs, and the layout to take.

Computed from formulas and the assumptions that are the constants here: nothing of it was measured. docs/scaling.md has
the tables, and says what they are good for.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megaslm.config import RunConfig, load_run_config, resolve_batch, with_expected_vocabulary
from megaslm.errors import UserError
from megaslm.model import count_parameters, flops_per_token
from megaslm.parallel import Collective, Layout, check_sizes, step_collectives, wire_bytes
from megaslm.planning.cluster import Cluster
from megaslm.planning.memory import fits, memory_estimate, state_bytes

PRESETS = ("megaslm_125m", "megaslm_350m", "megaslm_760m", "megaslm_1.2b", "megaslm_3b", "neox_1.2b", "sab_3b")
NODES = (1, 2, 4, 8, 16, 32, 64)
TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)

UTILIZATION = 0.40
"""Assumed share of the peak that a step reaches while it computes, by the definition of flops_per_token."""
INFINIBAND = 46e9
"""Bytes/s that a GPU's own NDR port sends: of 50e9, what NCCL gets (nccl-tests issue 290)."""
TIMES = (
    "nodes", "state, GB", "compute", "Z1", "Z2", "Z3", "TP 2", "TP 4", "TP 8", "step", "computing", "recommended",
)  # fmt: skip
VOLUMES = ("preset", "Z1", "Z2", "Z3", "Z1, port", "TP 2", "TP 4", "TP 8")
RECOMPUTATION = 4 / 3
"""Work of a step whose blocks are recomputed: the forward pass once more."""
CALL_SECONDS = {"node": 20e-6, "network": 50e-6}
"""Assumed time of a collective on almost nothing. On two nodes 46 us were measured (nccl issue 1244)."""
HOP_SECONDS = {"rank": 1e-6, "node": 5e-6}
"""Assumed time that each rank and each node adds to a gather or scatter between nodes: NCCL sends them round a ring
(arXiv:2506.20252), while its all-reduces climb a tree."""
DOUBLING_GAINS = 0.9
"""Twice the nodes are recommended where a step takes at most this share of the time."""
WORTH_IT = 0.95
"""A larger tensor-parallel size is recommended where it takes at most this share of the time: less is no difference."""


@dataclass(frozen=True)
class Estimate:
    """One optimizer step in one layout. Seconds are not taken to overlap: `total` is their sum."""

    layout: Layout
    compute: float
    tensor_parallel: float
    zero: float
    state_bytes: float
    memory_bytes: float

    @property
    def communication(self) -> float:
        return self.tensor_parallel + self.zero

    @property
    def total(self) -> float:
        return self.compute + self.communication


def estimate(run: RunConfig, cluster: Cluster, tensor_parallel_size: int = 1, zero_stage: int = 1) -> Estimate | None:
    """A step of `run`, whose vocabulary is known, in bf16 (fp32 in stage 0); above size 1 with
    sequence parallelism.

    None where the layout is not possible: sizes that do not divide, or fewer sequences than data-parallel ranks.
    """
    ranks = cluster.gpus // tensor_parallel_size
    try:
        check_sizes(run.model, tensor_parallel_size)
        batch = resolve_batch(run.train.global_batch_size, run.train.micro_batch_size, ranks)
    except UserError:
        return None
    layout = Layout(
        micro_batch_size=batch.micro_batch_size,
        accumulation_steps=batch.accumulation_steps,
        seq_length=run.seq_length,
        data_parallel_size=ranks,
        tensor_parallel_size=tensor_parallel_size,
        sequence_parallel=tensor_parallel_size > 1,
        zero_stage=zero_stage,
        activation_checkpointing=run.train.activation_checkpointing,
        precision="bf16" if zero_stage else "fp32",
    )
    return estimate_layout(run, layout, cluster)


def estimate_layout(run: RunConfig, layout: Layout, cluster: Cluster, utilization: float = UTILIZATION) -> Estimate:
    """A step of `run` in that layout, on GPUs whose peak is known. utilization: share of that peak that they compute at
    (recomputation counted as work), by the definition of flops_per_token."""
    flops = flops_per_token(run.model, run.seq_length) * run.tokens_per_step
    if layout.activation_checkpointing:
        flops *= RECOMPUTATION
    seconds = {"tensor": 0.0, "data": 0.0}
    for collective in step_collectives(run.model, layout):
        seconds[collective.group] += _seconds(collective, layout, cluster)
    rate = cluster.gpus * cluster.gpu.peak(layout.precision) * utilization
    return Estimate(
        layout, flops / rate, seconds["tensor"], seconds["data"],
        state_bytes(run.model, layout), memory_estimate(run.model, layout).total,
    )  # fmt: skip


def _seconds(collective: Collective, layout: Layout, cluster: Cluster) -> float:
    """The slower of the link within a node and InfiniBand, which a pipelined collective keeps busy at the same time,
    and its calls."""
    nodes = cluster.nodes
    seconds = _sent(collective, layout) / cluster.gpu.ring_rate
    if collective.group == "tensor" or nodes == 1:  # a tensor-parallel group lies within a node
        return seconds + collective.calls * CALL_SECONDS["node"]
    latency = CALL_SECONDS["network"]
    if collective.operation != "all_reduce":
        latency += HOP_SECONDS["rank"] * layout.group_size(collective.group) + HOP_SECONDS["node"] * nodes
    return max(seconds, _sent_by_port(collective, layout, nodes) / INFINIBAND) + collective.calls * latency


def _sent(collective: Collective, layout: Layout) -> float:
    """Bytes that a GPU sends to the next of its group."""
    return wire_bytes(collective.operation, layout.group_size(collective.group), collective.bytes)


def _sent_by_port(collective: Collective, layout: Layout, nodes: int) -> float:
    """Bytes that a GPU's own port sends to the next node: of rings through all ranks, which leave a node by another
    of the group's ports each."""
    return _sent(collective, layout) / (layout.group_size(collective.group) / nodes)


def recommend(run: RunConfig, cluster: Cluster) -> Estimate | None:
    """The smallest tensor-parallel size under the lowest of ZeRO-1, 2 and 3 that fits into a GPU with the micro-batch
    of the run, or a larger size that is clearly faster.

    None: nothing fits, or the batch has fewer sequences than there are ranks, whatever the size.
    """
    best = None
    for size in TENSOR_PARALLEL_SIZES:
        stages = [estimate(run, cluster, size, stage) for stage in (1, 2, 3)]
        fitting = [one for one in stages if one is not None and fits(one.memory_bytes, cluster.gpu)]
        if fitting and (best is None or fitting[0].total < WORTH_IT * best.total):
            best = fitting[0]
    return best


def _pays(run: RunConfig, nodes: int) -> bool:
    """Whether every doubling up to `nodes` is worth it."""
    best = recommend(run, Cluster(nodes))
    if nodes == 1 or best is None:
        return best is not None
    return _pays(run, nodes // 2) and best.total <= DOUBLING_GAINS * recommend(run, Cluster(nodes // 2)).total


def paper_tables() -> Iterator[str]:
    """Lines of the Markdown tables of docs/scaling.md, which says what the columns are."""
    runs = [with_expected_vocabulary(load_run_config(preset)) for preset in PRESETS]
    yield from _markdown(VOLUMES, [_volumes(run) for run in runs])
    for preset, run in zip(PRESETS, runs, strict=True):
        flops = flops_per_token(run.model, run.seq_length)
        yield (
            f"**{preset}**: {count_parameters(run.model) / 1e6:,.0f}M parameters, {flops / 1e9:.2f} GFLOP a token, "
            f"{run.train.global_batch_size:,} sequences of {run.seq_length:,} a step, "
            f"at most {run.train.micro_batch_size} a micro-batch"
            + (", blocks recomputed" if run.train.activation_checkpointing else "")
        )
        yield ""
        yield from _markdown(TIMES, [_times(run, nodes) for nodes in NODES])


def _markdown(header: tuple[str, ...], rows: list[list[str]]) -> Iterator[str]:
    for cells in (header, ["--:"] * len(header), *rows):
        yield f"| {' | '.join(cells)} |"
    yield ""


def _volumes(run: RunConfig) -> list[str]:
    """GB that a GPU sends in a step on one node; with ZeRO-1 on 8 nodes by its port; and the tensor-parallel calls."""

    def total(one: Estimate | None, group: str, sent: Callable[..., float], *nodes: int) -> str:
        if one is None:
            return "-"
        mine = [c for c in step_collectives(run.model, one.layout) if c.group == group]
        calls = f" in {sum(c.calls for c in mine):,}" if group == "tensor" else ""
        return f"{sum(sent(c, one.layout, *nodes) for c in mine) / 1e9:,.1f}{calls}"

    stages = [total(estimate(run, Cluster(1), zero_stage=stage), "data", _sent) for stage in (1, 2, 3)]
    sizes = [total(estimate(run, Cluster(1), size), "tensor", _sent) for size in TENSOR_PARALLEL_SIZES[1:]]
    return [run.name, *stages, total(estimate(run, Cluster(8)), "data", _sent_by_port, 8), *sizes]


def _times(run: RunConfig, nodes: int) -> list[str]:
    """A row of the table of a preset; times are in ms."""
    cluster = Cluster(nodes)
    stages = [estimate(run, cluster, zero_stage=stage) for stage in (1, 2, 3)]
    sizes = [estimate(run, cluster, size) for size in TENSOR_PARALLEL_SIZES[1:]]
    possible = next((one for one in (stages[0], *sizes) if one is not None), None)
    state = " / ".join(f"{one.state_bytes / 1e9:.1f}" for one in stages if one is not None)
    cells = [str(nodes), state or "-", _ms(possible and possible.compute)]
    cells += [_ms(one and one.communication) for one in (*stages, *sizes)]
    best = recommend(run, cluster)
    cells += [_ms(best and best.total), f"{best.compute / best.total:.0%}" if best else "-"]
    if not _pays(run, nodes):
        cells.append("a larger batch")
    else:
        layout = best.layout
        stage = f"ZeRO-{layout.zero_stage}, " if layout.zero_stage > 1 else ""
        size = f"TP {layout.tensor_parallel_size}, " if layout.tensor_parallel_size > 1 else ""
        cells.append(f"{stage}{size}{layout.micro_batch_size} x {layout.accumulation_steps}")
    return cells


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:,.1f}" if seconds < 0.1 else f"{1000 * seconds:,.0f}"
