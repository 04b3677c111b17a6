"""All-reduces of known numbers over the ranks of a run: whether the sums are right, and how fast they come."""

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megaslm.cluster.judging import FAULT, Finding, judge_bandwidth
from megaslm.cluster.meeting import Meeting

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

WITHIN, ACROSS = "within a node", "across nodes"
PORTS = "if each GPU has an NDR port"
BYTES = {"cuda": 256 * 2**20, "cpu": 4 * 2**20}
WARM_UP, REPEATS = 3, 10


def bus_bandwidth(num_bytes: int, seconds: float, ranks: int) -> float:
    """Bytes/s that each rank sends over its link in an all-reduce of `num_bytes`: 2 (n - 1) / n of them, as
    nccl-tests (doc/PERFORMANCE.md) define it, so that the figure does not depend on the number of ranks."""
    return 2 * (ranks - 1) / ranks * num_bytes / seconds


def measure_all_reduce(
    ranks: Sequence[int], device: "torch.device", group: "dist.ProcessGroup | None"
) -> tuple[float, bool]:
    """Bus bandwidth in bytes/s of an all-reduce over `ranks`, which are those of `group`, and whether its sums were
    right. Collective."""
    import torch
    import torch.distributed as dist

    num_bytes = BYTES[device.type]
    values = torch.empty(num_bytes // 4, device=device)
    expected = float(sum(rank + 1 for rank in ranks))
    values.fill_(dist.get_rank() + 1)
    dist.all_reduce(values, group=group)
    right = bool((values == expected).all())
    values.zero_()  # sums that grow from call to call would overflow
    for _ in range(WARM_UP):
        dist.all_reduce(values, group=group)
    _wait(device)
    started = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(values, group=group)
    _wait(device)
    return bus_bandwidth(num_bytes, (time.perf_counter() - started) / REPEATS, len(ranks)), right


def _wait(device: "torch.device") -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_network(meeting: Meeting, device: str, local_rank: int, gpu: str | None) -> list[Finding]:
    """All-reduces within every node, and over all of them. Collective; the findings on rank 0.

    gpu: the name of the GPUs by torch, None on CPUs.
    """
    import torch
    import torch.distributed as dist

    where = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(where)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=dist.PrefixStore("all-reduce", meeting.store),
        rank=meeting.rank,
        world_size=meeting.world_size,
        timeout=timedelta(seconds=2 * meeting.timeout),  # the deadline around it comes first, and names who hangs
    )
    by_host: dict[str, list[int]] = {}
    for rank, host in enumerate(meeting.hosts):
        by_host.setdefault(host, []).append(rank)
    measured = {}
    if len(by_host) < meeting.world_size:
        groups = {host: dist.new_group(ranks) for host, ranks in by_host.items()}  # every rank makes all of them
        mine = meeting.hosts[meeting.rank]
        measured[WITHIN] = measure_all_reduce(by_host[mine], where, groups[mine])
    if len(by_host) > 1:
        measured[ACROSS] = measure_all_reduce(range(meeting.world_size), where, None)
    all_measured = meeting.to_first("all-reduce", measured)
    dist.destroy_process_group()
    if meeting.rank:
        return []
    return judge_network(meeting.hosts, all_measured, expected_bandwidth(gpu, len(meeting.hosts) // len(by_host)))


def judge_network(
    hosts: Sequence[str], measured: Sequence[dict[str, Any]], expected: dict[str, float]
) -> list[Finding]:
    """hosts, measured: by rank; measured: by where, what `measure_all_reduce` says. expected: bytes/s by where."""
    wrong = sorted(
        {host for host, one in zip(hosts, measured, strict=True) if not all(right for _, right in one.values())}
    )
    if wrong:
        text = f"wrong sums on {', '.join(wrong)}: a GPU or a link there is faulty; leave it out"
        return [Finding(FAULT, "all-reduce", text)]
    slowest = {name: min(one[name][0] for one in measured) for name in measured[0]}
    return [
        judge_bandwidth(name, speed, expected.get(name), PORTS if name == ACROSS else "")
        for name, speed in slowest.items()
    ]


def expected_bandwidth(gpu: str | None, gpus_per_node: int) -> dict[str, float]:
    """Bus bandwidth in bytes/s that NCCL gets on sound nodes with this GPU, by where; {} where it is not known: over
    PCIe it depends on the switches and sockets between the GPUs.

    gpu: its name by torch. Across nodes every GPU is taken to have an InfiniBand NDR port of its own.
    """
    from megaslm.planning import GPUS, INFINIBAND

    known = next((one for one in GPUS.values() if gpu == one.torch_name), None)
    if known is None or not known.link_name.startswith("NVLink"):
        return {}
    return {WITHIN: known.ring_rate, ACROSS: min(known.ring_rate, gpus_per_node * INFINIBAND)}
