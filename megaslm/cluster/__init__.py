"""Starting a run on one or many nodes, and what is checked before it. Imports torch only where a check needs it."""

from megaslm.cluster.commands import (
    DEVICES,
    PRETRAIN,
    Launch,
    decided_environment,
    describe,
    hosts_of_ranks,
    launch_in_slurm,
    launch_on_hosts,
    launch_on_node,
)
from megaslm.cluster.hostfile import Node, read_hostfile
from megaslm.cluster.local import check_locally, count_gpus, run_check
from megaslm.cluster.ranks import check_ranks
from megaslm.cluster.slurm import hosts_of_job, train_in_job

__all__ = [
    "DEVICES",
    "PRETRAIN",
    "Launch",
    "Node",
    "check_locally",
    "check_ranks",
    "count_gpus",
    "decided_environment",
    "describe",
    "hosts_of_job",
    "hosts_of_ranks",
    "launch_in_slurm",
    "launch_on_hosts",
    "launch_on_node",
    "read_hostfile",
    "run_check",
    "train_in_job",
]
