"""Initial weights that depend on the seed and the parameter's name alone.

Every parameter is drawn whole, in fp32, from a generator of its own: no order of construction, rank count, ZeRO stage
or slicing changes a single bit of them. Whoever holds a slice draws the whole tensor and keeps the slice.
"""

import hashlib
import math

import torch
from megaslm_kernels import REFERENCE, Ops
from torch import Tensor, nn

from megaslm.config import ModelConfig
from megaslm.model.transformer import LanguageModel

RESIDUAL_PROJECTIONS = ("attention.out.weight", "feed_forward.down.weight")


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """The whole initial tensor of parameter `name`, fp32 on the CPU.

    Matrices: normal with init_std, or init_std / sqrt(2 L) where they write into the residual stream (GPT-2,
    Radford et al. 2019). Biases: zero. Norm weights: one.
    """
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    std = config.init_std
    if name.endswith(RESIDUAL_PROJECTIONS):
        std /= math.sqrt(2 * config.num_layers)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def build_model(
    config: ModelConfig, seed: int, device: torch.device | str = "cpu", ops: Ops = REFERENCE
) -> LanguageModel:
    """The network with its initial weights, on `device`, computed with `ops`. Host memory holds one parameter at a
    time."""
    with torch.device("meta"):
        model = LanguageModel(config, ops)
    model.to_empty(device=device)
    model.tie_weights()
    if model.decoder.rotary_table is not None:
        model.decoder.rotary_table.fill()
    initialize_parameters(model, config, seed)
    return model


@torch.no_grad()
def initialize_parameters(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of `model` with its `initial_value`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, tuple(parameter.shape), config, seed))
