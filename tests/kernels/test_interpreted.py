"""The interpreter's tests, a process for each file: Triton decides when a kernel is defined whether to interpret it."""

import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")
FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))
PYTEST = ("TRITON_INTERPRET=1", "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider")


@pytest.mark.parametrize(
    "command", [(*PYTEST, str(file)) for file in FILES], ids=[file.stem.removeprefix("test_") for file in FILES]
)
def test_interpreted_kernels(processes, command):
    run = processes(command)
    assert run.returncode == 0, run.stdout + run.stderr
    # Not one skipped, deselected or expected to fail.
    assert re.fullmatch(r"[1-9]\d* passed(, \d+ warnings?)? in .*", run.stdout.strip().splitlines()[-1]), run.stdout
