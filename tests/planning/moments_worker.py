"""Ranks that take steps in many layouts and write down the most memory at every moment of a step.

    moments_worker.py CASES.json RESULTS.json

CASES.json: {name: case}, see `measure` for the keys of a case.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import sys
from pathlib import Path
from unittest import mock

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch.profiler import ProfilerActivity, profile, record_function

from megaslm.parallel import host
from megaslm.planning import engine_layout, memory_estimate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from layout_engines import LayoutEngine, as_run  # noqa: E402

MARK = "moment: "
STEPS = 5
"""That are measured. What a thread of gloo is the last to let go of, most often on a busy machine, the profiler never
sees freed. That only adds to the step it happens in, and the least of some steps is without it."""


def measure(case: dict) -> dict:
    """run, stage, precision, zero, masked: see LayoutEngine. joined: elements of gradients that are reduced together.

    The most bytes at every moment of a step beyond what is held between two steps; by the formula all bytes at these
    moments, and those held.
    """
    run, masked = as_run(case["run"]), case.get("masked", False)
    joined = case.get("joined", 500_000_000)
    gc.collect()  # an earlier engine
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found, reducing_at_most(joined):
        engine = LayoutEngine(run, case["stage"], case["precision"], masked, case.get("zero"))
        with marked(engine.engine):
            engine.step()
            for _ in range(STEPS):
                gc.collect()
                mark("begin")
                engine.step()
                mark("end")
    ranks, batch = engine.ranks, engine.plan.layout
    layout = dataclasses.replace(
        engine_layout(engine.plan.engine_config),
        micro_batch_size=batch.micro_batch_size,
        accumulation_steps=batch.accumulation_steps,
        seq_length=run.seq_length,
        data_parallel_size=ranks.data_parallel_size,
        tensor_parallel_size=ranks.tensor_parallel.size,
        sequence_parallel=run.parallel.sequence_parallel,
        activation_checkpointing=run.train.activation_checkpointing,
        precision=case["precision"],
    )
    with mock.patch("megaslm.planning.memory.JOINED_GRADIENTS", joined):
        estimate = memory_estimate(run.model, layout, "reference", masked)
    engine.engine.deepspeed.destroy()
    return {
        "measured": maxima(found),
        "moments": {name: parts.total for name, parts in estimate.moments.items()},
        "held": estimate.held.total,
    }


def maxima(found: profile) -> dict[str, int]:
    """Bytes at most between a mark of a step and the next, beyond those when it began; of the step with the least."""
    events = [(e.start_ns(), e.name(), e.nbytes()) for e in found.profiler.kineto_results.events()]
    total, begun, moment, steps = 0, 0, "", [{}]
    for _, name, size in sorted(event for event in events if event[1] == "[memory]" or event[1].startswith(MARK)):
        if name == "[memory]":
            total += size
        else:
            moment = name.removeprefix(MARK)
            if moment == "begin":
                begun = total
                steps.append({})
        steps[-1][moment] = max(steps[-1].get(moment, 0), total - begun)
    measured = steps[1:]  # the first step, before any "begin", makes what is kept
    assert len(measured) == STEPS
    return {moment: min(step[moment] for step in measured) for moment in measured[0]}


def mark(name: str) -> None:
    with record_function(MARK + name):
        pass


@contextlib.contextmanager
def marked(engine):
    """Marks where the loss, its backward pass, that of the blocks, the reduction and the optimizer begin."""

    def before_norm(module, inputs):
        inputs[1].register_hook(lambda gradient: mark("blocks"))  # the branch: what the last block computed last

    model = engine.model
    hooks = [
        model.decoder.norm.register_forward_pre_hook(before_norm),
        model.head.register_forward_pre_hook(lambda module, inputs: mark("loss")),
    ]
    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.remove)
        for name, moment in (("backward", "backward"), ("allreduce_gradients", "reduction"), ("step", "optimizer")):
            original = getattr(engine.deepspeed, name)
            stack.enter_context(mock.patch.object(engine.deepspeed, name, functools.partial(after, moment, original)))
        original = engine.deepspeed.forward
        stack.enter_context(
            mock.patch.object(engine.deepspeed, "forward", functools.partial(after, "forward", original))
        )
        yield


def after(moment: str, function, *arguments, **options):
    mark(moment)
    return function(*arguments, **options)


@contextlib.contextmanager
def reducing_at_most(elements: int):
    original = DeepSpeedEngine.buffered_allreduce_fallback

    def reduce(self, grads=None, elements_per_buffer=0):
        return original(self, grads, elements)

    with mock.patch.object(DeepSpeedEngine, "buffered_allreduce_fallback", reduce):
        yield


def main() -> None:
    cases, results = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    found = {name: measure(case) for name, case in json.loads(cases.read_text()).items()}
    if host.rank() == 0:
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
