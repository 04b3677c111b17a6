"""What `launch` compiles anew and what it does not, on the stub driver. Exits with an error where it errs."""

import stub_driver
import torch
import triton
import triton.language as tl
from megaslm_kernels.launch import launch

compiled = stub_driver.launch._compiled


@triton.jit(do_not_specialize=["count"])
def fill(y, count, VALUE: tl.constexpr):
    offsets = tl.arange(0, 32)
    tl.store(y + offsets, (offsets * 0 + VALUE).to(y.dtype.element_ty), mask=offsets < count)


@triton.jit
def specialised(y, count, VALUE: tl.constexpr):
    tl.store(y + count, VALUE)


def kernels_after(y: torch.Tensor, count: int, value: float) -> int:
    launch(fill, 4, y, count, VALUE=value, num_warps=1)
    return len(compiled)


def main() -> None:
    y = torch.empty(64)
    assert kernels_after(y, 5, 1.0) == 1
    assert kernels_after(y, 16, 1.0) == 1, "a count that 16 divides is a count"
    assert kernels_after(torch.empty(64), 1, 1.0) == 1, "and so is one"
    assert kernels_after(y[1:], 5, 1.0) == 2, "128-bit loads need an aligned tensor"
    assert kernels_after(y.bfloat16(), 5, 1.0) == 3
    assert kernels_after(y, 5, 2.0) == 4
    assert kernels_after(y, 2**31, 1.0) == 5, "a count of 64 bits"
    launch(fill, 0, torch.empty(0), 5, VALUE=3.0, num_warps=1)
    assert len(compiled) == 5, "no program, no launch"
    signatures = [kernel.src.signature["count"] for kernel in compiled.values()]
    assert signatures == ["i32", "i32", "i32", "i32", "i64"], signatures
    for kernel, constants in ((specialised, {"VALUE": 1.0}), (fill, {"VALUES": 9.0})):
        try:
            launch(kernel, 4, y, 5, **constants, num_warps=1)
        except AssertionError:
            continue
        raise SystemExit(f"{kernel.__name__} was launched with {constants}")


main()
