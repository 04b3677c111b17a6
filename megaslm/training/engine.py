"""The DeepSpeed engine as this project uses it: one training step, whatever the ZeRO stage and precision.

DeepSpeed owns the gradients' reduction, the sharding and the mixed precision. Ours are: the learning rate (set before
each step), the scale of the loss (a mean over the unmasked targets of the global batch, never a mean of means), and in
stage 0 the gradient norm and clipping, since DeepSpeed gives no norm there.
"""

import contextlib
import copy
import io
import math
import warnings

import torch
from megaslm_kernels import find_documents
from torch import Tensor, nn

from megaslm.config import OptimizerConfig, RunConfig, offloads_optimizer, resolved_precision, zero_stage
from megaslm.data import IGNORED_TARGET
from megaslm.errors import UserError, first_line
from megaslm.model import Block, Decoder, LanguageModel
from megaslm.parallel import Ranks, clip_gradients_, host
from megaslm.training.batches import MicroBatch
from megaslm.training.clock import BACKWARD, FORWARD, NO_CLOCK, OPTIMIZER, StepClock
from megaslm.training.cuda_graphs import CudaGraph, GraphedMicroStep, check_cuda_graphs
from megaslm.training.device_step import DeviceStep, take_over


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; norm weights, biases and other vectors do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig, offload: bool) -> torch.optim.Optimizer:
    """The client optimizer. Raises UserError where the one asked for cannot run on this machine."""
    groups = parameter_groups(model, config.weight_decay)
    options = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.type == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)
    if config.type == "apex_fused_adam":
        try:
            from apex.optimizers import FusedAdam
        except ImportError:
            raise UserError(
                "optimizer.type=apex_fused_adam needs NVIDIA's apex, which is not installed (build it from its source; "
                "the package called apex on the registry is another project); optimizer.type=adamw is torch's fused one"
            ) from None
        try:
            return FusedAdam(groups, **options, adam_w_mode=True)
        except RuntimeError as error:
            raise UserError(
                f"optimizer.type=apex_fused_adam does not run here ({first_line(error)}); apex must be built with its "
                "CUDA extensions, for a GPU; optimizer.type=adamw is torch's fused one"
            ) from error
    if torch.cuda.is_available() and not offload:
        raise UserError(
            "optimizer.type=deepspeed_cpu_adam updates weights in host memory; on a GPU it needs an engine config with "
            "zero_optimization.offload_optimizer (ds_configs/zero3_offload.json)"
        )
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        return DeepSpeedCPUAdam(groups, **options, adamw_mode=True)
    except (RuntimeError, OSError, AssertionError) as error:
        raise UserError(
            f"optimizer.type=deepspeed_cpu_adam could not be compiled ({first_line(error)}); "
            "it needs a C++ compiler and ninja; optimizer.type=adamw needs neither"
        ) from error


def compile_blocks(model: LanguageModel, run: RunConfig, micro_batch_size: int, dtype: torch.dtype) -> str | None:
    """Switch torch.compile on for every block. Returns None, or the reason why it stays off on all ranks. Collective.

    One block is tried first, forward and backward: a missing compiler shows here and not in the run. A sharded block
    waits for the other ranks, for ever where one of them has no compiler; so a whole one, of one sequence, goes first.
    """
    blocks, failure = model.decoder.blocks, None
    if run.parallel.tensor_parallel_size > 1:
        with next(blocks.parameters()).device:
            whole = Block(model.config, model.head.ops).to(dtype)
        failure = _compilation_failure(whole, model.decoder, run, 1, 1, dtype)
        torch.compiler.reset()  # else the sequences of two lengths would make all of them dynamic
    if failure is None:
        trial = copy.deepcopy(blocks[0]).to(dtype)
        failure = _compilation_failure(trial, model.decoder, run, micro_batch_size, run.parallel.sequence_parts, dtype)
    if failure is None:
        for block in blocks:
            block.compile()
    return failure


def _compilation_failure(
    block: nn.Module, decoder: Decoder, run: RunConfig, batch_size: int, sequence_parts: int, dtype: torch.dtype
) -> str | None:
    """Compile `block` and run it forward and backward. What went wrong on the first rank where something did, on all
    ranks; None where nothing did. Collective."""
    device, length = next(block.parameters()).device, run.seq_length
    x = torch.randn(batch_size, length // sequence_parts, run.model.hidden_size, dtype=dtype, device=device)
    positions = documents = rotary = failure = None
    if run.data.mask_documents:
        positions = torch.arange(length, dtype=torch.int32, device=device).repeat(batch_size, 1)
        documents = find_documents(positions, batch_size, run.model.head_dim, dtype)
    if decoder.rotary_table is not None:
        rotary = decoder.rotary_table(length, positions)
    try:
        block.compile()
        sum(block(x.requires_grad_(), x, rotary, documents)).sum().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Dynamo, Inductor and the compilers under them raise all kinds
        failure = f"{type(error).__name__}: {first_line(error)}"
    return next((reason for reason in host.gather(failure) if reason is not None), None)


class TrainingEngine:
    """`train_step(micro_batches, lr)` and what can be asked about it.

    masked_targets: whether targets of the training data may be -100 (the padding of packed files), so that the ranks
        must count those that are not, once a step; otherwise their number is known.
    """

    def __init__(
        self, model: LanguageModel, run: RunConfig, engine_config: dict, ranks: Ranks, masked_targets: bool = False
    ):
        import deepspeed

        self._stage = zero_stage(engine_config)
        self._clipping = run.optimizer.gradient_clipping
        self._masked_targets = masked_targets
        self._tensor_parallel = ranks.tensor_parallel
        self._tokens_per_step = run.tokens_per_step
        self._gradient_scale = (
            engine_config["gradient_accumulation_steps"] * ranks.data_parallel_size / self._tokens_per_step
        )
        self._grad_norm: Tensor | None = None  # of stage 0 under another optimizer than AdamW
        self._skipped = 0
        self._optimizer = optimizer = build_optimizer(model, run.optimizer, offloads_optimizer(engine_config))
        # DeepSpeed prints its memory use here, past its logger.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            # DeepSpeed 0.19.8 sets it only where there is an mpu (DeepSpeedEngine._configure_distributed_model), and an
            # engine without one would shard over the groups of an earlier engine of this process.
            deepspeed.utils.groups.mpu = ranks.mpu
            self.deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=engine_config, mpu=ranks.mpu
            )
        self._device_step = self._decide_on_the_device(ranks, offloads_optimizer(engine_config))
        self._graphed: GraphedMicroStep | None = None
        if run.train.cuda_graphs:
            check_cuda_graphs(run, resolved_precision(engine_config), engine_config, ranks.device)
            self._graphed = GraphedMicroStep(self.deepspeed, CudaGraph())

    @property
    def model(self) -> LanguageModel:
        """The network, through whose submodules sampling runs (the engine's hooks gather ZeRO-3 weights)."""
        return self.deepspeed.module

    def train_step(self, micro_batches: list[MicroBatch], lr: float, clock: StepClock = NO_CLOCK) -> Tensor:
        """One optimizer step over this rank's micro-batches of the global batch. `clock` is told its phases.

        Returns [2] float64 on the device: the sum of this rank's losses, in nats, and the number of its targets. The
        gradient is that of (sum of objectives over the global batch) / (its targets): the engine averages over ranks
        and accumulation steps, which the scale undoes.
        """
        engine = self.deepspeed
        clock.enter(FORWARD)
        engine.train()
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
        losses, targets = sums
        scale = self._scale(micro_batches, targets)
        for batch in micro_batches:
            if self._graphed is None:
                clock.enter(FORWARD)
                objective, loss = engine(*batch)
                losses += loss
                clock.enter(BACKWARD)
                engine.backward(objective * scale)
            else:
                clock.enter(BACKWARD)  # and forward, which is one with it
                losses += self._graphed.run(batch, scale)
            clock.enter(OPTIMIZER)
            if self._stage == 0 and engine.is_gradient_accumulation_boundary():
                self._clip_gradients()
            engine.step()
        return sums

    def _scale(self, micro_batches: list[MicroBatch], count: Tensor) -> float | Tensor:
        """What every objective of a step is multiplied with; `count` gets the number of this rank's targets."""
        if not self._masked_targets:
            count.fill_(sum(batch.targets.numel() for batch in micro_batches))
            return self._gradient_scale
        for batch in micro_batches:
            count += (batch.targets != IGNORED_TARGET).sum()
        # The host waits for none of it.
        total = count.clone()
        torch.distributed.all_reduce(total, group=self.deepspeed.data_parallel_group)
        return (self._gradient_scale * self._tokens_per_step / total).float()

    def _decide_on_the_device(self, ranks: Ranks, offload: bool) -> DeviceStep | None:
        """What clips and skips without a wait of the host; None where only the host can."""
        optimizer, outer = self._optimizer, self.deepspeed.optimizer
        if not isinstance(optimizer, torch.optim.AdamW) or offload or self.deepspeed.fp16_enabled():
            return None
        step = DeviceStep(optimizer, self._clipping, self._tensor_parallel, ranks.device)
        return step if outer is optimizer or take_over(outer, step) else None

    def _clip_gradients(self) -> None:
        """Stage 0: clip to the global L2 norm; a step whose gradient is not finite is left out and counted."""
        if self._device_step is not None:
            self._device_step.prepare((p, p.grad) for p in self.model.parameters() if p.grad is not None)
            return
        self._grad_norm = clip_gradients_(self.model.parameters(), self._clipping or math.inf, self._tensor_parallel)
        if not self._grad_norm.isfinite():
            self._skipped += 1
            self.model.zero_grad(set_to_none=True)

    @property
    def grad_norm(self) -> float:
        """Global L2 norm of the last step's gradient, before clipping; not finite when the step was skipped."""
        if self._device_step is not None:
            norm = self._device_step.norm
        else:
            norm = self._grad_norm if self._stage == 0 else self.deepspeed.get_global_grad_norm()
        return float(norm) if norm is not None else math.nan

    @property
    def skipped_steps(self) -> int:
        """Steps of this process whose gradient was not finite; their update was left out."""
        on_device = 0 if self._device_step is None else int(self._device_step.skipped)
        return self.deepspeed.skipped_steps + self._skipped + on_device

    @property
    def loss_scale(self) -> float | None:
        """Factor on the loss under fp16, else None."""
        return float(self.deepspeed.optimizer.cur_scale) if self.deepspeed.fp16_enabled() else None

    @torch.no_grad()
    def loss_sum(self, batch: MicroBatch) -> Tensor:
        """Sum of the losses of one batch in evaluation mode, fp32 scalar."""
        self.deepspeed.eval()
        _, loss = self.deepspeed(*batch)
        return loss
