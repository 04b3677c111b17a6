"""A sound kernel, and one for every rule of test_compiled.py that breaks it; printed as compile_presets.py does."""

import json
from dataclasses import asdict

import stub_driver
import torch
import triton
import triton.language as tl
from megaslm_kernels.launch import launch


@triton.jit
def copy(x, y, STRIDE: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, N)
    tl.store(y + row * N + columns, tl.load(x + row * STRIDE + columns))


@triton.jit
def copy_by_32_bit_offsets(x, y, STRIDE: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, N)
    tl.store(y + row * N + columns, tl.load(x + row.to(tl.int64) * STRIDE + columns))


@triton.jit
def scale_in_fp64(x, y, STRIDE: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, N)
    tl.store(y + row * N + columns, (tl.load(x + row * STRIDE + columns).to(tl.float64) * 1.1).to(y.dtype.element_ty))


@triton.jit
def normalise(x, y, STRIDE: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, N)
    values = tl.load(x + row * STRIDE + columns).to(tl.float32)
    tl.store(y + row * N + columns, (values / tl.sum(values)).to(y.dtype.element_ty))


BROKEN = {
    "nothing": (copy, 1024, 1024, 4),
    "registers": (normalise, 4096, 4096, 1),
    "local memory": (normalise, 16384, 16384, 1),
    "fp64": (scale_in_fp64, 1024, 1024, 4),
    "32-bit offsets": (copy_by_32_bit_offsets, 1024, 1024, 4),
    "loads": (copy, 1025, 1024, 4),
}
"""The rule that is broken, as test_compiled.py words it -> kernel, stride of a row, its length, warps."""


def main() -> None:
    for rule, (kernel, stride, n, num_warps) in BROKEN.items():
        x, y = (torch.empty(8, n, dtype=torch.bfloat16, device="meta") for _ in range(2))
        launch(kernel, 8, x, y, STRIDE=stride, N=n, num_warps=num_warps)
        machine = asdict(stub_driver.inspect_kernel(list(stub_driver.launch._compiled.values())[-1]))
        print(
            json.dumps({"op": "broken", "direction": "forward", "shape": [8, n], "row": n} | machine | {"name": rule})
        )


main()
