#!/usr/bin/env bash
# Makes .venv in the repository and installs megaslm into it, unless that has been done with the same versions.
#   bash launch/install.sh [dev]      dev: with what the tests need
# PYTHON=/path/to/python3 chooses the interpreter.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
extra="${1:-}" # "" or dev
venv="$root/.venv"

fail() {
    echo "install: $*" >&2
    exit 1
}

case "$extra" in
    "" | dev) ;;
    *) fail "unknown extra '$extra'; there is dev, or none" ;;
esac

supported() { # whether the interpreter $1 is there and is one of the versions that setup.py allows
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1
}

quietly() { # run $2..., show its output only if it fails; $1 says what it does
    local what="$1" log
    shift
    log="$(mktemp)"
    echo "install: $what"
    if ! "$@" >"$log" 2>&1; then
        tail -n 30 "$log" >&2
        rm -f "$log"
        fail "$what failed (the last lines are above)"
    fi
    rm -f "$log"
}

if ! supported "$venv/bin/python"; then
    [ ! -e "$venv" ] || fail "$venv has no Python 3.11 to 3.13; remove it and start again"
    python=""
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
        if supported "$candidate"; then
            python="$candidate"
            break
        fi
    done
    [ -n "$python" ] || fail "no Python 3.11, 3.12 or 3.13 found; install one, or name it: PYTHON=/path/to/python3"
    quietly "making .venv with $("$python" --version)" "$python" -m venv "$venv"
fi

# The stamp holds a hash of what decides the versions; an install with the extra serves one without.
stamp="$("$venv/bin/python" - "$root/constraints.txt" "$root/setup.py" <<'PYTHON'
import hashlib, pathlib, sys
print(hashlib.sha256(b"".join(pathlib.Path(name).read_bytes() for name in sys.argv[1:])).hexdigest())
PYTHON
)"
for done in "$venv/.installed-${extra:-base}" "$venv/.installed-dev"; do
    if [ -f "$done" ] && [ "$(cat "$done")" = "$stamp" ]; then
        exit 0
    fi
done

cd "$root"
version() { sed -n "s/^$1==/$1==/p" constraints.txt; }
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --constraint constraints.txt)
# deepspeed comes as source, and its build imports torch, so it is built without isolation, after torch.
quietly "torch (some minutes on a new machine)" "${pip[@]}" "$(version torch)" "$(version setuptools)" \
    "$(version wheel)" "$(version numpy)" "$(version packaging)" "$(version psutil)" "$(version py-cpuinfo)"
quietly "megaslm and what it needs" "${pip[@]}" --no-build-isolation --editable ".${extra:+[$extra]}"
echo "$stamp" >"$venv/.installed-${extra:-base}"
