"""The files of results of tools/benchmark_throughput.py: what stands in them, and their reader. The benchmark writes
them from these models, and plans take speeds from them."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megaslm.errors import UserError

RESULT_FORMAT = 1
PATTERN = "throughput_*.json"


class Result(BaseModel):
    """The figures of one case, medians over the rounds.

    Attributes:
        case: "megaslm", or a peer: "hf", "ddp".
        compiled: "off", what torch.compile took ("every block", "whole model"), or why it fell back.
        parameters: without the padding of the vocabulary.
        zero_stage: None for a peer, which has no engine; nor has it float8 and CUDA graphs.
        ms_per_step: its spread is half of the range between the quartiles of the steps of all rounds.
        global_batch_size: of the steps measured; `run_global_batch_size` that of the run, which may be larger.
        phases_ms: of a step, adding up to ms_per_step. On a GPU "gap" is None where it is not known how long it was
            busy: the others are then wall times.
        tflops: of one device, model FLOPs by full attention, in 10^12 a second; `tflops_causal` by causal attention.
        mfu: `tflops` over the device's peak; None where that is not known.
        matmul_tflops: of large square products in the same run, by one device; `of_matmul_rate` is `tflops` over it.
        memory_bytes: peak of a rank: allocated on a GPU (`memory_reserved_bytes`: reserved), else resident.
        first_loss: mean of the first step that was taken, nats; `last_loss` of the last.
    """

    model_config = ConfigDict(frozen=True)

    preset: str
    case: str
    compiled: str
    model: dict[str, Any]
    parameters: int = Field(gt=0)
    seq_length: int
    global_batch_size: int
    run_global_batch_size: int | None = None
    micro_batch_size: int
    accumulation_steps: int
    world_size: int = Field(gt=0)
    zero_stage: int | None
    tensor_parallel_size: int
    activation_checkpointing: bool
    float8: str = "off"
    cuda_graphs: bool = False
    attention: str = "auto"
    precision: str
    kernels: str
    steps: int
    rounds: int
    ms_per_step: float
    spread_ms: float
    tokens_per_s: float
    tokens_per_s_per_device: float
    phases_ms: dict[str, float | None]
    tflops: float = Field(gt=0, allow_inf_nan=False)
    tflops_causal: float
    mfu: float | None
    mfu_causal: float | None
    matmul_tflops: float
    of_matmul_rate: float
    memory_bytes: int
    memory_reserved_bytes: int | None = None
    first_loss: float
    last_loss: float

    @property
    def is_of_gpu(self) -> bool:
        return self.memory_reserved_bytes is not None

    @property
    def fell_back(self) -> bool:
        """Whether it was to be compiled, and could not be."""
        return self.compiled.startswith("fell back")


class LeftOut(BaseModel):
    """A case that failed.

    Attributes:
        case: as in a `Result`. compiled: whether it was to be compiled; None: as the run says, which is not known.
        rounds: that it had gone through; their figures are in its `Result`.
    """

    model_config = ConfigDict(frozen=True)

    preset: str
    case: str
    compiled: bool | None
    rounds: int
    reason: str


class Environment(BaseModel):
    """Of a benchmark, as far as its report names it; the file says more."""

    device: str
    cores: int
    code_version: str | None
    command: list[str]
    python: str
    packages: dict[str, str]
    date: str
    variables: dict[str, str] = {}


class Report(BaseModel):
    """A file of results."""

    format: int
    environment: Environment
    results: list[Result]
    left_out: list[LeftOut] = []


def read_report(path: Path) -> Report:
    """Raises UserError: no JSON, or not what a benchmark of this format wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); take it away, or write it anew") from None
    try:
        report = Report.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise UserError(
            f"{path} is not of tools/benchmark_throughput.py ({where}: {first['msg']}); take it away, or write it anew"
        ) from None
    if report.format != RESULT_FORMAT:
        raise UserError(f"{path} has format {report.format}, and this megaslm reads {RESULT_FORMAT}: measure anew")
    return report


def read_reports(folder: Path) -> dict[Path, Report]:
    """`read_report` of all throughput_*.json in `folder`, in the order of their names."""
    return {path: read_report(path) for path in sorted(folder.glob(PATTERN))}
