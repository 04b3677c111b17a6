"""The fused operations of a decoder. One file per op: its mathematics, its PyTorch reference and its Triton kernels.

Depends on torch and triton only and knows nothing of megaslm. Every op takes any floating type, computes in fp32 inside
and rounds once at each store. `select_backend` gives the ops of one backend as an `Ops`.
"""

from megaslm_kernels.attention import (
    Documents,
    attention_obstacle,
    attention_to_cache,
    causal_attention,
    find_documents,
    prefer_attention,
    separates_by_flash,
)
from megaslm_kernels.backends import REFERENCE, TRITON, BackendUnavailable, Ops, select_backend, triton_obstacle
from megaslm_kernels.cross_entropy_formulas import IGNORE_INDEX

__all__ = [
    "BackendUnavailable",
    "Documents",
    "IGNORE_INDEX",
    "Ops",
    "REFERENCE",
    "TRITON",
    "attention_obstacle",
    "attention_to_cache",
    "causal_attention",
    "find_documents",
    "prefer_attention",
    "select_backend",
    "separates_by_flash",
    "triton_obstacle",
]
