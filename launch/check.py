#!/usr/bin/env python3
"""Check the machines, the data and the network of a run, as all of its ranks. Started by launch/start.py, by the same
launcher as the training, before it: `deepspeed launch/check.py --device cuda --hosts '{"HOST": N, ...}' -- ARGUMENTS`,
those of launch/pretrain.py.
"""

import argparse
import os
import threading
import time
from pathlib import Path

from pretrain import parse_arguments as parse_pretrain_arguments

from megaslm import launchers
from megaslm.cluster import DEVICES, check_ranks, hosts_of_ranks
from megaslm.commands import INTERRUPTED_EXIT_CODE, run_command
from megaslm.config import default_engine_config, load_engine_config, load_run_config

SECONDS_BETWEEN_LOOKS = 0.5


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEVICES, required=True, help="what the ranks compute on")
    parser.add_argument("--hosts", required=True, metavar="JSON", help="ranks of each machine, in their order")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that a rank may take for a step (300)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="-- and those of launch/pretrain.py")
    return parser.parse_args()


def leave_with_the_launcher() -> None:
    """A launcher that is killed leaves its ranks to nobody: they would hold the port and their GPUs."""
    while launchers.find_launchers()[: len(launchers.AT_START)] == launchers.AT_START:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(INTERRUPTED_EXIT_CODE)


def main() -> None:
    threading.Thread(target=leave_with_the_launcher, daemon=True).start()
    options = parse_arguments()
    given = parse_pretrain_arguments(options.arguments[1:])
    run = load_run_config(given.preset, given.overrides)
    engine_file = load_engine_config(given.ds_config) if given.ds_config else default_engine_config()
    beside = {
        "--run_dir": str(given.run_dir or Path("runs") / run.name),
        "--resume": given.resume,
        "--from": str(given.weights_from) if given.weights_from else None,
        "--dry_run": given.dry_run,
    }
    hosts = hosts_of_ranks(options.hosts)
    check_ranks(run, engine_file, beside, options.device, hosts, options.timeout, lambda line: print(line, flush=True))


if __name__ == "__main__":
    # Read when torch is imported: its store writes a screen of C++ frames where a rank is gone or can't be reached,
    # beside our message.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    run_command(main)
