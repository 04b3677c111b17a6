"""A run on GPUs that need not be there: what fits, which layout to take, how long it takes, and what it costs."""

import dataclasses
import itertools
import math
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaslm.config import (
    RunConfig,
    check_tensor_parallel,
    cuda_graphs_problem,
    float8_problem,
    offloads_optimizer,
    requested_precision,
    zero_stage,
)
from megaslm.errors import UserError
from megaslm.model import count_parameters, matmul_parameters
from megaslm.parallel import Layout, check_sizes
from megaslm.planning.cluster import Cluster
from megaslm.planning.memory import (
    MemoryEstimate,
    checkpoint_bytes,
    checkpoints_kept,
    export_bytes,
    fits,
    host_copy_bytes,
    memory_estimate,
)
from megaslm.planning.scaling import TENSOR_PARALLEL_SIZES, estimate_layout
from megaslm.planning.speed import Speed, find_speed

ENGINE_FILES = ("zero1.json", "zero2.json", "zero3.json")
"""Of ds_configs/, in the order in which they are tried."""
OFFLOAD_FILE = "zero3_offload.json"


@dataclass(frozen=True)
class Choice:
    """A layout under an engine config, and the memory that it takes."""

    engine: str
    layout: Layout
    memory: MemoryEstimate

    @property
    def name(self) -> str:
        return f"ZeRO-{self.layout.zero_stage}" + (" offload" if self.layout.offload_optimizer else "")


@dataclass(frozen=True)
class Request:
    """What a plan is made for. engines: engine configs of `load_engine_config`, by name, in the order in which they are
    tried. recompute: what is tried of it."""

    run: RunConfig
    cluster: Cluster
    engines: dict[str, dict[str, Any]]
    recompute: tuple[bool, ...] = (False, True)

    @property
    def kernels(self) -> str:
        return "triton" if self.cluster.is_of_gpus and self.run.train.kernels != "reference" else "reference"

    @property
    def precision(self) -> str:
        automatic = "bf16" if self.cluster.is_of_gpus else "fp32"
        return requested_precision(next(iter(self.engines.values())), self.run.train.precision, auto=lambda: automatic)


@dataclass(frozen=True)
class Plan:
    """choices: every stage and tensor-parallel size at the micro-batch of the best, each with and without
    recomputation, in pairs. best: None where nothing fits; then `least` is the choice that takes least, and `helps` has
    what would help, in words, with a choice that fits. step_seconds, speed: None where the speed is not known."""

    request: Request
    tokens: int
    choices: list[tuple[Choice, Choice]]
    best: Choice | None
    least: Choice
    helps: list[tuple[str, Choice]]
    speed: Speed | None
    step_seconds: float | None
    compute_seconds: float | None

    @property
    def run(self) -> RunConfig:
        return self.request.run

    @property
    def cluster(self) -> Cluster:
        return self.request.cluster

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return math.ceil(self.tokens / self.run.tokens_per_step)

    @property
    def seconds(self) -> float | None:
        return None if self.step_seconds is None else self.steps * self.step_seconds

    @property
    def checkpoints_kept(self) -> int:
        """At the same time, at most."""
        return checkpoints_kept(self.run, self.steps)

    def cost(self, price: float) -> float:
        """Of the whole run at `price` for a GPU and hour. The speed must be known."""
        return self.seconds / 3600 * self.cluster.gpus * price


def make_plan(
    request: Request, tokens: int, offload: dict[str, Any] | None = None, results: Path | None = None
) -> Plan:
    """The plan for `tokens` tokens of a run whose vocabulary is known.

    offload: engine config to look at where nothing fits. results: folder of throughput_*.json, see `find_speed`.

    Raises UserError: a batch or a model that does not divide among the GPUs in any way, options that do not go
    together, a file of results that can't be read.
    """
    run, cluster = request.run, request.cluster
    request = _within_bounds(request)
    possible = list(_candidates(request))
    best = _first_that_fits(possible, cluster)
    least = min(possible, key=lambda one: one.memory.total)
    micro = (best or least).layout.micro_batch_size
    choices = []
    for size, (name, engine) in itertools.product(_tensor_parallel_sizes(request), request.engines.items()):
        share = run.train.global_batch_size * size // cluster.gpus
        fitting = max(n for n in range(1, min(micro, share) + 1) if share % n == 0)
        choices.append(tuple(_choice(request, name, engine, size, fitting, again) for again in (False, True)))
    speed = total = compute = None
    if best is not None and cluster.gpu.peak(best.layout.precision) and not best.layout.offload_optimizer:
        speed = find_speed(run, best.layout, request.kernels, cluster.gpu, results)
        step = estimate_layout(run, best.layout, cluster, speed.utilization)
        total, compute = step.compute if speed.has_communication else step.total, step.compute
    helps = list(_helps(request, offload)) if best is None else []
    return Plan(request, tokens, choices, best, least, helps, speed, total, compute)


def _first_that_fits(choices: Iterable[Choice], cluster: Cluster) -> Choice | None:
    return next((one for one in choices if fits(one.memory.total, cluster.gpu)), None)


def _within_bounds(request: Request) -> Request:
    """Without the engine configs under which a run would refuse train.cuda_graphs. UserError: there is no other."""
    if not request.run.train.cuda_graphs:
        return request
    problems = {
        name: cuda_graphs_problem(request.run, request.precision, engine, request.cluster.is_of_gpus)
        for name, engine in request.engines.items()
    }
    engines = {name: engine for name, engine in request.engines.items() if problems[name] is None}
    if not engines:
        raise UserError(next(iter(problems.values())))
    return dataclasses.replace(request, engines=engines)


def _micro_batches(request: Request, share: int) -> list[int]:
    """Sizes that divide a rank's share of the batch, from the largest on, and that train.float8 can multiply.
    UserError: it can none of them."""
    sizes = [n for n in range(share, 0, -1) if share % n == 0]
    run, gpu = request.run, request.cluster.gpu
    if run.train.float8 == "off":
        return sizes
    problems = [float8_problem(run, request.precision, f"the {gpu.title}", gpu.has_float8, n) for n in sizes]
    if all(problems):
        raise UserError(problems[0])
    return [n for n, problem in zip(sizes, problems, strict=True) if problem is None]


def _helps(request: Request, offload: dict[str, Any] | None) -> Iterator[tuple[str, Choice]]:
    """What would make something fit, in words, and what then does. Nothing where neither would."""
    run, cluster = request.run, request.cluster

    def first(changes: Iterator[tuple[str, Request]]) -> Iterator[tuple[str, Choice]]:
        for words, changed in changes:
            try:
                found = _first_that_fits(_candidates(_within_bounds(changed)), changed.cluster)
            except UserError:  # such as a batch that does not divide
                continue
            if found is not None:
                yield words, found
                return

    def changed_run(section: str, **changes: Any) -> Request:
        part = getattr(run, section).model_copy(update=changes)
        return dataclasses.replace(request, run=run.model_copy(update={section: part}))

    if request.precision == "fp32":
        yield from first(iter([("train.precision=bf16", changed_run("train", precision="bf16"))]))
    if cluster.is_of_gpus:
        larger = [(8, cluster.nodes)] if cluster.gpus_per_node < 8 else []
        larger += [(8, cluster.nodes * times) for times in (2, 4, 8)]
        yield from first(
            (f"{per_node * nodes} GPUs (--gpus {per_node} --nodes {nodes})",
             dataclasses.replace(request, cluster=Cluster(nodes, cluster.gpu, per_node)))
            for per_node, nodes in larger
        )  # fmt: skip
        if offload is not None:
            engines = {OFFLOAD_FILE: offload}
            yield from first(iter([(f"ds_configs/{OFFLOAD_FILE}", dataclasses.replace(request, engines=engines))]))
    if not all(request.recompute):
        yield from first(
            iter([("train.activation_checkpointing=true", dataclasses.replace(request, recompute=(True,)))])
        )
    lengths = [run.seq_length // parts for parts in (2, 4, 8, 16) if run.seq_length % parts == 0]
    yield from first((f"data.seq_length={n}", changed_run("data", seq_length=n)) for n in lengths)


def _tensor_parallel_sizes(request: Request) -> list[int]:
    """Those that the model, the node and the batch allow; the one that the run asks for alone, if it does."""
    run, cluster = request.run, request.cluster
    asked = run.parallel.tensor_parallel_size
    if asked > 1:
        check_sizes(run.model, asked)
        if cluster.gpus_per_node % asked:
            raise UserError(
                f"parallel.tensor_parallel_size={asked}: the ranks of a group lie on one node, and {asked} does not "
                f"divide its {cluster.gpus_per_node} GPUs"
            )
    tried = [asked] if asked > 1 else TENSOR_PARALLEL_SIZES
    if run.train.float8 != "off" or run.train.cuda_graphs:
        tried = [1]
    fitting = []
    for size in tried:
        ranks, rest = divmod(cluster.gpus, size)
        if rest or cluster.gpus_per_node % size or run.train.global_batch_size % ranks:
            continue
        if size > 1 and (run.seq_length % size or not _divides(run, size)):
            continue
        fitting.append(size)
    if not fitting:
        raise UserError(
            f"train.global_batch_size {run.train.global_batch_size} does not divide among {cluster.gpus} GPUs, with "
            "any tensor-parallel size that the run allows: give another one, or other numbers of --gpus and --nodes"
        )
    return fitting


def _divides(run: RunConfig, size: int) -> bool:
    try:
        check_sizes(run.model, size)
    except UserError:
        return False
    return True


def _candidates(request: Request) -> Iterator[Choice]:
    """Every layout, the best first: the smallest tensor-parallel size, then the engine configs in their order, then no
    recomputation, then the largest micro-batch that divides a rank's share of the batch."""
    for size, (name, engine) in itertools.product(_tensor_parallel_sizes(request), request.engines.items()):
        check_tensor_parallel(engine, size)
        share = request.run.train.global_batch_size * size // request.cluster.gpus
        for recompute, micro in itertools.product(request.recompute, _micro_batches(request, share)):
            yield _choice(request, name, engine, size, micro, recompute)


def _choice(
    request: Request, name: str, engine: dict[str, Any], size: int, micro_batch_size: int, recompute: bool
) -> Choice:
    run, ranks = request.run, request.cluster.gpus // size
    layout = dataclasses.replace(
        engine_layout(engine),
        micro_batch_size=micro_batch_size,
        accumulation_steps=run.train.global_batch_size // (ranks * micro_batch_size),
        seq_length=run.seq_length,
        data_parallel_size=ranks,
        tensor_parallel_size=size,
        sequence_parallel=size > 1,
        activation_checkpointing=recompute,
        precision=request.precision if zero_stage(engine) else "fp32",
    )
    return Choice(name, layout, memory_estimate(run.model, layout, request.kernels, run.data.mask_documents))


def engine_layout(engine: dict[str, Any]) -> Layout:
    """A layout of one rank with what an engine config says of stages, buckets and offloading; what it leaves out is as
    DeepSpeed 0.19.8 takes it."""
    zero = engine.get("zero_optimization", {})

    return Layout(
        1, 1, 1,
        zero_stage=zero_stage(engine),
        persistence_threshold=int(zero.get("stage3_param_persistence_threshold", 100_000)),
        live_parameters=int(zero.get("stage3_max_live_parameters", 1_000_000_000)),
        reduce_bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
        prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", 50_000_000)),
        offload_optimizer=offloads_optimizer(engine),
        offload_parameters=zero.get("offload_param", {}).get("device", "none") != "none",
    )  # fmt: skip


def run_command_of(plan: Plan, preset: str, overrides: list[str], engine_path: str) -> str:
    """The command that starts the recommended layout, for as many tokens as planned. Something must fit."""
    layout, cluster, run = plan.best.layout, plan.cluster, plan.run
    options = {
        "train.micro_batch_size": str(layout.micro_batch_size),
        "train.max_tokens": str(plan.tokens),  # takes the place of the preset's other limits
        "train.activation_checkpointing": str(layout.activation_checkpointing).lower(),
    }
    if layout.tensor_parallel_size > 1:
        options["parallel.tensor_parallel_size"] = str(layout.tensor_parallel_size)
        options["parallel.sequence_parallel"] = "true"
    if not run.data.train and not run.data.input:
        options["data.train"] = "PREFIX"
    decided = {*options, "train.max_steps", "train.max_epochs"}
    words = [f"{key}={value}" for key, value in options.items()]
    words += [override for override in overrides if override.partition("=")[0] not in decided]
    if cluster.nodes > 1:
        launcher = ["launch/cluster.sh", "--hostfile", "hosts"]
    else:
        count = "--gpus" if cluster.is_of_gpus else "--cpu_ranks"
        launcher = ["launch/node.sh", count, str(cluster.gpus_per_node)]
    return shlex.join(["bash", *launcher, "--preset", preset, "--ds_config", engine_path, *words])


def sizes_of(plan: Plan) -> dict[str, int]:
    """Bytes on disk of a checkpoint, of all that are kept at once and of an export, and of the copy in a node's memory
    that a background save makes."""
    model, cluster = plan.run.model, plan.cluster
    one = checkpoint_bytes(model)
    return {
        "checkpoint": one,
        "checkpoints_kept": one * plan.checkpoints_kept,
        "export": export_bytes(model),
        "host_copy": host_copy_bytes(model, cluster.gpus_per_node, cluster.gpus)
        if plan.run.checkpoint.background
        else 0,
    }


def parameters_of(plan: Plan) -> dict[str, int]:
    """All of them, those in matrix products (the head among them), those of the input embedding."""
    model = plan.run.model
    positions = model.context_length * model.hidden_size if model.position == "learned" else 0
    return {
        "all": count_parameters(model),
        "matmul": matmul_parameters(model),
        "embedding": model.vocab_size * model.hidden_size + positions,
    }
