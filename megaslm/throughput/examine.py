"""What this machine says to the cases, in ranks that are started for it, before anything is measured: the process that
starts ranks asks the devices nothing, and so holds no memory of theirs."""

import datetime
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from megaslm.config import RunConfig, compiles, requested_precision, zero_stage
from megaslm.errors import first_line
from megaslm.parallel import Ranks, available_cores, host, init_distributed
from megaslm.throughput.case import Case
from megaslm.throughput.fitting import memory_limit
from megaslm.throughput.peers import check_peer_precision
from megaslm.training import (
    RunData,
    check_cuda_graphs,
    check_float8,
    check_precision,
    choose_attention,
    choose_kernels,
    environment,
    preferred_precision,
    prepare_data,
)

# Of the environment: what may change a figure.
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_", "CUBLAS_", "OMP_", "MKL_", "KMP_", "NCCL_")
VARIABLES += ("NVIDIA_TF32_OVERRIDE", "TORCH_", "TORCHINDUCTOR_", "TRITON_")
FACTS = ("code_version", "python", "packages", "platform", "device", "cuda", "cudnn", "nccl", "threads_per_rank")


@dataclass(frozen=True)
class Examination:
    """cases: with the precision of a run here, and whether they are compiled. obstacles: those that can't be measured
    here, and why. memory_limit: bytes that a rank may take. environment: what may change a figure of any case."""

    cases: list[Case]
    obstacles: dict[Case, str]
    memory_limit: float
    environment: dict[str, Any]


def examine(cases: list[Case]) -> Examination:
    """Look at cases of one world size. Every rank calls this.

    Raises UserError: data that can't be read, and what the configs ask of a machine that does not have it.
    """
    found, obstacles, compiler = [], {}, None
    for case in cases:
        run, ranks, _ = prepare(case)
        case = resolved(case, run, ranks)
        found.append(case)
        if case.compiled:
            compiler = compiler or CompilerTrial(ranks.device)
            if compiler.failure is not None:
                obstacles[case] = f"torch.compile does not run here ({compiler.failure})"
    limit = min(host.gather(memory_limit(ranks.device, ranks.local_world_size)))
    return Examination(found, obstacles, limit, facts(ranks))


def prepare(case: Case) -> tuple[RunConfig, Ranks, RunData]:
    """Join the other ranks and open the data. Collective."""
    run = case.run_config()
    ranks = init_distributed(run.parallel.tensor_parallel_size)
    run, data = prepare_data(run, say=lambda line: None)
    return run, ranks, data


def resolved(case: Case, run: RunConfig, ranks: Ranks) -> Case:
    """With the precision that a run would have on this device, and whether it would be compiled.

    Raises UserError: what the run asks for cannot be had here.
    """
    engine, device, size = case.engine_config(), ranks.device, ranks.tensor_parallel.size
    precision = requested_precision(engine, run.train.precision, auto=lambda: preferred_precision(device))
    check_precision(precision, device)
    choose_kernels(run.train.kernels, device)
    choose_attention(run, precision, device, size)
    if case.kind != "megaslm":
        check_peer_precision(case.kind, precision)
    else:
        if run.train.float8 != "off":
            check_float8(run, precision, device, case.batch(run).micro_batch_size)
        if run.train.cuda_graphs:
            check_cuda_graphs(run, precision, engine, device)
    stage = zero_stage(engine) if case.kind == "megaslm" else 0
    return replace(case, precision=precision, compiled=compiles(run.train.compile, device.type == "cuda", stage))


class CompilerTrial:
    """failure: why torch.compile does not run on some rank, None where it does. Collective."""

    def __init__(self, device: torch.device):
        failure = None
        try:
            torch.compile(F.silu)(torch.ones(8, device=device))
        except Exception as error:  # Dynamo, Inductor and the compilers under them raise all kinds
            failure = f"{type(error).__name__}: {first_line(error)}"
        self.failure = next((one for one in host.gather(failure) if one is not None), None)


def facts(ranks: Ranks) -> dict[str, Any]:
    """What of the machine, the versions and the environment may change a figure of any case."""
    every = environment(ranks, "", "")
    return {name: every[name] for name in FACTS if name in every} | {
        "devices": torch.cuda.device_count() if ranks.device.type == "cuda" else 0,
        "cores": available_cores(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
