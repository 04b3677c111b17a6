"""The nodes that a run is planned for."""

from dataclasses import dataclass

from megaslm.errors import UserError
from megaslm.parallel import GPU, GPUS
from megaslm.resources import available_memory

THIS_MACHINE = "cpu"


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs."""

    nodes: int
    gpu: GPU = GPUS["h200"]
    gpus_per_node: int = 8

    @property
    def is_of_gpus(self) -> bool:
        return self.gpu.torch_name is not None

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


def find_gpu(name: str) -> GPU:
    """The GPU of that name, in upper or lower case. Raises UserError with the list of them."""
    found = GPUS.get(name.lower())
    if found is None:
        raise UserError(f"--gpu {name}: not in the table of GPUs; give one of {', '.join(GPUS)}, or {THIS_MACHINE}")
    return found


def this_machine(ranks: int) -> GPU:
    """A CPU rank of this machine, of so many that share its memory: no peak and no link is known of it."""
    share = available_memory() / ranks
    return GPU(f"CPU rank of {ranks}", None, share, 0.0, "memory")
