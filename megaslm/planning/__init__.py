"""Runs on paper: the memory, the time and the layout of a run on GPUs that need not be there."""

from megaslm.parallel import GPU, GPUS
from megaslm.planning.cluster import THIS_MACHINE, Cluster, find_gpu, this_machine
from megaslm.planning.memory import (
    MemoryEstimate,
    Parts,
    checkpoint_bytes,
    checkpoints_kept,
    export_bytes,
    host_copy_bytes,
    memory_estimate,
    state_bytes,
)
from megaslm.planning.plan import (
    ENGINE_FILES,
    OFFLOAD_FILE,
    Choice,
    Plan,
    Request,
    engine_layout,
    make_plan,
    run_command_of,
)
from megaslm.planning.report import plan_json, plan_lines
from megaslm.planning.results import (
    RESULT_FORMAT,
    Environment,
    LeftOut,
    Report,
    Result,
    read_report,
    read_reports,
)
from megaslm.planning.scaling import INFINIBAND, Estimate, estimate, estimate_layout, paper_tables, recommend
from megaslm.planning.speed import Speed, find_speed

__all__ = [
    "ENGINE_FILES",
    "OFFLOAD_FILE",
    "Choice",
    "Cluster",
    "Environment",
    "Estimate",
    "GPU",
    "GPUS",
    "INFINIBAND",
    "LeftOut",
    "MemoryEstimate",
    "Parts",
    "Plan",
    "RESULT_FORMAT",
    "Report",
    "Request",
    "Result",
    "Speed",
    "THIS_MACHINE",
    "checkpoint_bytes",
    "checkpoints_kept",
    "engine_layout",
    "estimate",
    "estimate_layout",
    "export_bytes",
    "find_gpu",
    "find_speed",
    "host_copy_bytes",
    "make_plan",
    "memory_estimate",
    "paper_tables",
    "plan_json",
    "plan_lines",
    "read_report",
    "read_reports",
    "recommend",
    "run_command_of",
    "state_bytes",
    "this_machine",
]
