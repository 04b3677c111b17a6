#!/usr/bin/env bash
# Installs megaslm with its test tools into .venv if need be, then runs the linter, the format check and the tests.
#   bash tests/run.sh [arguments of pytest, as in tests/config -k engine]
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/launch/install.sh" dev
cd "$root"
export PATH="$root/.venv/bin:$PATH"

ruff check .
ruff format --check .
[ $# -eq 0 ] || exec python -m pytest "$@"
python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m "not alone"
# Of the files that have one: to collect all takes longer than these tests.
mapfile -t alone < <(grep -rl --include='test_*.py' 'pytest\.mark\.alone' tests)
exec python -m pytest -m alone "${alone[@]}"
