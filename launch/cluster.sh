#!/usr/bin/env bash
# Pretrains on the nodes of a hostfile (a line `HOST slots=N` for each, the first is the master): checks all of them,
# then starts launch/pretrain.py through deepspeed. The same command continues an interrupted run.
#   bash launch/cluster.sh --hostfile FILE [--dry_run] [arguments of pretrain.py]
#       on the first node: the others are started by pdsh, over ssh without a password.
#   bash launch/cluster.sh --hostfile FILE --node_rank K [arguments of pretrain.py]
#       on every node K = 0, 1, ...: nothing but the network between them is needed.
# Every node has this repository and its .venv at the same path, and sees the same data and run folder. --help has the
# other options. Paths among the arguments are relative to the repository.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ ! -d .venv/bin ] || export PATH="$PWD/.venv/bin:$PATH"
source launch/env_h200.sh # its defaults end in start.py where the ranks are CPU ranks
exec python launch/start.py cluster "$@"
