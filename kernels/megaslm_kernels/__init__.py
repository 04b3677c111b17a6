"""The fused operations of a decoder. One file per op: its mathematics and its PyTorch reference.

Depends on torch (and triton) only and knows nothing of megaslm. Every op works on CPU and GPU tensors of any
floating type, computes in fp32 inside and rounds once at the store.
"""

from megaslm_kernels.attention import causal_attention
from megaslm_kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy_reference
from megaslm_kernels.rms_norm import rms_norm_reference
from megaslm_kernels.rotary import rotary_reference
from megaslm_kernels.swiglu import swiglu_reference

BACKEND = "reference"
"""The backend that the model runs on: recorded with every run."""

__all__ = [
    "BACKEND",
    "IGNORE_INDEX",
    "causal_attention",
    "linear_cross_entropy_reference",
    "rms_norm_reference",
    "rotary_reference",
    "swiglu_reference",
]
