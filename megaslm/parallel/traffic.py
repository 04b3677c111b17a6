"""What this rank hands to collectives, counted as it happens."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megaslm.parallel import host
from megaslm.parallel.groups import Group

HOST = "host"
"""Name of the group of host.py in a count."""

# What torch.distributed calls ends in an operator of the first namespace; torch.compile puts in those of the second.
_OPERATIONS = {
    "c10d": {
        "allreduce_": "all_reduce",
        "allreduce_coalesced_": "all_reduce",
        "allgather_": "all_gather",
        "_allgather_base_": "all_gather",
        "allgather_coalesced_": "all_gather",
        "allgather_into_tensor_coalesced_": "all_gather",
        "reduce_scatter_": "reduce_scatter",
        "_reduce_scatter_base_": "reduce_scatter",
        "reduce_scatter_tensor_coalesced_": "reduce_scatter",
        "broadcast_": "broadcast",
        "reduce_": "reduce",
        "gather_": "gather",
        "scatter_": "scatter",
        "alltoall_": "all_to_all",
        "alltoall_base_": "all_to_all",
        "send": "send",
        "recv_": "receive",
        "recv_any_source_": "receive",
        "barrier": "barrier",
        "monitored_barrier_": "barrier",
    },
    "_c10d_functional": {
        "all_reduce": "all_reduce",
        "all_reduce_": "all_reduce",
        "all_reduce_coalesced": "all_reduce",
        "all_reduce_coalesced_": "all_reduce",
        "all_gather_into_tensor": "all_gather",
        "all_gather_into_tensor_out": "all_gather",
        "all_gather_into_tensor_coalesced": "all_gather",
        "reduce_scatter_tensor": "reduce_scatter",
        "reduce_scatter_tensor_out": "reduce_scatter",
        "reduce_scatter_tensor_coalesced": "reduce_scatter",
        "broadcast": "broadcast",
        "broadcast_": "broadcast",
        "all_to_all_single": "all_to_all",
    },
}


class Count(NamedTuple):
    """Calls of one operation, and the bytes handed over in them: its payload (see `count_traffic`)."""

    calls: int
    bytes: int


class Traffic:
    """Counts by (operation, name of the group), and the number of ranks in each group."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], Count] = {}
        self.sizes: dict[str, int] = {}

    def add(self, operation: str, group: str, size: int, payload: int) -> None:
        before = self.counts.get((operation, group), Count(0, 0))
        self.counts[operation, group] = Count(before.calls + 1, before.bytes + payload)
        self.sizes[group] = size

    def within(self, group: str) -> dict[str, Count]:
        """Counts of one group by operation."""
        return {operation: count for (operation, name), count in self.counts.items() if name == group}

    def wire_bytes(self, group: str) -> float:
        """Bytes that this rank sends to others of the group, see the function of that name."""
        counts = self.within(group).items()
        return sum(wire_bytes(operation, self.sizes[group], count.bytes) for operation, count in counts)


def wire_bytes(operation: str, size: int, payload: float) -> float:
    """Bytes that each of `size` ranks sends (and as many that it receives) for a collective with a payload in bytes.

    That of a ring, which no algorithm without help from the network undercuts: a reduce-scatter and an all-gather send
    (n-1)/n of the payload, an all-reduce is one after the other (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69,
    2009; the factors of nccl-tests). The others are taken by their mean over the ranks.
    """
    if operation in ("send", "receive"):
        return payload if operation == "send" else 0.0
    return payload * (2 if operation == "all_reduce" else 1) * (size - 1) / size


class _Counter(TorchDispatchMode):
    """Sees every operator on its way to the backend, those of the backward pass and of hooks too."""

    def __init__(self, traffic: Traffic, names: dict[tuple[int, ...], str]):
        super().__init__()
        self._traffic, self._names = traffic, names
        self._host = host.current_group()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operation = _OPERATIONS.get(getattr(func, "namespace", ""), {}).get(getattr(func, "_opname", ""))
        if operation is not None:
            arguments = (*args, *(kwargs or {}).values())
            group = _process_group(arguments)
            # The larger one is the gathered, or what is yet to be scattered. A barrier's tensor carries nothing.
            payload = 0 if operation == "barrier" else max(_bytes([value]) for value in (*arguments, result))
            self._traffic.add(operation, self._name(group), group.size(), payload)
        return result

    def _name(self, group: dist.ProcessGroup) -> str:
        if self._host is not None and group.group_name == self._host.group_name:
            return HOST
        ranks = tuple(dist.get_process_group_ranks(group))
        return self._names.get(ranks, f"ranks {', '.join(map(str, ranks))}")


@contextmanager
def count_traffic(**groups: Group) -> Iterator[Traffic]:
    """Count the collectives that this thread starts within the context, DeepSpeed's and ours, its backward included.

        with count_traffic(tensor=ranks.tensor_parallel, data=ranks.data_parallel) as traffic:
            engine.train_step(...)
        traffic.within("tensor")["all_reduce"].bytes

    groups: names for groups; those of the same ranks share it, since DeepSpeed makes copies of what it is given.
        What host.py sends has the name `HOST`; a group without a name is called by its ranks.

    A payload is the whole of what a collective is about, as nccl-tests count it: of an all-reduce its tensor, of an
    all-gather all that is gathered, of a reduce-scatter all that is yet to be scattered. `wire_bytes` gives what goes
    over the links. A collective in a group of one is counted too: it costs its call, and sends nothing.

    Two kinds of collectives escape it: those of other threads, and those within an operator made by torch.library.
    While it counts, torch.compile compiles nothing new.
    """
    traffic = Traffic()
    with _Counter(traffic, {group.ranks: name for name, group in groups.items()}):
        yield traffic


def _process_group(arguments: Iterable[Any]) -> dist.ProcessGroup:
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject):
            # An operator's reduction is a script object too.
            if "ProcessGroup" in str(argument._type()):
                return dist.ProcessGroup.unbox(argument)
    names = [argument for argument in arguments if isinstance(argument, str)]
    return dist.distributed_c10d._resolve_process_group(names[-1])  # the reduction's name comes before it


def _bytes(values: Iterable[Any]) -> int:
    """Of all tensors in `values` and in the lists there."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.nbytes
        elif isinstance(value, list | tuple):
            total += _bytes(value)
    return total
