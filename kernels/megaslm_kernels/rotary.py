"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the half-split layout of GPT-NeoX and Llama.

Channel i of the first half of the rotated part is paired with channel i of the second half:

    y1 = x1 cos - x2 sin
    y2 = x2 cos + x1 sin

Channels past the rotated part (rotary fraction below one) pass through.
"""

import torch
from torch import Tensor


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` [B, S, H, D] by the angles whose `cos` and `sin` are [S, R/2] or [B, S, R/2], fp32, with R <= D.

    Returns a new tensor of x's shape and type; computed in fp32.
    """
    half = cos.size(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    x1, x2 = x[..., :half].float(), x[..., half : 2 * half].float()
    rotated = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)
    if 2 * half == x.size(-1):
        return rotated
    return torch.cat((rotated, x[..., 2 * half :]), dim=-1)
