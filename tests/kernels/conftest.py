"""Tests whose work is a process of its own that imports everything anew; fork_ranks serves all others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def python():
    """python(argument, ...) -> the finished process of the interpreter, with one thread."""

    def run(*arguments) -> subprocess.CompletedProcess:
        # As pytest finds them in pyproject.toml, installed or not.
        paths = os.pathsep.join(map(str, filter(None, (ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH")))))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)

    return run
