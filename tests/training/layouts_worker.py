"""One rank that trains in many layouts, one after the other, and writes down what it saw.

    layouts_worker.py CASES.json RESULTS.json

CASES.json: {name: case}, see `train` for the keys of a case.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
from pathlib import Path
from unittest import mock

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_set_full_fp32_param
from layout_engines import LayoutEngine, as_run, make_plan

from megaslm.checkpoint import differing_copies, take_fingerprint
from megaslm.config import RunConfig
from megaslm.model import LanguageModel, build_model, initial_value
from megaslm.parallel import ALONE, host, init_distributed, placement_of
from megaslm.training import TrainingEngine, run

COMPILE = torch.nn.Module.compile
FINGERPRINT_TOKENS = [7, 3, 88, 41, 12, 89]  # five inputs, which no tensor-parallel size divides


def train(case: dict) -> dict:
    """run, stage, precision, masked: see LayoutEngine. untag: take the tag off this parameter. autotp: DeepSpeed's
    own tensor parallelism instead of ours. backend: of torch.compile. without_compiler: the last rank has none.
    poison: on the last rank alone, this parameter's gradient is infinite in the second step. spoil: in the end the last
    rank alone changes its master weights of this parameter."""
    found, make = {}, AutoTPEngine if case.get("autotp") else LayoutEngine
    is_last = host.rank() == host.world_size() - 1
    choose_compiler(case.get("backend", "aot_eager"), case.get("without_compiler", False) and is_last)
    arguments = as_run(case["run"]), case["stage"], case.get("precision", "fp32"), case.get("masked", False)
    if "untag" in case:
        with without_tag(case["untag"]):
            try:
                make(*arguments)
            except AssertionError as error:
                found["refused"] = str(error)
            run.check_tags = lambda *arguments: None
            layout = make(*arguments)
    else:
        layout = make(*arguments)
    model = layout.engine.model
    found["compiled"] = layout.compiled
    if make is LayoutEngine:
        with torch.compiler.set_stance("force_eager") if layout.run.train.compile else contextlib.nullcontext():
            fingerprint = take_fingerprint(model, FINGERPRINT_TOKENS, layout.plan.precision, "cpu")
        found["fingerprint"] = [fingerprint.loss, *fingerprint.logits]
        found["initial weights"] = has_initial_weights(model, layout.run)
    hook = model.decoder.norm.register_forward_pre_hook(
        lambda module, inputs: found.update({"tokens in the stream": inputs[0].size(1)})
    )
    steps = []
    for number in range(layout.run.train.max_steps):
        with (
            poisoned(model, case["poison"])
            if "poison" in case and number == 1 and is_last
            else contextlib.nullcontext()
        ):
            steps.append(layout.step())
    found["losses"], found["norms"] = zip(*steps, strict=True)
    found["skipped"] = layout.engine.skipped_steps
    hook.remove()
    if make is LayoutEngine:
        found["replicated weights"] = sums_of_replicated_weights(model)
        found["differing"] = differing_copies(layout.engine.deepspeed)
    found["validation"] = float(layout.engine.loss_sum(layout.batch(10_000, count=3, length=layout.run.seq_length - 1)))
    if "spoil" in case:
        parameter = model.get_parameter(case["spoil"])
        if is_last:
            safe_set_full_fp32_param(
                parameter, torch.zeros(parameter.ds_shape if case["stage"] == 3 else parameter.shape)
            )
        found["spoiled"] = differing_copies(layout.engine.deepspeed)
    seen = host.gather(found)
    assert all(other == found for other in seen), f"the ranks differ: {seen}"
    return found


def has_initial_weights(model: LanguageModel, config: RunConfig) -> bool:
    """Whether every parameter is, bit for bit, the part of a whole model's that its placement names."""
    equal = []
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        for name, parameter in model.named_parameters():
            placement = placement_of(name, parameter)
            whole = initial_value(placement.name, placement.shape, config.model, config.train.seed)
            equal.append(torch.equal(placement.cut(whole).to(parameter.dtype), parameter))
    return all(equal)


def sums_of_replicated_weights(model: LanguageModel) -> list[float]:
    """Of every parameter that all ranks have: not a bit of them may come to differ."""
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        named = [(placement_of(name, parameter), parameter) for name, parameter in model.named_parameters()]
        return [float(parameter.detach().double().sum()) for placement, parameter in named if not placement.sliced]


class AutoTPEngine(LayoutEngine):
    """DeepSpeed's own tensor parallelism, of the network as it is built."""

    def __init__(self, config: RunConfig, stage: int, precision: str, masked: bool):
        self.run, self.masked, self.samples, self.compiled = config, masked, 0, "off"
        self.ranks = init_distributed(config.parallel.tensor_parallel_size)
        self.plan = make_plan(config, stage, self.ranks, precision, masked)
        model = config.model
        queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        specs = [
            {
                "patterns": [r".*attention\.qkv\.weight$"],
                "partition_type": "column",
                "shape": [[queries, keys, keys], -1],
            },
            {"patterns": [r".*gate_up\.weight$"], "partition_type": "column", "shape": [2, -1]},
            {"patterns": [r".*attention\.out\.weight$", r".*down\.weight$"], "partition_type": "row"},
        ]
        sharding = {"partition_config": {"use_default_specs": False, "layer_specs": specs}}
        engine_config = self.plan.engine_config | {
            "tensor_parallel": {"autotp_size": self.ranks.tensor_parallel.size, **sharding}
        }
        del engine_config["train_batch_size"]  # DeepSpeed would compare it with one over all ranks
        network = build_model(model, config.train.seed, "cpu", self.plan.ops)
        network.head.z_loss = config.train.z_loss
        without_mpu = dataclasses.replace(self.ranks, tensor_parallel=ALONE)
        with mock.patch("megaslm.training.engine.take_over", return_value=False):  # nor with a step of ours
            self.engine = TrainingEngine(network, config, engine_config, without_mpu, masked)


def choose_compiler(backend: str, missing: bool) -> None:
    """What torch.compile of every block makes one graph of; or the error of a rank without a compiler."""

    def fail(module: torch.nn.Module) -> None:
        raise RuntimeError("no compiler here")

    torch.nn.Module.compile = fail if missing else functools.partialmethod(COMPILE, backend=backend, fullgraph=True)


@contextlib.contextmanager
def poisoned(model: LanguageModel, name: str):
    hook = model.get_parameter(name).register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def without_tag(name: str):
    """Shard models as if the plan had forgotten that the ranks have other parts of this parameter."""
    shard_model, check_tags = run.shard_model, run.check_tags

    def shard(model, *arguments):
        shard_model(model, *arguments)
        del model.get_parameter(name).tensor_model_parallel

    run.shard_model = shard
    try:
        yield
    finally:
        run.shard_model, run.check_tags = shard_model, check_tags


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", type=Path)
    parser.add_argument("results", type=Path)
    arguments = parser.parse_args()
    # DeepSpeed asks for AVX512-FP16, since torch is slow without; it computes all the same.
    type(get_accelerator()).is_fp16_supported = lambda self: True
    linear, results = torch.nn.functional.linear, {}
    for name, case in json.loads(arguments.cases.read_text()).items():
        results[name] = train(case)
        if case["run"]["train"].get("compile"):
            torch.compiler.reset()  # else the graphs of all cases count together towards the limit of one function
        torch.nn.functional.linear = linear  # ZeRO-3 puts its own in its place and leaves it there
        gc.collect()
    if host.rank() == 0:
        arguments.results.write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
