"""The cache of compiled kernels: one entry for all that one compilation serves, and never one too few."""

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")


@pytest.mark.parametrize("command", [(str(Path(__file__).with_name("launch_keys.py")),)], ids=["keys"])
def test_what_is_compiled_anew(processes, command):
    run = processes(command)
    assert run.returncode == 0, run.stdout + run.stderr
