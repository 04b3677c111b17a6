"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467).

y = x / sqrt(mean(x^2) + eps) * weight        over the last dimension, statistics in fp32
"""

import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of `x` [..., N] and scale it by `weight` [N]. Returns x's shape and type."""
    return F.rms_norm(x, weight.shape, weight, eps)
