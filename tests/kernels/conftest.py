"""Tests whose work is a process of its own: all of them that were selected run two at a time."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def processes(request):
    """processes(command) -> the finished process of `python command`, which the test has as its parameter `command`.

    A leading (NAME=VALUE) of the command is set in its environment.
    """
    selected = (getattr(item, "callspec", None) for item in request.session.items)
    commands = dict.fromkeys(spec.params["command"] for spec in selected if spec and "command" in spec.params)
    with ThreadPoolExecutor(2) as pool:
        running = {command: pool.submit(_run, command) for command in commands}
        yield lambda command: running[command].result()
        pool.shutdown(cancel_futures=True)


def _run(command: tuple[str, ...]) -> subprocess.CompletedProcess:
    name, is_setting, value = command[0].partition("=")
    setting = {name: value} if is_setting else {}
    # As pytest finds them in pyproject.toml, installed or not.
    paths = os.pathsep.join(map(str, filter(None, (ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH")))))
    # One thread each: there are two of them, and the tensors are small.
    return subprocess.run(
        [sys.executable, *command[bool(is_setting) :]],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | setting,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
