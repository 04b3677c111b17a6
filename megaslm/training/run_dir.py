"""The run's folder: it explains itself. config.json, engine.json, environment.json, metrics.jsonl, checkpoints/ ..."""

import fcntl
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

import torch

from megaslm.config import RunConfig, save_run_config
from megaslm.errors import UserError
from megaslm.parallel import Ranks
from megaslm.reports import write_json
from megaslm.training.device import device_name

PACKAGES = ("megaslm", "torch", "deepspeed", "triton", "transformers", "tokenizers", "safetensors", "numpy", "pydantic")


def code_version() -> str | None:
    """The git commit that runs, with "-dirty" where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(ranks: Ranks, precision: str, kernels: str) -> dict:
    """Everything about the machine and the versions that may change a number."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command": sys.argv,
        "code_version": code_version(),
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "device": device_name(ranks.device),
        "ranks": ranks.world_size,
        "data_parallel_ranks": ranks.data_parallel_size,
        "tensor_parallel_ranks": ranks.tensor_parallel.size,
        "ranks_on_this_machine": ranks.local_world_size,
        "threads_per_rank": ranks.num_threads,
        "precision": precision,
        "kernels": kernels,
        **(_cuda_versions() if ranks.device.type == "cuda" else {}),
    }


def _cuda_versions() -> dict:
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "gpus_on_this_machine": torch.cuda.device_count(),
    }


class RunLock:
    """The run folder, taken for this process until the end of the `with`, or of the process. Used by rank 0.

    Two runs in one folder would delete each other's half-written checkpoints.
    """

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir
        self._file: IO | None = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def take(self) -> None:
        """Take it, if that is not done yet; makes the folder.

        Raises:
            UserError: another run has it, or it can't be written.
        """
        if self._file is not None:
            return
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            file = (self._run_dir / ".lock").open("a+")
        except OSError as error:
            raise _cannot_write(self._run_dir, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{self._run_dir} is in use by another run ({file.read().strip()}); wait for its end, "
                "or choose another --run_dir"
            ) from None
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        self._file = file


def open_run_dir(run_dir: Path, run: RunConfig, engine_config: dict, facts: dict, step: int) -> None:
    """Write what is known before the next step; what an earlier process wrote is kept under before_step_N.

    Raises UserError if the folder can't be written.
    """
    try:
        if step and (run_dir / "environment.json").exists():
            earlier = run_dir / f"before_step_{step:08d}"
            earlier.mkdir(exist_ok=True)
            for name in ("config.json", "engine.json", "environment.json"):
                # What is there stays: a kill came between these moves, or no step of the process after it was saved.
                if not (earlier / name).exists() and (run_dir / name).exists():
                    os.replace(run_dir / name, earlier / name)
        save_run_config(run, run_dir / "config.json")
        write_json(run_dir / "engine.json", engine_config)
        write_json(run_dir / "environment.json", facts)
    except OSError as error:
        raise _cannot_write(run_dir, error) from error


def _cannot_write(run_dir: Path, error: OSError) -> UserError:
    return UserError(f"cannot write the run folder {run_dir}: {error.strerror}; choose another with --run_dir")
