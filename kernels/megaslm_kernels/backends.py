"""The two backends of every op, and the choice between them, made once per process."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megaslm_kernels import _triton
from megaslm_kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from megaslm_kernels.cross_entropy import cross_entropy, shard_gradient_, shard_statistics
from megaslm_kernels.cross_entropy_formulas import (
    cross_entropy_reference,
    shard_gradient_reference_,
    shard_statistics_reference,
)
from megaslm_kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    sharded_linear_cross_entropy,
    sharded_linear_cross_entropy_reference,
)
from megaslm_kernels.qk_norm_rotary import qk_norm_rotary, qk_norm_rotary_reference
from megaslm_kernels.rms_norm import rms_norm, rms_norm_reference
from megaslm_kernels.rotary import rotary, rotary_reference
from megaslm_kernels.swiglu import swiglu, swiglu_reference


@dataclass(frozen=True)
class Ops:
    """What a decoder is computed with. Every field is documented at its `*_reference`."""

    backend: str
    """`reference` or `triton`: printed and recorded with every run."""
    rms_norm: Callable
    add_rms_norm: Callable
    rotary: Callable
    qk_norm_rotary: Callable
    swiglu: Callable
    cross_entropy: Callable
    shard_statistics: Callable
    """With the next one, what a vocabulary-parallel loss is made of. Neither is differentiable or seen by the compiler:
    they stand inside that loss's own op."""
    shard_gradient_: Callable
    linear_cross_entropy: Callable
    sharded_linear_cross_entropy: Callable


REFERENCE = Ops(
    "reference",
    rms_norm_reference,
    add_rms_norm_reference,
    rotary_reference,
    qk_norm_rotary_reference,
    swiglu_reference,
    cross_entropy_reference,
    shard_statistics_reference,
    shard_gradient_reference_,
    linear_cross_entropy_reference,
    sharded_linear_cross_entropy_reference,
)
"""PyTorch's own operations, on any device."""

TRITON = Ops(
    "triton",
    rms_norm,
    add_rms_norm,
    rotary,
    qk_norm_rotary,
    swiglu,
    cross_entropy,
    shard_statistics,
    shard_gradient_,
    linear_cross_entropy,
    sharded_linear_cross_entropy,
)
"""Our fused kernels, on CUDA devices (or, under TRITON_INTERPRET=1, on CPU tensors)."""


class BackendUnavailable(RuntimeError):
    """The backend that was asked for does not run here; the message says why."""


def select_backend(name: str, device: torch.device) -> Ops:
    """The ops of backend `name` for tensors on `device`.

    auto: triton where it runs, else reference (`triton_obstacle` says why). Raises BackendUnavailable where triton is
    asked for and does not run: there is no silent fallback.
    """
    if name == "reference":
        return REFERENCE
    obstacle = triton_obstacle(device)
    if obstacle is None:
        return TRITON
    if name == "auto":
        return REFERENCE
    raise BackendUnavailable(f"the triton kernels do not run here: {obstacle}")


def triton_obstacle(device: torch.device) -> str | None:
    """Why the triton backend does not run on `device`; None where it does."""
    if not _triton.AVAILABLE:
        return "triton is not installed (it exists for Linux)"
    if torch.version.hip:
        return "they were never tried on ROCm"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):  # no bf16, and the end of Triton's support
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
        return _triton.fault()
    if device.type == "cpu" and _triton.INTERPRETED:
        return None
    return f"the device is {device.type}, they need CUDA"
