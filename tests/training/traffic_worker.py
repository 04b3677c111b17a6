"""One rank that counts what it communicates: in calls that are known, and in optimizer steps of many layouts.

    traffic_worker.py CASES.json RESULTS.json

CASES.json: {name: {"run": run config, "stage": stage, "precision": ..., "zero": of the engine config,
"loss_chunk_bytes": ...}}. RESULTS.json, by rank 0: for each name, and
for "known calls", a list of [operation, group, calls, bytes], and the sizes of the rank's parameters.
"""

import gc
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from layout_engines import LayoutEngine, as_run
from torch.distributed import _functional_collectives as functional

from megaslm.parallel import Traffic, count_traffic, host, init_distributed


def counted(traffic: Traffic) -> list:
    return [[*key, *count] for key, count in sorted(traffic.counts.items())]


def known_calls() -> list:
    """On 4 ranks, of which 2 are a tensor-parallel group."""
    ranks = init_distributed(2)
    tensor, data = ranks.tensor_parallel, ranks.data_parallel
    copy = dist.new_group(list(range(ranks.world_size)))
    x, whole = torch.ones(3), torch.ones(6)
    with count_traffic(tensor=tensor, data=data) as traffic:
        dist.all_reduce(x.bfloat16(), group=tensor.process_group)  # 6 bytes
        dist.all_reduce(x, group=tensor.process_group, async_op=True).wait()  # 12
        dist.all_gather_into_tensor(whole, x, group=data.process_group)  # 24, the output
        dist.reduce_scatter_tensor(x, whole, group=data.process_group)  # 24, the input
        dist.all_gather([x, x.clone()], x, group=data.process_group)  # 24
        dist.broadcast(x, 0, group=copy)  # 12, in a group without a name
        dist.barrier(group=copy)
        functional.all_reduce(x, "sum", group=tensor.process_group).wait()  # as torch.compile writes it
        host.gather(None)
        x.requires_grad_().register_hook(lambda gradient: dist.all_reduce(gradient, group=tensor.process_group))
        x.sum().backward()  # 12, within the backward pass
    dist.all_reduce(x.detach(), group=tensor.process_group)  # not within the context
    return counted(traffic)


def one_step(case: dict) -> dict:
    """Of a step after those that have what is done once; ZeRO-3 compares the order of its weights in the second."""
    layout = LayoutEngine(as_run(case["run"]), case["stage"], case["precision"], zero=case["zero"])
    model, ranks = layout.engine.model, layout.ranks
    if ranks.tensor_parallel.size > 1:
        loss = partial(model.head.ops.sharded_linear_cross_entropy, chunk_bytes=case["loss_chunk_bytes"])
        model.head.ops = replace(model.head.ops, sharded_linear_cross_entropy=loss)
    for _ in range(2 if case["stage"] == 3 else 1):
        layout.engine.train_step(batches(layout), 1e-3)
    with count_traffic(tensor=ranks.tensor_parallel, data=ranks.data_parallel) as traffic:
        layout.engine.train_step(batches(layout), 1e-3)
    layout.engine.deepspeed.destroy()
    sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters()]
    return {"counts": counted(traffic), "parameters": sizes}


def batches(layout: LayoutEngine) -> list:
    size = layout.plan.layout.micro_batch_size
    return [layout.batch(first * size, size) for first in range(layout.plan.layout.accumulation_steps)]


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    found = {"known calls": known_calls()}
    for name, case in cases.items():
        found[name] = one_step(case)
        gc.collect()  # DeepSpeed's engines are cycles
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
