"""Host microseconds of one call, eager: our launchers, on a stub driver, and torch.nn.functional; printed as JSON.

The tensors are tiny and on the CPU, so that what is left is the host's work: checks, allocations, autograd, the launch.
The stub's launch itself does nothing; CUDA's takes about 2 us, in both columns alike on a GPU.
"""

import functools
import gc
import json
import time
from collections.abc import Callable

import stub_driver  # noqa: F401  (sets the driver)
import torch
import torch.nn.functional as F
from megaslm_kernels import REFERENCE, TRITON

ROUNDS, CALLS = 15, 200


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16).requires_grad_()


def cases() -> dict[str, tuple[Callable, Callable, list]]:
    """Name -> our op, the same from torch.nn.functional, the arguments."""
    x, residual, weight, head_weight = leaf(2, 64), leaf(2, 64), leaf(64), leaf(16)
    q, k = leaf(1, 2, 4, 16), leaf(1, 2, 2, 16)
    cos, sin = torch.randn(2, 8), torch.randn(2, 8)

    def add_rms_norm(x, residual, weight, eps):
        total = x + residual
        return total, F.rms_norm(total, weight.shape, weight, eps)

    return {
        "rms_norm": (TRITON.rms_norm, lambda x, w, eps: F.rms_norm(x, w.shape, w, eps), [x, weight, 1e-5]),
        "add_rms_norm": (TRITON.add_rms_norm, add_rms_norm, [x, residual, weight, 1e-5]),
        "swiglu": (TRITON.swiglu, REFERENCE.swiglu, [x]),
        "rotary": (TRITON.rotary, REFERENCE.rotary, [q, k, cos, sin]),
        "qk_norm_rotary": (
            TRITON.qk_norm_rotary, REFERENCE.qk_norm_rotary, [q, k, head_weight, head_weight, cos, sin, 1e-5],
        ),
        "cross_entropy": (
            TRITON.cross_entropy, lambda x, t: F.cross_entropy(x, t, reduction="none"), [x, torch.tensor([1, 2])],
        ),
        "linear_cross_entropy": (
            lambda *arguments: TRITON.linear_cross_entropy(*arguments)[0],
            lambda x, w, t: F.cross_entropy(F.linear(x, w), t, reduction="sum"),
            [x, leaf(32, 64), torch.tensor([1, 2])],
        ),
    }  # fmt: skip


def microseconds(function: Callable) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        function()
    return (time.perf_counter() - start) / CALLS * 1e6


def forward_backward(op: Callable, arguments: list) -> Callable:
    outputs = op(*arguments)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    upstream = [torch.ones_like(y) for y in outputs]
    wanted = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]

    def run():
        results = op(*arguments)
        torch.autograd.grad((results,) if isinstance(results, torch.Tensor) else results, wanted, upstream)

    return run


def main() -> None:
    torch.set_num_threads(1)
    for name, (ours, theirs, arguments) in cases().items():
        functions = {
            "forward": (functools.partial(ours, *arguments), functools.partial(theirs, *arguments)),
            "both": (forward_backward(ours, arguments), forward_backward(theirs, arguments)),
        }
        for direction, pair in functions.items():
            for function in pair:
                microseconds(function)
            gc.disable()
            rounds = [[microseconds(function) for function in pair] for _ in range(ROUNDS)]
            gc.enable()
            best = [min(column) for column in zip(*rounds, strict=True)]
            print(json.dumps({"op": name, "direction": direction, "ours": best[0], "torch": best[1]}))


main()
