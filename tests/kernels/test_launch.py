"""The cache of compiled kernels: one entry for all that one compilation serves, and never one too few."""

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")


def test_what_is_compiled_anew(fork_ranks):
    run = fork_ranks(Path(__file__).with_name("launch_keys.py"), [], None)
    assert run.code == 0, run.out + run.err
