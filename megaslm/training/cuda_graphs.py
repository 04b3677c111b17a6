"""Forward and backward pass of a micro-batch as one CUDA graph: train.cuda_graphs.

A small model's kernels are shorter than the host takes to launch them. A graph launches all of a micro-step with one
call: its kernels are recorded once, with the addresses that they read and write, and replayed for every micro-batch,
whose tokens are copied to where the recorded ones lay.

A replay runs no Python. So what DeepSpeed does in Python with a micro-step must be either outside of the graph or the
same every time: that holds for ZeRO-1 with fp32 accumulation (BF16_Optimizer), which adds every micro-batch's gradients
to sums in one place and communicates after the last one. The reduction and the optimizer's step stay outside.

The graph keeps the memory of its activations for itself, also while evaluation runs.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from megaslm.config import RunConfig, cuda_graphs_problem
from megaslm.errors import UserError
from megaslm.training.batches import MicroBatch

WARM_UP_RUNS = 3  # as torch.cuda.make_graphed_callables has: whatever is made at a first run is there then


class Graph(Protocol):
    """Recorded work on a device."""

    def capture(self, work: Callable[[], None]) -> None:
        """Run `work` as often as it takes, and record it."""

    def replay(self) -> None:
        """What `work` did on the device, with the same memory, once."""


class CudaGraph:
    """A `Graph` on the current CUDA device."""

    def __init__(self):
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, work: Callable[[], None]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        # Batches are copied to pinned memory by another thread meanwhile, which a capture of all threads would forbid.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            work()

    def replay(self) -> None:
        self._graph.replay()


def check_cuda_graphs(run: RunConfig, precision: str, engine_config: dict, device: torch.device) -> None:
    """Raise UserError where a micro-step under that engine config cannot be a graph."""
    if problem := cuda_graphs_problem(run, precision, engine_config, device.type == "cuda"):
        raise UserError(problem)


class GraphedMicroStep:
    """The micro-step of a DeepSpeed engine with BF16_Optimizer, recorded at its first run, with the batch's shapes."""

    def __init__(self, engine, graph: Graph):
        from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

        assert isinstance(engine.optimizer, BF16_Optimizer), "DeepSpeed makes another one of this engine config"
        self._engine = engine
        self._graph = graph
        self._tokens: Tensor | None = None

    def run(self, batch: MicroBatch, scale: float | Tensor) -> Tensor:
        """Add the gradient of `scale` times the objective of `batch` to the engine's; the loss, fp32, which the next
        run writes over."""
        assert batch.positions is None, "documents kept apart have other shapes in every batch"
        if self._tokens is None:
            self._capture(batch)
        assert batch.tokens.shape == self._tokens.shape, f"{batch.tokens.shape} is not what was recorded"
        self._tokens.copy_(batch.tokens)
        self._targets.copy_(batch.targets)
        self._scale.copy_(scale) if isinstance(scale, Tensor) else self._scale.fill_(scale)
        self._graph.replay()
        # In `DeepSpeedEngine.backward` this is the end of it; it looks for the boundary of the accumulation itself.
        self._engine.allreduce_gradients()
        return self._loss

    def _capture(self, batch: MicroBatch) -> None:
        """At the first micro-batch of a step: the sums of gradients are zero before, and after."""
        self._tokens, self._targets = batch.tokens.clone(), batch.targets.clone()
        self._loss, self._scale = torch.ones(2, device=batch.tokens.device).unbind()
        self._graph.capture(self._micro_step)
        left = [name for name, parameter in self._engine.module.named_parameters() if parameter.grad is not None]
        assert not left, f"a replay would add to the gradients that are left of {left}"
        self._engine.optimizer.clear_hp_grads()

    def _micro_step(self) -> None:
        """What the DeepSpeed engine does with a micro-batch up to the reduction. Its hooks on the network start and
        stop its instruments, which `check_cuda_graphs` refuses, and do nothing else for this optimizer."""
        engine = self._engine
        objective, loss = engine.module(self._tokens, self._targets)
        self._loss.copy_(loss.detach())
        (objective * self._scale / engine.gradient_accumulation_steps()).backward()
        engine.optimizer.backward_epilogue()
