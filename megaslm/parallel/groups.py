"""Process groups: which ranks hold parts of one model, which hold copies of one part, and what DeepSpeed asks of them.

Ranks are numbered with tensor parallelism innermost: rank = data_parallel_rank * tensor_parallel_size +
tensor_parallel_rank, so that a model's parts lie side by side on one node, whose links are the fastest.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True, eq=False)
class Group:
    """Ranks that do something together, as one of them sees it.

    rank: this process's place among them, 0 <= rank < size.
    ranks: all of them, by their global ranks.
    process_group: None for a group of one that talks to nobody.
    """

    rank: int
    ranks: tuple[int, ...]
    process_group: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        return len(self.ranks)

    def __deepcopy__(self, memo: dict) -> "Group":
        """A layer's copy talks to the same ranks; a process group can't be copied."""
        return self


ALONE = Group(0, (0,), None)
"""The group of a process that holds the whole model."""


@dataclass(frozen=True, eq=False)
class ModelParallelUnit:
    """The `mpu` of `deepspeed.initialize`, under all the names by which DeepSpeed 0.19.8 asks.

    There is none for sequence parallelism on purpose: ours lives within a tensor-parallel group, which DeepSpeed need
    not know; given those names, it would take the group for one of Ulysses, and shard ZeRO over it.
    """

    tensor_parallel: Group
    data_parallel: Group

    def get_tensor_model_parallel_rank(self) -> int:
        return self.tensor_parallel.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.tensor_parallel.size

    def get_tensor_model_parallel_group(self) -> Any:
        return self.tensor_parallel.process_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        return self.tensor_parallel.ranks[0]

    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_group = get_tensor_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self.data_parallel.rank

    def get_data_parallel_world_size(self) -> int:
        return self.data_parallel.size

    def get_data_parallel_group(self) -> Any:
        return self.data_parallel.process_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self.data_parallel.ranks)

    def get_pipeline_model_parallel_rank(self) -> int:
        return 0

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1


def build_groups(rank: int, world_size: int, tensor_parallel_size: int) -> tuple[Group, Group]:
    """This rank's tensor-parallel and data-parallel group. Collective over all ranks.

    world_size: a multiple of tensor_parallel_size.
    """
    assert world_size % tensor_parallel_size == 0, f"{world_size} ranks in groups of {tensor_parallel_size}"
    everyone = tuple(range(world_size))
    if tensor_parallel_size == 1:
        return Group(0, (rank,), None), Group(rank, everyone, dist.group.WORLD)
    size = tensor_parallel_size
    first = rank // size * size
    return _new_group(rank, everyone[first : first + size]), _new_group(rank, everyone[rank % size :: size])


def _new_group(rank: int, ranks: tuple[int, ...]) -> Group:
    """The group of these `ranks`, of which `rank` is one, made by them alone: else each group of each of them would
    have to be made by all ranks, with a barrier.

    All ranks make theirs at once, and these are a partition of all. So nobody waits for a rank that waits elsewhere,
    and NCCL, which splits the communicator of all ranks for it, sees every rank take part in one split.
    """
    return Group(ranks.index(rank), ranks, dist.new_group(list(ranks), use_local_synchronization=True))
