"""Where and in which arithmetic a model is evaluated."""

from dataclasses import dataclass

import torch
from megaslm_kernels import Ops, select_backend

from megaslm.errors import UserError
from megaslm.model import DTYPES


@dataclass(frozen=True)
class Placement:
    """The arguments of `ModelSource.build`."""

    device: torch.device
    dtype: torch.dtype
    ops: Ops

    def __str__(self) -> str:
        dtype = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        return f"{dtype} on {self.device}, {self.ops.backend} kernels"


def choose_placement(device: str | None, dtype: str) -> Placement:
    """device: as torch spells them; None: the GPU if there is one. dtype: a key of DTYPES.

    The kernels are the fused ones where they run. UserError for a device that this machine does not have.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        usable = found.type != "meta"  # which has no numbers
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError):  # an AssertionError of a torch without CUDA
        usable = False
    if not usable:
        raise UserError(
            f"the device {name} is not there (this torch sees {torch.cuda.device_count()} GPUs); give cpu, cuda or "
            "cuda:1, or leave it out"
        )
    return Placement(found, DTYPES[dtype], select_backend("auto", found))
