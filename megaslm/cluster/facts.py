"""What one rank can say of its command, its machine and its GPU, as JSON values: nothing is judged here."""

import hashlib
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import megaslm
from megaslm.config import RunConfig
from megaslm.data import PYTHON_STDLIB, TokenFile
from megaslm.errors import UserError, first_line
from megaslm.resources import available_memory

ROOT = Path(megaslm.__file__).resolve().parents[1]
SOURCES = ("megaslm/**/*.py", "megaslm/**/*.json", "kernels/**/*.py", "launch/*.py")
PACKAGES = ("torch", "deepspeed", "triton", "numpy")
DRIVER = Path("/proc/driver/nvidia/version")


def node_facts(run: RunConfig, engine_file: dict, options: dict[str, Any]) -> dict[str, Any]:
    """What all ranks of a machine have in common. options: those of launch/pretrain.py beside the configs."""
    return {
        "settings": options | _flat(engine_file, "--ds_config ") | _flat(run.model_dump(mode="json")),
        "code": source_hashes(),
        "versions": package_versions(),
        "data": data_facts(run, options.get("--from")),
        "free_memory": available_memory(),
        "driver": driver_version(),
    }


def _flat(section: dict, before: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, every name with `before` in front."""
    values = {}
    for name, value in section.items():
        inner = isinstance(value, dict) and value
        values |= _flat(value, f"{before}{name}.") if inner else {f"{before}{name}": value}
    return values


def source_hashes(root: Path = ROOT) -> dict[str, str]:
    """First 16 hex digits of the SHA-256 of every source file that a rank may import, by its path in the repository."""
    paths = sorted(path for pattern in SOURCES for path in root.glob(pattern))
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths}


def package_versions() -> dict[str, str]:
    """Of Python and of the packages that decide the numbers, "-" where one is not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "-"
    return found


def driver_version() -> str | None:
    """Of NVIDIA's kernel module; None where there is none."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", DRIVER.read_text())
    except OSError:
        return None
    return found[1] if found else None


def data_facts(run: RunConfig, weights_from: str | None = None) -> dict[str, str]:
    """By file that the run reads: what tells its content, or "missing: ..." with the reason.

    weights_from: a checkpoint or a run folder, which is one of them.
    Token files are told by `TokenFile.fingerprint`, raw text by its size: rank 0 alone reads it.
    """
    data = run.data
    validation = data.validation.values() if isinstance(data.validation, dict) else [data.validation]
    prefixes = [dataset.prefix for dataset in data.train] + [prefix for prefixes in validation for prefix in prefixes]
    found = {}
    for prefix in dict.fromkeys(prefixes):
        try:
            found[prefix] = TokenFile(prefix).fingerprint
        except (UserError, OSError) as error:
            found[prefix] = f"missing: {error}"
    for name in data.input:
        if name != PYTHON_STDLIB and not any(character in name for character in "*?["):
            found[name] = f"{os.path.getsize(name)} bytes" if os.path.isfile(name) else _folder(name)
    for name in filter(None, (run.tokenizer.path, weights_from)):
        found[name] = _folder(name)
    return found


def _folder(name: str) -> str:
    return f"{len(os.listdir(name))} files" if os.path.isdir(name) else "missing: no such file or folder"


def device_facts(device: str, local_rank: int) -> dict[str, Any]:
    """The GPU of this rank: its number here, name, bytes, bytes in use, and what torch can do with it; {} for a CPU
    rank.

    "fault" alone where it can't be used.
    """
    import torch

    if device == "cpu":
        return {}
    if torch.version.cuda is None:
        return {"fault": f"torch {torch.__version__} is built without CUDA; install a CUDA build of it"}
    count = torch.cuda.device_count()
    if not torch.cuda.is_available():
        driver = driver_version()
        text = f"the driver {driver} is too old for CUDA {torch.version.cuda} of torch, or does not answer: nvidia-smi"
        return {"fault": text if driver else "there is no NVIDIA driver here"}
    if local_rank >= count:
        return {"fault": f"{count} GPUs are there, and this is local rank {local_rank}; start fewer ranks a node"}
    try:
        free, total = torch.cuda.mem_get_info(local_rank)
    except RuntimeError as error:
        return {"fault": f"GPU {local_rank} can't be used: {first_line(error)}"}
    properties = torch.cuda.get_device_properties(local_rank)
    return {
        "index": local_rank,
        "name": properties.name,
        "uuid": str(properties.uuid),
        "architecture": f"sm_{properties.major}{properties.minor}",
        "architectures": torch.cuda.get_arch_list(),
        "bytes": total,
        "used": total - free,
        "cuda": torch.version.cuda,
    }
