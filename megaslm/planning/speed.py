"""How fast a GPU computes: measured on the same model, estimated from measurements of others, or assumed."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaslm.config import RunConfig, compiles
from megaslm.errors import UserError
from megaslm.model import count_parameters
from megaslm.parallel import GPU, Layout
from megaslm.planning.results import Result, read_reports
from megaslm.planning.scaling import RECOMPUTATION, UTILIZATION

# What of a model has no part in its speed.
_NOT_OF_SPEED = {"init_std", "norm_eps", "rope_theta", "rope_scaling", "rope_scaling_factor", "rope_original_context"}
FLOAT8_GAIN = 2
"""Peak of float8 matrix products over that of bf16 (datasheets of H100 and L40S)."""


@dataclass(frozen=True)
class Speed:
    """utilization: share of the dense peak of the precision that a GPU computes at, full attention counted,
    recomputation as work. kind: "measured", "estimated" or "assumed". source: where it is from, for people.
    has_communication: whether it is that of whole steps on as many GPUs in this layout, communication and all."""

    utilization: float
    kind: str
    source: str
    has_communication: bool = False


def find_speed(run: RunConfig, layout: Layout, kernels: str, gpu: GPU, folder: Path | None) -> Speed:
    """The speed of `run`, whose vocabulary is known, in that layout on GPUs of a known peak, by the results in
    folder/throughput_*.json (tools/benchmark_throughput.py).

    Measured: the same model and sequence length in the same arithmetic on the same kind of GPU: on as many GPUs in the
    same layout, or else on the fewest, and of these the best. Estimated: a value between those of other models in this
    precision and float8, along the logarithm of their parameters, or that of the nearest. Without any, `UTILIZATION`.

    Raises UserError: a file that is not of this benchmark, or has a rate above the GPU's peak.
    """
    found = _results(run, layout, gpu, folder) if folder is not None else []
    gpus = layout.data_parallel_size * layout.tensor_parallel_size

    def utilization(one: Result) -> float:
        work = RECOMPUTATION if one.activation_checkpointing else 1.0
        return one.tflops * 1e12 / gpu.peak(layout.precision) * work

    def is_of_layout(one: Result) -> bool:
        mine = gpus, layout.zero_stage, layout.tensor_parallel_size
        return gpus > 1 and (one.world_size, one.zero_stage, one.tensor_parallel_size) == mine

    def rank(one: Result) -> tuple[bool, int, float]:
        return is_of_layout(one), -one.world_size, utilization(one)

    same = [(one, file) for one, file in found if _computes_the_same(one, run, layout, kernels)]
    if same:
        one, file = max(same, key=lambda pair: rank(pair[0]))
        source = f"{one.preset} on {one.world_size} x {gpu.title}, {file}"
        return Speed(utilization(one), "measured", source, is_of_layout(one))
    by_size: dict[int, Result] = {}
    for one, _ in found:
        by_size[one.parameters] = max(by_size.get(one.parameters, one), one, key=rank)
    if not by_size:
        arithmetic = layout.precision + (f" with float8 {run.train.float8}" if run.train.float8 != "off" else "")
        return Speed(UTILIZATION, "assumed", f"{UTILIZATION:.0%} of the peak; no result on {gpu.title} in {arithmetic}")
    size = count_parameters(run.model)
    below = max((n for n in by_size if n <= size), default=min(by_size))
    above = min((n for n in by_size if n >= size), default=max(by_size))
    share = math.log(size / below) / math.log(above / below) if below < above else 0.0
    value = (1 - share) * utilization(by_size[below]) + share * utilization(by_size[above])
    names = " and ".join(dict.fromkeys(by_size[n].preset for n in (below, above)))
    return Speed(value, "estimated", f"{names} on {gpu.title}")


def _results(run: RunConfig, layout: Layout, gpu: GPU, folder: Path) -> list[tuple[Result, str]]:
    """Results of this project's engine on that kind of GPU in the arithmetic of the plan, and their files."""
    found = []
    for path, report in read_reports(folder).items():
        if report.environment.device != gpu.torch_name:
            continue
        for one in report.results:
            peak = gpu.peak(one.precision)
            if peak is None:
                continue
            if one.tflops * 1e12 > peak * (1 if one.float8 == "off" else FLOAT8_GAIN):
                raise UserError(f"{path}: {one.tflops:g} TFLOP/s of {one.preset} is above the peak of the {gpu.title}")
            mine = "megaslm", layout.precision, run.train.float8
            if (one.case, one.precision, one.float8) == mine:
                found.append((one, path.name))
    return found


def _computes_the_same(one: Result, run: RunConfig, layout: Layout, kernels: str) -> bool:
    train = run.train
    wanted = (
        _shape(run.model.model_dump(mode="json")), run.seq_length, kernels, train.attention, train.cuda_graphs,
        layout.tensor_parallel_size, layout.activation_checkpointing,
        compiles(train.compile, on_gpu=True, stage=layout.zero_stage),
    )  # fmt: skip
    return wanted == (
        _shape(one.model), one.seq_length, one.kernels, one.attention, one.cuda_graphs,
        one.tensor_parallel_size, one.activation_checkpointing,
        one.compiled == "every block",  # as training says it, and not what could not be compiled
    )  # fmt: skip


def _shape(model: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in model.items() if name not in _NOT_OF_SPEED}
