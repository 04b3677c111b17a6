"""The interpreter's tests, a process for each file: Triton decides when a kernel is defined whether to interpret it."""

import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")
FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))
PYTEST = Path(pytest.__file__).with_name("__main__.py")
OPTIONS = ("-q", "--no-header", "-p", "no:cacheprovider")


@pytest.mark.parametrize("file", FILES, ids=[file.stem.removeprefix("test_") for file in FILES])
def test_interpreted_kernels(fork_ranks, file):
    run = fork_ranks(PYTEST, [*OPTIONS, file], None, env={"TRITON_INTERPRET": "1"})
    assert run.code == 0, run.out + run.err
    # Not one skipped, deselected or expected to fail.
    assert re.fullmatch(r"[1-9]\d* passed(, \d+ warnings?)? in .*", run.out.strip().splitlines()[-1]), run.out
