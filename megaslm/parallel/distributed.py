"""Ranks: who they are, the device each one uses, and what they do together.

Works under `deepspeed`, `torchrun` and whatever sets RANK, WORLD_SIZE and LOCAL_RANK, and without any as one rank.
"""

import logging
import os
import shlex
import socket
import sys
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megaslm.errors import UserError
from megaslm.parallel import host
from megaslm.parallel.groups import Group, ModelParallelUnit, build_groups

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among all of them.

    host_group: the gloo group of host.py.
    launched: a launcher started this process, and it should not outlive it.
    tensor_parallel: the ranks that hold one model together; they read the same samples.
    data_parallel: the ranks that hold the same part of it, and read other samples.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    num_threads: int
    host_group: dist.ProcessGroup
    launched: bool
    tensor_parallel: Group
    data_parallel: Group

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def data_parallel_rank(self) -> int:
        return self.data_parallel.rank

    @property
    def data_parallel_size(self) -> int:
        return self.data_parallel.size

    @property
    def mpu(self) -> ModelParallelUnit | None:
        """For `deepspeed.initialize`; None where every rank has the whole model."""
        return ModelParallelUnit(self.tensor_parallel, self.data_parallel) if self.tensor_parallel.size > 1 else None

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum of a small tensor over the data-parallel ranks, on all ranks, computed on the host in
        float64. Of the ranks that hold one model together, which have the same values, the first's are taken."""
        total = values.detach().to("cpu", torch.float64, copy=True)
        if self.tensor_parallel.rank > 0:
            total.zero_()
        if self.world_size > 1:
            dist.all_reduce(total, group=self.host_group)
        return total


def available_cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def uses_gpus() -> bool:
    """Whether ranks of this machine take a GPU each: it has some, and DeepSpeed's own switch, DS_ACCELERATOR=cpu, does
    not say otherwise, as for a rehearsal."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def gpus_for_ranks() -> int:
    """GPUs of this machine for the ranks that this process will start; 0: they are CPU ranks.

    Asks the driver's management library and not the driver: that would hold memory of the first GPU from then on, and
    a fork of a process that has asked it can't use a GPU.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if uses_gpus():
        return torch.cuda.device_count()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would only warn that it found no accelerator
    return 0


def init_distributed(tensor_parallel_size: int = 1) -> Ranks:
    """Join the process group through DeepSpeed, choose the device and give every CPU rank its share of the cores.

    In a process that has joined already, make the groups of these ranks anew, of another size if need be. Collective.

    Raises:
        UserError: the ranks can't be divided by `tensor_parallel_size`, or were given different ones; more of them
            than GPUs; a launcher's environment that is incomplete.
    """
    launched = _complete_environment()
    rank, world_size, local_rank = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    # torchrun says LOCAL_WORLD_SIZE, deepspeed LOCAL_SIZE
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
    if uses_gpus():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{local_world_size} ranks were started on this machine, which has {torch.cuda.device_count()} GPUs; "
                "start at most one rank per GPU (deepspeed --num_gpus N)",
                on_one_rank=True,
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        num_threads = torch.get_num_threads()
    else:
        # DeepSpeed would only warn that it found no accelerator and takes the CPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        device = torch.device("cpu")
        cores = available_cores()
        # A launcher that binds ranks to cores gives as many threads: then the cores seen are this rank's own already.
        bound = os.environ.get("OMP_NUM_THREADS") == str(cores)
        num_threads = cores if bound else max(1, cores // local_world_size)
        torch.set_num_threads(num_threads)

    _quiet_deepspeed()
    import deepspeed
    import deepspeed.ops

    # Shared-memory collectives for CPU ranks are compiled at first use (43 s; no compiler: an error; a killed build
    # leaves a lock on which the next start hangs). gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False, rank=rank, world_size=world_size
    )
    host_group = host.new_group()
    host.set_group(host_group)
    _check_size(tensor_parallel_size, world_size, launched)
    groups = build_groups(rank, world_size, tensor_parallel_size)
    return Ranks(rank, world_size, local_rank, local_world_size, device, num_threads, host_group, launched, *groups)


def _check_size(size: int, world_size: int, launched: bool) -> None:
    """Before groups are made, for which ranks of different sizes would wait for each other for ever. Collective."""
    for rank, other in enumerate(sizes := host.gather(size)):
        if other != sizes[0]:
            raise UserError(
                "every rank must be given the same parallel.tensor_parallel_size, and rank 0 was given "
                f"{sizes[0]}, rank {rank} {other}: start all of them with the same arguments"
            )
    if world_size % size:
        # --num_accelerators would do as well: deepspeed has both names, and counts CPU ranks by them too.
        start = "deepspeed --num_gpus N" + ("" if launched else f" {shlex.join(sys.argv)}")
        raise UserError(
            f"parallel.tensor_parallel_size={size} needs a multiple of {size} ranks, and there "
            f"{'is' if world_size == 1 else 'are'} {world_size}: start another number of them ({start}; N counts CPU "
            "ranks too), or take a size that divides it"
        )


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _complete_environment() -> bool:
    """Whether a launcher started this process; without one, set what makes it one rank by itself."""
    given = [name for name in LAUNCHER_VARIABLES if name in os.environ]
    if "RANK" in given and len(given) < len(LAUNCHER_VARIABLES):
        missing = ", ".join(name for name in LAUNCHER_VARIABLES if name not in given)
        raise UserError(
            f"RANK is set without {missing}: start the ranks with deepspeed or torchrun, "
            "or unset RANK to run as one rank"
        )
    if "RANK" in given:
        os.environ.setdefault("LOCAL_RANK", "0")
        return True
    port = free_port()
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return False


def quiet_torchao() -> None:
    """Call before an import of torchao, which transformers' models do too: it says which of its kernels are made for
    another GPU or Python, and has torch deprecate what it does."""
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def _quiet_deepspeed() -> None:
    """Only warnings and errors of DeepSpeed reach the terminal."""
    warnings.filterwarnings("ignore", module=r"deepspeed\..*")
    # It calls collectives by names that newer versions of torch deprecate, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
