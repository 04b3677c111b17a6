"""Gated SiLU (Shazeer 2020, arXiv:2002.05202) over a packed projection.

y = silu(gate) * up,   silu(z) = z * sigmoid(z),   gate = x[..., :F],  up = x[..., F:]
"""

import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """Combine `gate_up` [..., 2F] (gate first, then up) into [..., F], in its own type."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
