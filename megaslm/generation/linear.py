"""Products of a few rows with large matrices, as generation has them, at the speed of a CPU's memory.

PyTorch gives fp32 products to MKL, which on some CPUs reads the matrix of a few rows at a quarter to a half of the
memory's speed. oneDNN, which PyTorch is built with too and takes for bf16, reads it at full speed.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, without gradients: x [..., I], weight [O, I], bias [O] -> [..., O]."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and HAS_ONEDNN:
        # The op that torch.compile gives a linear layer on a CPU; there is no public name for it.
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@contextmanager
def fast_linear_layers(model: nn.Module) -> Iterator[None]:
    """Within it, every nn.Linear of `model` computes by `linear`; layers whose `forward` somebody has replaced keep it.

    For the whole process: another thread that runs the same model meanwhile gets these products too, without gradients.
    Threads may generate with one model side by side; the first to end makes the others slower, and changes their
    logits in the last bits.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in module.__dict__]
    try:
        for layer in layers:
            layer.forward = functools.partial(_forward, layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)
