"""Rotary positions: the frequencies, how they are stretched for longer contexts, and the table of their angles.

R rotated channels of a head, in R/2 pairs. Frequencies theta^(-2i/R) (RoFormer, arXiv:2104.09864), stretched by a
factor f:

- linear: all frequencies are divided by f, which is to say the positions (arXiv:2306.15595).
- ntk: theta f^(R/(R-2)): the fastest pair stays as it is, the slowest is divided by f.
- yarn (arXiv:2309.00071): pairs that turn 32 times or more within the original context stay, those that turn once or
  less are divided by f, with a ramp over the pairs between; cos and sin, and so queries and keys, grow by 0.1 ln f + 1.
- llama3 (Llama 3.1): pairs that turn 4 times or more stay, those that turn once or less are divided by f, with a ramp
  over the number of turns between.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megaslm.config import ModelConfig

YARN_TURNS = (32.0, 1.0)
LLAMA3_TURNS = (4.0, 1.0)


class Rotary(NamedTuple):
    """What queries and keys are rotated by: cos and sin [S, R/2], whose rows are positions, and those of the tokens."""

    cos: Tensor
    sin: Tensor
    positions_BS: Tensor | None


class RotaryTable(nn.Module):
    """cos and sin of position x frequency, [context, R/2], fp32 whatever the parameters' type."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        pairs = int(config.head_dim * config.rope_fraction) // 2
        self.register_buffer("cos", torch.empty(config.context_length, pairs), persistent=False)
        self.register_buffer("sin", torch.empty(config.context_length, pairs), persistent=False)
        self.fill()

    def fill(self) -> None:
        """Compute the table once it has memory: on the CPU, so that every device has the same numbers."""
        if self.cos.is_meta:
            return
        config = self.config
        angles = torch.outer(torch.arange(config.context_length, dtype=torch.float32), rotary_frequencies(config))
        scale = 0.1 * math.log(config.rope_scaling_factor) + 1 if config.rope_scaling == "yarn" else 1.0
        self.cos.copy_(angles.cos() * scale)
        self.sin.copy_(angles.sin() * scale)

    def _apply(self, fn, recurse=True):
        """Follow the model to another device, not to another type: in bf16, far positions would share their angles."""
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32:
            self.cos, self.sin = (torch.empty_like(table, dtype=torch.float32) for table in (self.cos, self.sin))
            self.fill()
        return self

    def forward(self, length: int, positions_BS: Tensor | None = None, start: int = 0) -> Rotary:
        """The angles of tokens at `positions_BS` [B, S], or, without these, at `length` positions from `start` on."""
        if positions_BS is not None:
            return Rotary(self.cos, self.sin, positions_BS)
        return Rotary(self.cos[start : start + length], self.sin[start : start + length], None)


def rotary_base(config: ModelConfig) -> float:
    """theta of the rotary frequencies, which ntk scaling makes larger, and is nothing else."""
    if config.rope_scaling != "ntk":
        return config.rope_theta
    rotated = int(config.head_dim * config.rope_fraction)
    return config.rope_theta * config.rope_scaling_factor ** (rotated / max(rotated - 2, 1))


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of every pair of rotated channels, [R/2] fp32 on the CPU.

    Rounded at every step as transformers rounds them, to the same bits: at position 256 the difference between that and
    the nearest fp32 number alone can move a logit by 1e-3, and an export would not be the model that was trained.
    """
    rotated = int(config.head_dim * config.rope_fraction) // 2 * 2
    theta, factor, context = rotary_base(config), config.rope_scaling_factor, config.rope_original_context
    powers = theta ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    frequencies = 1 / powers
    if config.rope_scaling == "linear":
        return frequencies / factor
    if config.rope_scaling == "yarn":
        # The pairs, as fractions, that turn so often, rounded outwards to whole ones as transformers does.
        most, least = (
            rotated * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in YARN_TURNS
        )
        first, last = max(math.floor(most), 0), min(math.ceil(least), rotated - 1)
        if first == last:
            last += 0.001
        pairs = torch.arange(rotated // 2, dtype=torch.float32)
        # In a context so short that the last pair comes before the first, the ramp falls, as in transformers.
        kept = 1 - ((pairs - first) / (last - first)).clamp(0, 1)
        return 1 / (factor * powers) * (1 - kept) + frequencies * kept
    if config.rope_scaling == "llama3":
        most, least = LLAMA3_TURNS
        turns = context / (2 * math.pi / frequencies)
        kept = ((turns - least) / (most - least)).clamp(0, 1)
        return (1 - kept) * frequencies / factor + kept * frequencies
    return frequencies
