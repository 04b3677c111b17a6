"""What takes the training steps of a case: this project's engine, or a peer."""

from typing import Protocol

from torch import Tensor

from megaslm.config import RunConfig, resolve_engine_config
from megaslm.model import count_parameters
from megaslm.parallel import Ranks
from megaslm.throughput.case import Case
from megaslm.throughput.peers import build_ddp, build_transformers
from megaslm.training import MicroBatch, RunData, StepClock, build_engine, choose_kernels


class Stepper(Protocol):
    """A network, its optimizer and what makes a training step of the two."""

    parameters: int
    """Of the network that is trained, on all ranks together."""
    compiled: str
    """How compilation went: "off", what is compiled, or why it fell back."""

    def step(self, micro_batches: list[MicroBatch], lr: float, clock: StepClock) -> Tensor:
        """One optimizer step over this rank's micro-batches of the global batch; tells `clock` its phases.

        Returns [2] float64 on the device: the sum of this rank's losses, in nats, and the number of its targets.
        """


class EngineStepper:
    """The Stepper that a run has: our network in the DeepSpeed engine."""

    def __init__(self, case: Case, run: RunConfig, ranks: Ranks, data: RunData):
        layout = case.batch(run)
        engine_config = resolve_engine_config(
            case.engine_config(),
            run=run,
            precision=case.precision,
            batch=layout,
            data_parallel_size=ranks.data_parallel_size,
        )
        ops = choose_kernels(run.train.kernels, ranks.device)
        sizes = layout.micro_batch_size, data.training.ignore_repeated_eod is not None
        engine, self.compiled = build_engine(run, engine_config, ranks, ops, case.precision, *sizes)
        self.step = engine.train_step
        self.parameters = count_parameters(run.model)


def build(case: Case, run: RunConfig, ranks: Ranks, data: RunData) -> Stepper:
    """The stepper of a case whose precision is resolved; `run` has its vocabulary, as `prepare_data` gives it.
    Collective."""
    masked_targets = data.training.ignore_repeated_eod is not None
    if case.kind == "hf":
        return build_transformers(run, ranks, case.precision, case.compiled, masked_targets)
    if case.kind == "ddp":
        ops = choose_kernels(run.train.kernels, ranks.device)
        micro_batch_size = case.batch(run).micro_batch_size
        return build_ddp(run, ranks, ops, case.precision, micro_batch_size, masked_targets)
    return EngineStepper(case, run, ranks, data)


def kernels_of(case: Case, run: RunConfig, ranks: Ranks) -> str:
    """Whose operations the network has."""
    return "transformers" if case.kind == "hf" else choose_kernels(run.train.kernels, ranks.device).backend
