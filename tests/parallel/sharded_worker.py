"""One rank of the tests of sharded models: compares what a sharded model computes with what the whole one does.

    python sharded_worker.py JOB.json        (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment)

JOB.json: {"output": file for rank 0's findings, "tasks": [[function, argument, ...], ...]}.
Distances are relative to the largest element of what is compared.
"""

import copy
import json
import math
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from families import LENGTH, config_of
from torch import Tensor

from megaslm.config import ModelConfig
from megaslm.model import LanguageModel, build_model
from megaslm.parallel import (
    ALONE,
    Group,
    Ranks,
    check_tags,
    clip_gradients_,
    collectives,
    count_traffic,
    host,
    init_distributed,
    placement_of,
    shard_model,
)
from megaslm.parallel.sharding import SumParts

BATCH = 3


def distance(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max() / y.abs().max().clamp(min=1e-30))


def whole_model(family: str, **sizes: int) -> LanguageModel:
    """With norms and biases that differ from one another, or mistakes with them would not show."""
    model = build_model(config_of(family, **sizes), seed=1)
    model.head.z_loss = 1e-2
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def batch(config: ModelConfig, documents: bool) -> tuple:
    """Tokens, targets of which some are ignored, and positions of several documents a row."""
    generator = torch.Generator().manual_seed(3)
    tokens, targets = torch.randint(config.vocab_size, (2, BATCH, LENGTH), generator=generator)
    targets[0, 2:4] = -100
    if not documents:
        return tokens, targets, None, None
    positions = torch.arange(LENGTH, dtype=torch.int32).repeat(BATCH, 1)
    positions[1, 3:] -= 3
    return tokens, targets, positions, BATCH + 1


def put_together(model: LanguageModel, group: Group, read) -> dict[str, Tensor]:
    """Of the whole model: what `read` gives for each parameter, from all ranks. Those that all have must be equal."""
    whole: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        placement = placement_of(name, parameter)
        placements = [None] * group.size
        dist.all_gather_object(placements, placement, group=group.process_group)
        into = whole.setdefault(placement.name, torch.full(placement.shape, torch.nan))
        parts = collectives.stacked(read(parameter), group)
        assert placement.sliced or all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between ranks"
        for part, of in zip(parts, placements, strict=True):
            start = 0
            for block in of.blocks:
                into[block.slices] = part[start : start + block.shape[0]]
                start += block.shape[0]
    return whole


def compare(ranks: Ranks, family: str, sequence_parallel: bool, mode: str) -> dict:
    """Weights, losses, logits, gradients and their norm of a sharded model, against those of the whole one.

    mode: "eager"; "checkpointing"; "compiled", its one block, without a graph break; "documents".
    """
    group = ranks.tensor_parallel
    whole = whole_model(family, num_layers=1 if mode == "compiled" else 2)
    inputs = batch(whole.config, mode == "documents")
    sharded = copy.deepcopy(whole)
    sharded.tie_weights()
    shard_model(sharded, group, sequence_parallel)
    check_tags(sharded, group, sequence_parallel)
    weights = put_together(sharded, group, lambda parameter: parameter.detach())
    equal_weights = all(torch.equal(weights.pop(name), p) for name, p in whole.named_parameters()) and not weights
    if mode == "compiled":
        sharded.decoder.blocks[0].compile(fullgraph=True, backend="aot_eager")
    sharded.decoder.activation_checkpointing = mode == "checkpointing"
    losses, logits, short = [], [], []
    for model in (whole, sharded):
        model.train()
        objective, loss = model(*inputs)
        objective.backward()
        losses.append(torch.stack([objective.detach(), loss.detach()]))
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # what is compiled is the training step
            logits.append(model(inputs[0], None, *inputs[2:]))
            model.eval()
            short.append(model(inputs[0][:, :5]))  # a length that does not divide
    gradients = put_together(sharded, group, lambda parameter: parameter.grad.clone())
    distances = {name: distance(gradients.pop(name), p.grad) for name, p in whole.named_parameters()}
    assert not gradients, gradients.keys()
    norms = [clip_gradients_(whole.parameters(), 0.1, ALONE), clip_gradients_(sharded.parameters(), 0.1, group)]
    clipped = [
        clip_gradients_(whole.parameters(), math.inf, ALONE),
        clip_gradients_(sharded.parameters(), math.inf, group),
    ]
    results = collectives.stacked(torch.cat([losses[1], logits[1].flatten(), norms[1].reshape(1)]), group)
    return {
        "weights are equal": equal_weights,
        "ranks are equal": all(torch.equal(result, results[0]) for result in results),
        "losses": distance(losses[1], losses[0]),
        "logits": max(distance(logits[1], logits[0]), distance(short[1], short[0])),
        "gradients": distances,
        "norms": max(distance(norms[1], norms[0]), distance(clipped[1], clipped[0])),
        "clipped": float(clipped[1]),
    }


def compare_under_zero(ranks: Ranks, family: str, stage: int, precision: str) -> dict:
    """Gradients as DeepSpeed holds them, over several micro-batches, against those of the whole model in fp32."""
    group = ranks.tensor_parallel
    whole = whole_model(family)
    inputs = batch(whole.config, documents=False)
    for _ in range(2):
        (whole(*inputs)[0] / 2).backward()
    sharded = copy.deepcopy(whole)
    sharded.zero_grad()
    sharded.tie_weights()
    shard_model(sharded, group, sequence_parallel=True)
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    if precision == "bf16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    engine, *_ = deepspeed.initialize(
        model=sharded, optimizer=torch.optim.AdamW(sharded.parameters()), config=config, mpu=ranks.mpu
    )
    engine.train()
    for i in range(2):
        engine.backward(engine(*inputs)[0])
        if i == 0:
            engine.step()
    check_tags(sharded, group, sequence_parallel=True)
    gradients = put_together(sharded, group, lambda p: p.grad.clone() if stage == 0 else safe_get_full_grad(p).float())
    engine.destroy()
    return {name: distance(gradients[name], p.grad) for name, p in whole.named_parameters()}


def compare_collectives(ranks: Ranks) -> dict:
    """Every collective and its gradient, against the same computation with the tensors of all ranks on each."""
    group = ranks.tensor_parallel
    n, rank = group.size, group.rank
    shape = (2, 3, 5)  # [B, S/n, E]
    generator = torch.Generator().manual_seed(4)

    def of_all(*sizes: int) -> list[Tensor]:
        return list(torch.randn(n, *sizes, generator=generator, dtype=torch.float64).requires_grad_().unbind())

    def split(whole: Tensor) -> list[Tensor]:
        return [part.reshape(shape) for part in whole.reshape(-1, shape[-1]).chunk(n)]

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1, shape[-1]) for part in parts]).reshape(shape[0], n * shape[1], shape[2])

    whole = (shape[0], n * shape[1], shape[2])
    same = [torch.randn(whole, generator=generator, dtype=torch.float64).requires_grad_()] * n
    # What each rank has, and what all of them get; then whether what follows is the same on each rank, so that the
    # gradient is too and is counted once, or a part of it on each, so that the gradients add up.
    cases = {
        "all_reduce_": (of_all(*shape), lambda xs: [sum(xs)] * n, "same"),
        "all_reduce_gradient": (same, lambda xs: xs, "parts"),
        "all_gather_tokens": (of_all(*shape), lambda xs: [joined(xs)] * n, "parts"),
        "reduce_scatter_tokens": (of_all(*whole), lambda xs: split(sum(xs)), "parts"),
        "split_tokens": (same, lambda xs: split(xs[0]), "parts"),
        "all_gather_columns": (of_all(2, 3, 5), lambda xs: [torch.cat(xs, dim=-1)] * n, "same"),
    }
    found = {}
    for name, (xs, formula, follows) in cases.items():
        xs = [x.detach().requires_grad_() for x in xs] if xs is not same else [same[0].detach().requires_grad_()] * n
        expected = formula(xs)
        weights = [torch.randn(expected[0].shape, generator=generator, dtype=torch.float64) for _ in range(n)]
        if follows == "same":
            (expected[0] * weights[0]).sum().backward()
            weights = [weights[0]] * n
        else:
            sum((y * w).sum() for y, w in zip(expected, weights, strict=True)).backward()
        x = xs[rank].detach().requires_grad_()
        fresh = x * 1
        y = getattr(collectives, name)(fresh, group)
        in_place = y.data_ptr() == fresh.data_ptr()
        (y * weights[rank]).sum().backward()
        one = getattr(collectives, name)(x, ALONE)
        found[name] = [
            distance(y.detach(), expected[rank].detach()),
            distance(x.grad, xs[rank].grad),
            one is x,
            in_place,
        ]
    results = collectives.stacked(torch.tensor([values[:2] for values in found.values()]), group).amax(0).tolist()
    return {name: [*worst, *found[name][2:]] for name, worst in zip(found, results, strict=True)}


def drop_a_tag(ranks: Ranks) -> dict:
    """A sliced parameter without its tag, and one with it that is not sliced: what the check says, and the norm."""
    group, whole, found = ranks.tensor_parallel, whole_model("megaslm_1.2b"), {}
    inputs = batch(whole.config, documents=False)
    whole(*inputs)[0].backward()
    for name, tagged in (("decoder.blocks.1.feed_forward.down.weight", False), ("decoder.norm.weight", True)):
        model = whole_model("megaslm_1.2b")
        shard_model(model, group)
        model(*inputs)[0].backward()
        parameter = model.get_parameter(name)
        parameter.tensor_model_parallel = tagged
        messages = []
        for placement in (parameter.placement if not tagged else None, None):
            if placement is None and not tagged:
                del parameter.placement  # as of a layer that knows nothing of placements
            try:
                check_tags(model, group)
            except AssertionError as error:
                messages.append(str(error))
        norms = [clip_gradients_(m.parameters(), math.inf, g) for m, g in ((whole, ALONE), (model, group))]
        found[name] = {"messages": messages, "norm": distance(norms[1], norms[0])}
    return found


def sum_parts(ranks: Ranks) -> dict:
    """The hook that sums a gradient: 256 + 1 + 1 + 1 is 259, and in bf16 260, or one by one 256."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        part = torch.full((2, 3), 256.0 if ranks.is_first else 1.0, dtype=dtype)
        given = part.clone()
        total = SumParts(ranks.tensor_parallel)(given.t())
        found[str(dtype)] = [total.unique().tolist(), total.dtype == dtype, torch.equal(given, part)]
    return found


def keep(ranks: Ranks) -> dict:
    """What a packed column-parallel layer keeps for its backward pass under sequence parallelism, and what that pass
    communicates, as operations; the gradients of x, of weights, or of both are wanted."""
    model = whole_model("megaslm_1.2b")
    shard_model(model, ranks.tensor_parallel, sequence_parallel=True)
    layer, found = model.decoder.blocks[0].attention.qkv, {}
    for wanted in ("x", "weights", "both"):
        layer.requires_grad_(wanted != "x")
        x, kept = torch.randn(BATCH, LENGTH // 4, 16, requires_grad=wanted != "weights"), []
        with torch.autograd.graph.saved_tensors_hooks(lambda one, kept=kept: kept.append(one) or one, lambda one: one):
            y = layer(x)
        known = {one.data_ptr() for one in (x, *layer.parameters())}
        for parameter in layer.parameters():
            parameter._backward_hooks = None  # which sum what all ranks have parts of, and communicate too
        with count_traffic(tensor=ranks.tensor_parallel) as traffic:
            y.sum().backward()
        counts = {operation: count.calls for operation, count in traffic.within("tensor").items()}
        found[wanted] = {"kept": len(kept), "others": sum(one.data_ptr() not in known for one in kept), **counts}
    return found


def model_parallel_unit(ranks: Ranks) -> list:
    """What every rank of 2 x 2 answers to DeepSpeed, and sums of global ranks over its groups."""
    ranks, found = init_distributed(2), {}
    for name in dir(ranks.mpu):
        if name.startswith("get_"):
            value = getattr(ranks.mpu, name)()
            if isinstance(value, dist.ProcessGroup):
                total = torch.tensor(ranks.rank)
                dist.all_reduce(total, group=value)
                value = [*dist.get_process_group_ranks(value), int(total)]
            found[name] = value
    found["sequence"] = [name for name in dir(ranks.mpu) if "sequence" in name]
    return host.gather(found)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    ranks = init_distributed(int(os.environ["WORLD_SIZE"]))
    found = {}
    for name, *arguments in job["tasks"]:
        found[" ".join(map(str, [name, *arguments]))] = globals()[name](ranks, *arguments)
    if ranks.is_first:
        Path(job["output"]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
