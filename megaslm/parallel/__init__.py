"""Process groups and what ranks do together."""

from megaslm.parallel import host
from megaslm.parallel.communication import Collective, Layout, rank_parameters, step_collectives
from megaslm.parallel.distributed import Ranks, available_cores, free_port, init_distributed
from megaslm.parallel.gradients import clip_gradients_, global_norm
from megaslm.parallel.groups import ALONE, Group
from megaslm.parallel.memory import memory_used
from megaslm.parallel.placement import Block, Placement, placement_of
from megaslm.parallel.scaling import estimate, paper_tables, recommend, state_bytes
from megaslm.parallel.sharding import PLAN, check_sizes, check_tags, shard_model
from megaslm.parallel.traffic import HOST, Count, Traffic, count_traffic, wire_bytes

__all__ = [
    "ALONE",
    "HOST",
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
    "estimate",
    "free_port",
    "global_norm",
    "host",
    "init_distributed",
    "memory_used",
    "paper_tables",
    "placement_of",
    "rank_parameters",
    "recommend",
    "shard_model",
    "state_bytes",
    "step_collectives",
    "wire_bytes",
]
