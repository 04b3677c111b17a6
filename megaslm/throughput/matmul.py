"""How fast the device multiplies matrices when it does nothing else: what a training step could reach at best."""

import statistics
import time
from collections.abc import Callable

import torch

# Large enough that a GPU is full and its launches do not count; a processor core is full much sooner.
WIDTH_ON_GPU, WIDTH_ON_CPU = 8192, 1024
REPEATS, WARM_UP = 20, 3
QUEUED = 10  # between two events on a GPU, which the launch of the first does not keep waiting for long


def matmul_flops(dtype: torch.dtype, device: torch.device, width: int | None = None) -> float:
    """FLOP/s of products of two square matrices of the given type, of any `width`: the median of REPEATS."""
    width = width or (WIDTH_ON_GPU if device.type == "cuda" else WIDTH_ON_CPU)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(width, width, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> None:
        torch.mm(a, b, out=out)

    for _ in range(WARM_UP):
        seconds_of(product, device)
    return 2 * width**3 / statistics.median(seconds_of(product, device) for _ in range(REPEATS))


def seconds_of(work: Callable[[], None], device: torch.device) -> float:
    """What `work` takes the device, once."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(QUEUED):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / QUEUED
