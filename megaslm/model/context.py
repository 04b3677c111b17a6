"""Longer contexts than a network was trained with."""

import torch
from torch import Tensor

from megaslm.config import ModelConfig
from megaslm.errors import UserError

ROTARY_METHODS = ("linear", "ntk", "yarn")
STRETCH_METHODS = (*ROTARY_METHODS, "interpolate")


def stretch_context(config: ModelConfig, context_length: int, method: str) -> ModelConfig:
    """`config` with a context of `context_length` tokens, its positions stretched to fit by `method`.

    linear, ntk, yarn: of rotary positions (rotary.py). What is stretched already can be stretched further by the same
    method: the factors multiply. interpolate: of learned positions, whose weights then go through `stretch_positions`.
    The weights of a rotary network stay as they are; a short training at the new length makes any method better, and
    linear needs it most.

    Raises UserError for a context that is not longer, and for a method that does not fit the positions.
    """
    if method not in STRETCH_METHODS:
        raise UserError(f"there is no method {method!r} to stretch a context; take one of {', '.join(STRETCH_METHODS)}")
    if context_length <= config.context_length:
        raise UserError(
            f"a context of {context_length} tokens is not longer than the model's, which has {config.context_length}; "
            "leave it out, or give a longer one"
        )
    if (method == "interpolate") != (config.position == "learned"):
        fitting = "interpolate" if config.position == "learned" else ", ".join(ROTARY_METHODS)
        kind = "learned" if config.position == "learned" else "rotary"
        raise UserError(f"{method} does not stretch {kind} positions, which this model has; take {fitting}")
    if method == "interpolate":
        return ModelConfig(**{**config.model_dump(), "context_length": context_length})
    if config.rope_scaling not in ("none", method):
        further = (
            f"it can be stretched further by {config.rope_scaling} alone"
            if config.rope_scaling in ROTARY_METHODS
            else "it cannot be stretched further"
        )
        raise UserError(f"the model's context is stretched by {config.rope_scaling} already; {further}")
    if method == "yarn" and config.rope_theta <= 1:
        raise UserError(f"yarn needs a rope_theta above 1, and the model has {config.rope_theta:g}; take linear or ntk")
    stretched = {
        "context_length": context_length,
        "rope_scaling": method,
        "rope_scaling_factor": config.rope_scaling_factor * context_length / config.context_length,
    }
    if method == "yarn":
        stretched["rope_original_context"] = config.rope_original_context or config.context_length
    return ModelConfig(**{**config.model_dump(), **stretched})


def stretch_positions(weight: Tensor, length: int) -> Tensor:
    """Learned positions [C, E] drawn out to [length, E]: linear interpolation, the first and the last staying what they
    are. In fp32, returned in the type of `weight`."""
    places = torch.linspace(0, weight.size(0) - 1, length, dtype=torch.float64, device=weight.device)
    below = places.floor().long()
    above = (below + 1).clamp(max=weight.size(0) - 1)
    share = (places - below).to(torch.float32).unsqueeze(1)
    return torch.lerp(weight[below].float(), weight[above].float(), share).to(weight.dtype)
