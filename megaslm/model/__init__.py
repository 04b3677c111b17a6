"""The network, its initial weights and its cost. Plain PyTorch, no ranks, no devices."""

from megaslm.model.context import STRETCH_METHODS, stretch_context, stretch_positions
from megaslm.model.flops import count_parameters, flops_per_token, matmul_parameters
from megaslm.model.initialization import build_model, initial_value, initialize_parameters
from megaslm.model.precision import DTYPES
from megaslm.model.rotary import rotary_base
from megaslm.model.transformer import Block, Decoder, LanguageModel, LanguageModelHead

__all__ = [
    "DTYPES",
    "STRETCH_METHODS",
    "Block",
    "Decoder",
    "LanguageModel",
    "LanguageModelHead",
    "build_model",
    "count_parameters",
    "flops_per_token",
    "initial_value",
    "initialize_parameters",
    "matmul_parameters",
    "rotary_base",
    "stretch_context",
    "stretch_positions",
]
