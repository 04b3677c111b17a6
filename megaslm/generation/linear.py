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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, without gradients: x [..., I], weight [O, I], bias [O] -> [..., O]."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and weight.dtype == x.dtype and _has_onednn():
        # The op that torch.compile gives a linear layer on a CPU; there is no public name for it.
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@contextmanager
def fast_linear_layers(model: nn.Module) -> Iterator[None]:
    """Within it, every nn.Linear of `model` computes by `linear`."""
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    try:
        for layer in layers:
            layer.forward = functools.partial(_forward, layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
