"""Facts about the device: its name, peak rate, the precision it is good at, and the memory a run has used."""

import functools
import os
import platform

import torch
from megaslm_kernels import BackendUnavailable, Ops, attention_obstacle, prefer_attention, select_backend

from megaslm.config import RunConfig
from megaslm.errors import UserError
from megaslm.model import DTYPES
from megaslm.parallel import PEAK_BF16_FLOPS


@functools.cache
def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in _cpuinfo_lines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of one device in FLOP/s, or None where it is not known."""
    return PEAK_BF16_FLOPS.get(device_name(device)) if device.type == "cuda" else None


def preferred_precision(device: torch.device) -> str:
    """bf16 where the hardware multiplies it (CUDA sm_80 and later, CPUs with AMX or AVX512-BF16), else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "bf16" if {"amx_bf16", "avx512_bf16"} & _cpu_flags() else "fp32"


def check_precision(precision: str, device: torch.device) -> None:
    """Raise UserError where DeepSpeed has no arithmetic of that type for the device (fp16 on most processors)."""
    from deepspeed.accelerator import get_accelerator

    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise UserError(
            f"fp16 is not supported on {device_name(device)}; use train.precision={preferred_precision(device)}"
        )
    if precision == "bf16" and not get_accelerator().is_bf16_supported():
        raise UserError(f"bf16 is not supported on {device_name(device)}; use train.precision=fp32")


def choose_kernels(name: str, device: torch.device) -> Ops:
    """The ops of train.kernels=`name`. Raises UserError where they do not run."""
    try:
        return select_backend(name, device)
    except BackendUnavailable as error:
        raise UserError(f"train.kernels={name}: {error}; use train.kernels=auto or reference") from error


def choose_attention(run: RunConfig, precision: str, device: torch.device, tensor_parallel_size: int) -> None:
    """Prefer the attention of train.attention in this process. Raises UserError where it does not run."""
    name, model = run.train.attention, run.model
    if name != "auto" and not run.data.mask_documents:  # with which it has no effect
        heads, kv_heads = (max(1, count // tensor_parallel_size) for count in (model.num_heads, model.num_kv_heads))
        sizes = heads, kv_heads, model.head_dim, run.seq_length
        if obstacle := attention_obstacle(name, device, DTYPES[precision], *sizes):
            raise UserError(
                f"train.attention={name} does not run on {device_name(device)} in {precision} with heads of "
                f"{model.head_dim}: {obstacle}; use train.attention=auto"
            )
    prefer_attention(name)


def _cpu_flags() -> set[str]:
    for line in _cpuinfo_lines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


@functools.cache
def _cpuinfo_lines() -> tuple[str, ...]:
    if not os.path.exists("/proc/cpuinfo"):
        return ()
    with open("/proc/cpuinfo") as file:
        return tuple(file.read().splitlines())
