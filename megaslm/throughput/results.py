"""What a benchmark of training steps found: a table on the terminal, RESULTS.md from all files of a folder."""

import math
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megaslm.errors import UserError
from megaslm.planning import RESULT_FORMAT, Environment, LeftOut, Report, Result, read_reports
from megaslm.reports import table, write_json

RESULTS = "RESULTS.md"
CASE_NAMES = {"megaslm": "megaslm", "hf": "transformers", "ddp": "DDP"}
# Relative difference from megaslm's loss at the first step, up to which a case computes the same. It starts from the
# same weights and windows; bf16 rounds at other places in other implementations.
SAME_LOSS = {"fp32": 1e-4, "bf16": 1e-2}
LAST_LOSS = 10  # so many times the bound for that at the last step, when roundings have grown
FORWARD_NOTE = [
    "- **forward** and **backward** of transformers can be compared with the others' as a sum alone: our fused loss,",
    "  that of DDP too, computes its gradient in forward",
]
GPU_PRESETS = "megaslm_125m megaslm_350m megaslm_1.2b megaslm_3b"

Cell = Callable[[Result], str | None]


def result_lines(results: Sequence[Result], left_out: Sequence[LeftOut] = ()) -> list[str]:
    """For the terminal: of every preset a title, its table and what is to be said about it; and what is missing."""
    lines: list[str] = []
    for group in by_preset(results):
        header, rows = _cells(group)
        lines += [
            f"{group[0].preset}: {_title(group)}",
            *table(header, rows, "<<" + ">" * (len(header) - 2)),
            *_remarks(group),
            "",
        ]
    return [*lines, *map(_left_out_line, left_out)] if left_out else lines[:-1]


def write_report(
    path: Path, environment: dict[str, Any], options: dict[str, Any], results: list[Result], left_out: list[LeftOut]
) -> None:
    """Write a file that `read_reports` reads, with no folder of this machine in it. Raises UserError where it can't."""
    content = {"format": RESULT_FORMAT, "environment": environment, "options": options}
    content |= {"results": [one.model_dump() for one in results], "left_out": [one.model_dump() for one in left_out]}
    write_json(path, without_folders(content))


def without_folders(value: Any) -> Any:
    """A JSON value as it can stand in a file for others: of paths from the root only the names."""
    if isinstance(value, dict):
        return {key: without_folders(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(part) for part in value]
    if isinstance(value, str):
        return re.sub(r"(?<![^\s=\[(\"',:])/(?:[^\s/\"',:\]]+/)*(?=[^/\s])", "", value)
    return value


def write_results(folder: str | Path) -> Path:
    """Write RESULTS.md from all throughput_*.json in `folder`. Returns its path.

    Raises UserError: a file that is not of this benchmark, a folder that can't be written.
    """
    folder = Path(folder)
    reports = {path.name: report for path, report in read_reports(folder).items()}
    path = folder / RESULTS
    try:
        path.write_text("\n".join(results_page(reports)) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


def results_page(reports: dict[str, Report]) -> list[str]:
    """Lines of RESULTS.md. reports: by file name."""
    lines = [
        "# Speed of training",
        "",
        "`tools/benchmark_throughput.py` wrote this page from the files beside it, which hold all figures.",
        "Every case takes whole optimizer steps on the same windows of the same token files, from the same initial",
        "weights, with the same batch, optimizer and clipping, in processes of its own, in turn with the others.",
        "",
        "- **megaslm**: the engine that `launch/pretrain.py` trains with",
        "- **transformers**: its own model with what its Trainer does in a step (fp32 weights, autocast, fused AdamW)",
        "- **DDP**: our network and kernels under torch's DistributedDataParallel, without DeepSpeed (fp32 weights,",
        "  autocast, fused AdamW)",
        "- **TFLOP/s**: for each token 6 FLOPs for each weight in a matrix product and 12 L H D S for attention",
        "- **MFU**: that over the device's dense bf16 peak; **causal**: with 6 L H D S, which a causal kernel does",
        "- **of matmul**: TFLOP/s over the rate of large matrix products, measured in the same processes",
        "- **data** to **optimizer**: ms of a step by phase; **gap**: a GPU waited for the host; **rest**: the loop",
        *FORWARD_NOTE,
        "- **steps** may be of fewer micro-batches than in a run (`--max_accumulation`): the optimizer's share is then",
        "  a little larger",
        "- Our vocabulary is padded for the tensor cores, transformers' is not; the loader, which reads ahead, and a",
        "  garbage collector at rest are ours for all",
        "",
        *_coverage(reports),
    ]
    devices: dict[str, list[str]] = {}
    for name, report in reports.items():
        devices.setdefault(report.environment.device, []).append(name)
    for device, names in devices.items():
        lines += ["", f"## {device}"]
        for name in names:
            lines += ["", *_facts(name, reports[name].environment)]
            for group in by_preset(reports[name].results):
                remarks = _remarks(group)
                lines += ["", f"### {group[0].preset}", "", _title(group), "", *_markdown_table(*_cells(group))]
                lines += [line for remark in remarks for line in ("", remark)]
            lines += [line for missing in reports[name].left_out for line in ("", _left_out_line(missing))]
    return lines


def _coverage(reports: dict[str, Report]) -> list[str]:
    """Which devices were measured, and which were not."""
    ranks: dict[str, int] = {}  # by device, the most
    for report in reports.values():
        device = report.environment.device
        ranks[device] = max([ranks.get(device, 0), *(result.world_size for result in report.results)])
    on_gpus = [result for report in reports.values() for result in report.results if result.is_of_gpu]
    measured = [f"{device} ({count} rank{'s' * (count > 1)} at most)" for device, count in ranks.items()]
    lines = [f"Measured: {'; '.join(measured) or 'nothing yet'}."]
    if not on_gpus:
        lines += [
            "Not measured: any GPU. Where there is one:",
            "",
            f"    python tools/benchmark_throughput.py --preset {GPU_PRESETS} --micro_batch auto \\",
            "        --compare hf,ddp --compile on,off --output benchmarks/throughput_h200",
            "",
            "On a processor, ratios between cases are what counts, not the rates.",
        ]
    elif all(result.world_size == 1 for result in on_gpus):
        lines.append("Not measured: more than one GPU (`--world_size N`).")
    return lines


def _facts(name: str, environment: Environment) -> list[str]:
    """Of one file: where, when and how it was measured."""
    packages = ", ".join(f"{package} {version}" for package, version in environment.packages.items())
    code = environment.code_version or "not of a checkout"
    variables = shlex.join(f"{name}={value}" for name, value in environment.variables.items())
    return [
        f"[{name}]({name}), {environment.date}, {environment.cores} processor cores, code version {code}; Python "
        f"{environment.python}, {packages}{f'; with {variables}' if variables else ''}:",
        "",
        f"    {shlex.join(environment.command)}",
    ]


def by_preset(results: Iterable[Result]) -> list[list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.preset, []).append(result)
    return list(groups.values())


def _title(group: Sequence[Result]) -> str:
    """What the cases of a preset have in common."""
    one = _reference(group) or group[0]
    size = one.global_batch_size
    parts = [
        f"{one.parameters / 1e6:,.1f}M parameters",
        f"steps of {one.global_batch_size} x {one.seq_length} tokens"
        + (f" (a run's: of {of_run})" if (of_run := one.run_global_batch_size) not in (None, size) else ""),
        one.precision,
        f"kernels {one.kernels}",
        f"{one.world_size} rank{'s' * (one.world_size > 1)}",
    ]
    if one.zero_stage is not None:
        parts.append(f"ZeRO-{one.zero_stage}")
    if one.tensor_parallel_size > 1:
        parts.append(f"tensor parallel {one.tensor_parallel_size}")
    if one.activation_checkpointing:
        parts.append("blocks recomputed")
    if one.attention != "auto":
        parts.append(f"{one.attention} attention")
    return f"{', '.join(parts)}; {one.steps} steps, median of {one.rounds} round{'s' * (one.rounds > 1)}"


def _reference(group: Sequence[Result]) -> Result | None:
    """The fastest case of megaslm, which others are compared with."""
    ours = [result for result in group if result.case == "megaslm"]
    return max(ours, key=lambda result: result.tokens_per_s, default=None)


def _cells(group: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a preset's table, without columns that would be empty."""
    best = _reference(group)
    phases = dict.fromkeys(phase for result in group for phase in result.phases_ms)

    def number(pattern: str, value: float | None) -> str | None:
        return None if value is None else pattern.format(value)

    def milliseconds(of: dict[str, float | None], phase: str) -> str | None:
        return "not known" if phase in of and of[phase] is None else number("{:,.1f}", of.get(phase))

    columns: dict[str, Cell] = {
        "case": lambda r: CASE_NAMES.get(r.case, r.case),
        "compiled": lambda r: "fell back" if r.fell_back else r.compiled,
        "with": lambda r: ", ".join([f"float8 {r.float8}"] * (r.float8 != "off") + ["graphs"] * r.cuda_graphs) or None,
        "batch": lambda r: f"{r.micro_batch_size} x {r.accumulation_steps}",
        "tokens/s": lambda r: f"{r.tokens_per_s:,.0f}",
        "per device": lambda r: f"{r.tokens_per_s_per_device:,.0f}",
        "of megaslm": lambda r: number("{:.2f}", best and r.tokens_per_s / best.tokens_per_s),
        "MFU": lambda r: number("{:.1%}", r.mfu),
        "causal": lambda r: number("{:.1%}", r.mfu_causal),
        "TFLOP/s": lambda r: _rate(r.tflops),
        "of matmul": lambda r: f"{r.of_matmul_rate:.0%}",
        "GiB": lambda r: f"{r.memory_bytes / 2**30:.2f}",
        "reserved": lambda r: number("{:.2f}", r.memory_reserved_bytes and r.memory_reserved_bytes / 2**30),
        "ms/step": lambda r: f"{r.ms_per_step:,.1f} +- {r.spread_ms:.1f}",
        **{phase: lambda r, phase=phase: milliseconds(r.phases_ms, phase) for phase in phases},
        "loss": lambda r: f"{r.first_loss:.4f} to {r.last_loss:.4f}",
    }
    rows = [[cell(result) for cell in columns.values()] for result in group]
    filled = [any(row[i] is not None for row in rows) for i in range(len(columns))]
    kept = [[cell or "-" for cell, keep in zip(row, filled, strict=True) if keep] for row in rows]
    return [name for name, keep in zip(columns, filled, strict=True) if keep], kept


def _rate(tflops: float) -> str:
    return f"{tflops:,.1f}" if tflops >= 1 else f"{tflops:.3f}"


def _remarks(group: Sequence[Result]) -> list[str]:
    """Whether the cases computed the same, and who did not get what was asked for."""
    remarks = []
    reference = _reference(group)
    if reference is not None and len(group) > 1:
        bound = SAME_LOSS.get(reference.precision, SAME_LOSS["bf16"])
        others = [result for result in group if result is not reference]
        for which, limit in (("first", bound), ("last", LAST_LOSS * bound)):
            apart = [(result, _difference(result, reference, f"{which}_loss")) for result in others]
            largest = max((difference for _, difference in apart), key=lambda value: (math.isnan(value), value))
            remarks.append(
                f"{which.capitalize()} losses differ from megaslm's by at most {largest:.1e} of it (bound in "
                f"{reference.precision}: {limit:g})."
            )
            remarks += [
                f"NOT COMPARABLE: {case_name(result)}, whose {which} loss differs by {difference:.1e}: it computes "
                "something else."
                for result, difference in apart
                if not difference <= limit  # a NaN is not
            ]
    remarks += [
        f"{case_name(result)}: the gap is not known: the profiler saw no work of the step on the GPU, whose "
        "counters may need permission, or more than the step takes. Phases are wall times, with what the GPU waited."
        for result in group
        if "gap" in result.phases_ms and result.phases_ms["gap"] is None
    ]
    return remarks + [f"{case_name(result)}: {result.compiled}." for result in group if result.fell_back]


def _difference(result: Result, reference: Result, loss: str) -> float:
    return abs(getattr(result, loss) - getattr(reference, loss)) / abs(getattr(reference, loss))


def _left_out_line(one: LeftOut) -> str:
    name = f"{CASE_NAMES.get(one.case, one.case)}{', compiled' if one.compiled else ''}"
    after = f" after {one.rounds} round{'s' * (one.rounds > 1)}" if one.rounds else ""
    return f"LEFT OUT{after}: {one.preset}, {name}: {one.reason}"


def case_name(result: Result) -> str:
    """What tells a case from the others of its preset."""
    name = CASE_NAMES.get(result.case, result.case)
    return name if result.compiled == "off" or result.fell_back else f"{name}, compiled"


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", "---"] + ["---:"] * (len(header) - 2)
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]
