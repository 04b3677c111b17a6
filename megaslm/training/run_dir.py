"""The run's folder: it explains itself. config.json, engine.json, environment.json, metrics.jsonl, checkpoints/ ..."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megaslm.config import RunConfig
from megaslm.errors import UserError
from megaslm.parallel import Ranks
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


def environment(ranks: Ranks, precision: str) -> dict:
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
        "ranks_on_this_machine": ranks.local_world_size,
        "threads_per_rank": ranks.num_threads,
        "precision": precision,
        "kernels": "reference",
    }


def write_json(path: Path, value: object) -> None:
    """Replace `path` in one move, so that a reader or a kill never meets half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def open_run_dir(run_dir: Path, run: RunConfig, engine_config: dict, facts: dict) -> None:
    """Make the folder and write what is known before the first step. Raises UserError if it can't be written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / "config.json", run.model_dump(mode="json"))
        write_json(run_dir / "engine.json", engine_config)
        write_json(run_dir / "environment.json", facts)
    except OSError as error:
        raise UserError(
            f"cannot write the run folder {run_dir}: {error.strerror}; choose another with --run_dir"
        ) from error
