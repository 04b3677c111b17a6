"""The memory that this process has used."""

import resource
import sys

import torch


def memory_used(device: torch.device) -> dict[str, int]:
    """Peak bytes: allocated and reserved on a GPU, resident set of the process on a CPU."""
    if device.type == "cuda":
        return {
            "memory_bytes": torch.cuda.max_memory_allocated(device),
            "memory_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory_bytes": peak if sys.platform == "darwin" else peak * 1024}
