#!/usr/bin/env python3
"""Start launch/pretrain.py on one node, on the nodes of a hostfile, or in a Slurm job, after checks. Use it through
launch/node.sh, launch/cluster.sh and launch/slurm.sbatch, which set the environment.

What is not an option here goes to launch/pretrain.py, and so does all that follows `--`.
"""

import argparse
import math
import os
import shlex
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

from pretrain import parse_arguments as parse_pretrain_arguments

from megaslm.cluster import (
    PRETRAIN,
    Launch,
    check_locally,
    count_gpus,
    decided_environment,
    describe,
    hosts_of_job,
    launch_in_slurm,
    launch_on_hosts,
    launch_on_node,
    read_hostfile,
    run_check,
    train_in_job,
)
from megaslm.commands import interrupt_on_termination, run_command
from megaslm.config import load_engine_config, load_run_config
from megaslm.errors import USER_ERROR_EXIT_CODE, UserError

SCRIPTS = {"node": "launch/node.sh", "cluster": "launch/cluster.sh", "slurm": "sbatch launch/slurm.sbatch"}
DEFAULT_PORT = 29500


def count(text: str) -> int:
    """A number of ranks, 1 or more."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def port(text: str) -> int:
    """A number of a TCP port."""
    if not 1 <= (number := int(text)) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port, from 1 to 65535")
    return number


def seconds(text: str) -> float:
    """A time that passes."""
    number = float(text)
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return number


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The options of this command, and the arguments of launch/pretrain.py."""
    parser = argparse.ArgumentParser(
        usage=f"%(prog)s {{{','.join(SCRIPTS)}}} ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, script in SCRIPTS.items():
        one = kinds.add_parser(kind, prog=script, allow_abbrev=False, epilog="All else: see launch/pretrain.py --help.")
        if kind == "cluster":
            one.add_argument(
                "--hostfile", required=True, help="a line `HOST slots=N` for each node, the first is the master"
            )
            one.add_argument("--master_addr", help="address of the first node (its name in the hostfile)")
            one.add_argument(
                "--node_rank", type=int, metavar="K", help="this is node K; give the same on all, without ssh"
            )
            one.add_argument("--cpu", action="store_true", help="slots are CPU ranks, for a rehearsal")
        else:
            ranks = one.add_mutually_exclusive_group()
            ranks.add_argument("--gpus", type=count, metavar="N", help="GPUs to use on a node (all)")
            ranks.add_argument("--cpu_ranks", type=count, metavar="N", help="CPU ranks on a node instead")
        one.add_argument(
            "--master_port", type=port, help=f"port of rank 0 ({DEFAULT_PORT}; in Slurm by the job's number)"
        )
        one.add_argument("--dry_run", action="store_true", help="print environment and commands, and start nothing")
        one.add_argument("--skip_checks", action="store_true", help="start the training at once")
        one.add_argument("--check_only", action="store_true", help="stop after the checks")
        one.add_argument("--check_timeout", type=seconds, default=300, metavar="SECONDS", help="for any check (300)")
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    options, others = parser.parse_known_args(given[:end])
    if options.skip_checks and options.check_only:
        parser.error("--skip_checks and --check_only leave nothing to do")
    return options, others + given[end + 1 :]


def plan_node(options: argparse.Namespace, device: str, environment: dict[str, str]) -> Launch:
    ranks = options.cpu_ranks or options.gpus or count_gpus()
    if not ranks:
        raise UserError("this machine has no GPU that torch can use; rehearse on the CPU with --cpu_ranks N")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return launch_on_node(ranks, device, options.master_port or DEFAULT_PORT, visible, environment)


def plan_cluster(options: argparse.Namespace, device: str, environment: dict[str, str]) -> Launch:
    nodes = read_hostfile(options.hostfile)
    address = options.master_addr or nodes[0].host
    place = (address, options.master_port or DEFAULT_PORT, options.node_rank)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return launch_on_hosts(options.hostfile, nodes, device, *place, visible, environment)


def plan_slurm(options: argparse.Namespace, device: str, environment: dict[str, str]) -> Launch:
    job = os.environ.get("SLURM_JOB_ID")
    if job is None and not options.dry_run:
        raise UserError("this is no Slurm job: submit it with `sbatch launch/slurm.sbatch ...`, or look with --dry_run")
    hosts = [socket.gethostname()] if job is None else hosts_of_job()
    present = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    if present and options.gpus and options.gpus > present:
        raise UserError(
            f"--gpus {options.gpus}: the job has {present} GPUs on a node; ask for fewer, or submit it with "
            f"--gpus-per-node {options.gpus}"
        )
    ranks = options.cpu_ranks or options.gpus or present
    if not ranks:
        raise UserError("the job has no GPUs: submit it with --gpus-per-node N, or rehearse with --cpu_ranks N")
    own = 20_000 + int(job or 0) % 10_000  # nodes may be shared with other jobs
    return launch_in_slurm(hosts, ranks, device, options.master_port or own, environment)


PLANS = {"node": plan_node, "cluster": plan_cluster, "slurm": plan_slurm}


def leave_at_the_limit(*_) -> NoReturn:
    """Of a job whose limit is near before its training has begun."""
    raise UserError(
        f"job {os.environ.get('SLURM_JOB_ID')} was told of its limit before the training began; it is not queued "
        "again: submit it with a longer --time (the signal comes as far ahead as --signal in slurm.sbatch says)"
    )


def main() -> int:
    interrupt_on_termination()
    options, arguments = parse_arguments()
    if options.kind == "slurm":
        signal.signal(signal.SIGUSR1, leave_at_the_limit)
    # Mistakes are told here, once, before anything starts.
    given = parse_pretrain_arguments(arguments, SCRIPTS[options.kind])
    if given.help_config or given.list_presets or given.print_config:
        os.execv(sys.executable, [sys.executable, PRETRAIN, *arguments])  # it starts nothing
    run = load_run_config(given.preset, given.overrides)
    if given.ds_config:
        load_engine_config(given.ds_config)
    device = "cpu" if (options.cpu if options.kind == "cluster" else options.cpu_ranks) else "cuda"
    launch = PLANS[options.kind](options, device, decided_environment(device))
    training = launch.command(PRETRAIN, arguments)
    check = launch.check_command(arguments, options.check_timeout)
    commands = ([] if options.skip_checks else [check]) + ([] if options.check_only else [training])
    if options.dry_run:
        print(*describe(launch.environment), *map(shlex.join, commands), sep="\n")
        if launch.through_pdsh and not options.check_only:
            print(f"# the last word, on every node: {shlex.join([PRETRAIN, *arguments])}")
        return 0
    check_locally(launch)
    environment = {name: value for name, value in (os.environ | launch.environment).items() if value}
    if not options.skip_checks:
        nodes = ", ".join(f"{node.slots} on {node.host}" for node in launch.nodes)
        print(f"checks of {launch.world_size} ranks: {nodes}", flush=True)
        code = run_check(check, environment)
        if code not in (0, USER_ERROR_EXIT_CODE):  # else a rank has said why
            print(f"error: the checks ended with exit code {code}; no training is started", file=sys.stderr)
        if code or options.check_only:
            return code
    if options.kind == "slurm":
        return train_in_job(training, environment, given.run_dir or Path("runs") / run.name)
    os.execvpe(training[0], training, environment)


if __name__ == "__main__":
    run_command(main)
