#!/usr/bin/env bash
# Pretrains on this machine, on all of its GPUs: checks it, then starts launch/pretrain.py through deepspeed. The same
# command continues an interrupted run.
#   bash launch/node.sh [--gpus N | --cpu_ranks N] [--check_only | --skip_checks] [--dry_run] [arguments of pretrain.py]
# --dry_run prints the environment and the commands, and starts nothing. --help has the rest.
# Paths among the arguments are relative to the repository.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ ! -d .venv/bin ] || export PATH="$PWD/.venv/bin:$PATH"
source launch/env_h200.sh # its defaults end in start.py where the ranks are CPU ranks
exec python launch/start.py node "$@"
