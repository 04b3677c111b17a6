"""Where the parameters of a sharded model come from in the whole one: what a checkpoint needs to be free of layout."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Block:
    """A rectangle of a tensor: `shape` elements from `offset` on, an entry for each dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Block":
        """All of a tensor of `shape`."""
        return cls((0,) * len(shape), shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))


@dataclass(frozen=True)
class Placement:
    """What a parameter of a sharded model is of the whole model.

    name, shape: of the whole model's parameter.
    blocks: of it, one below the other (joined in dimension 0), are this one: the rows of queries, of keys and of values
        that a rank has, say.
    sliced: every rank of the tensor-parallel group has others. Else all have these, which are one weight: it is
        counted once in the gradient's norm, and saved once.
    """

    name: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    sliced: bool

    def cut(self, whole: Tensor) -> Tensor:
        """This parameter's values, in memory of their own, from those of the whole one."""
        assert tuple(whole.shape) == self.shape, f"{self.name} is {self.shape}, not {tuple(whole.shape)}"
        return torch.cat([whole[block.slices] for block in self.blocks])


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """Its shape on this rank; under ZeRO-3, too, where it is empty between its uses."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def placement_of(name: str, parameter: nn.Parameter) -> Placement:
    """The placement of the parameter called `name` in its model; without one (see sharding.py) it is whole."""
    found = getattr(parameter, "placement", None)
    if found is not None:
        return found
    shape = shape_of(parameter)
    return Placement(name, shape, (Block.whole(shape),), sliced=False)
