#!/usr/bin/env bash
# The main job on any machine: installs megaslm into .venv if need be, pretrains the quickstart preset, exports the model
# to a Hugging Face folder, proves the export equal, and lets the exported model write something.
#   bash launch/quickstart.sh [arguments of launch/pretrain.py, as in train.max_steps=100]
# Paths among the arguments are relative to the repository.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/launch/install.sh"
cd "$root"
export PATH="$root/.venv/bin:$PATH"

run_dir="" previous="" dry_run=""
for argument in "$@"; do
    case "$argument" in
    -h | --help | --help_config | --list_presets | --print_config) exec python launch/pretrain.py "$@" ;;
    --dry_run) dry_run=yes ;;
    --run_dir=*) run_dir="${argument#*=}" ;;
    esac
    [ "$previous" = --run_dir ] && run_dir="$argument"
    previous="$argument"
done
if [ -z "$run_dir" ]; then
    config="$(python launch/pretrain.py --print_config "$@")" # a mistake among the arguments is told here, and ends this
    run_dir="runs/$(python -c 'import json, sys; print(json.load(sys.stdin)["name"])' <<<"$config")"
fi

launcher=(deepspeed --log_level error) # of the launcher only, which is chatty
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    # Left alone the launcher starts a rank per NUMA node, and warns that it chose the CPU.
    export DS_ACCELERATOR=cpu
    launcher+=(--num_accelerators 1)
else
    launcher+=(--num_gpus 1) # a model this small and a batch of 8 gain nothing from more
fi
"${launcher[@]}" launch/pretrain.py --ds_config ds_configs/zero2.json "$@"

[ -z "$dry_run" ] || exit 0
echo
python tools/convert_to_hf.py --checkpoint "$run_dir" --output "$run_dir/export" --overwrite
echo
python tools/generate.py --model "$run_dir/export" --prompt $'def main():\n' --max_new_tokens 60
