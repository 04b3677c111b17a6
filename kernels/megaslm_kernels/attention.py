"""Causal scaled dot-product attention through PyTorch's own fused backends (flash, cuDNN, memory-efficient, CPU flash).

y = softmax(q k^T / sqrt(D) + causal mask) v
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of queries [B, S, H, D] to keys and values [B, S, K, D] that are not after them, [B, S, H, D].

    K divides H: query head h reads key/value head h // (H / K).
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    queries_per_kv = q.size(1) // k.size(1)
    if queries_per_kv > 1 and _only_backend_for_equal_heads(q):
        k, v = k.repeat_interleave(queries_per_kv, dim=1), v.repeat_interleave(queries_per_kv, dim=1)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.size(1) != q.size(1))
    return y.transpose(1, 2)


def _only_backend_for_equal_heads(q: Tensor) -> bool:
    """Where neither flash nor cuDNN runs (fp32, or before sm_80), the memory-efficient backend is what is left, and it
    knows no grouped heads: without the copies PyTorch would hold the S x S scores."""
    return q.is_cuda and (q.dtype == torch.float32 or torch.cuda.get_device_capability(q.device) < (8, 0))
