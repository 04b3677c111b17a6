"""Process groups and what ranks do together."""

from megaslm.parallel import host
from megaslm.parallel.communication import BYTES, Collective, Layout, rank_parameters, step_collectives
from megaslm.parallel.distributed import (
    Ranks,
    available_cores,
    free_port,
    gpus_for_ranks,
    init_distributed,
    quiet_torchao,
    uses_gpus,
)
from megaslm.parallel.gpus import GIB, GPU, GPUS, PEAK_BF16_FLOPS
from megaslm.parallel.gradients import clip_gradients_, global_norm
from megaslm.parallel.groups import ALONE, Group
from megaslm.parallel.memory import memory_used
from megaslm.parallel.placement import Block, Placement, placement_of
from megaslm.parallel.sharding import PLAN, check_sizes, check_tags, shard_model
from megaslm.parallel.traffic import HOST, Count, Traffic, count_traffic, wire_bytes

__all__ = [
    "ALONE",
    "BYTES",
    "GIB",
    "GPU",
    "GPUS",
    "HOST",
    "PEAK_BF16_FLOPS",
    "PLAN",
    "Block",
    "Collective",
    "Count",
    "Group",
    "Layout",
    "Placement",
    "Ranks",
    "Traffic",
    "available_cores",
    "check_sizes",
    "check_tags",
    "clip_gradients_",
    "count_traffic",
    "free_port",
    "gpus_for_ranks",
    "global_norm",
    "host",
    "init_distributed",
    "memory_used",
    "placement_of",
    "rank_parameters",
    "quiet_torchao",
    "shard_model",
    "step_collectives",
    "uses_gpus",
    "wire_bytes",
]
