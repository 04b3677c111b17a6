#!/usr/bin/env bash
# The main job on any machine: installs megaslm into .venv if need be, then pretrains the quickstart preset.
#   bash launch/quickstart.sh [arguments of launch/pretrain.py, as in train.max_steps=100]
# Paths among the arguments are relative to the repository.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/launch/install.sh"
cd "$root"
export PATH="$root/.venv/bin:$PATH"

launcher=(deepspeed --log_level error) # of the launcher only, which is chatty
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    # Left alone the launcher starts a rank per NUMA node, and warns that it chose the CPU.
    export DS_ACCELERATOR=cpu
    launcher+=(--num_accelerators 1)
else
    launcher+=(--num_gpus 1) # a model this small and a batch of 8 gain nothing from more
fi
exec "${launcher[@]}" launch/pretrain.py --ds_config ds_configs/zero2.json "$@"
