"""What users would train with otherwise, an optimizer step at a time, to be timed beside the engine.

Of both: weights, gradients and optimizer state in fp32; where the precision is bf16, autocast. torch's fused AdamW (or
whatever optimizer.type says) over the groups of parameters that the engine has, and clipping by the global norm. On
several ranks torch's DistributedDataParallel, which reduces the gradients while the last micro-batch is in its backward
pass and rests in those before it. The loss is the engine's, a mean over the targets of the global batch.

hf: transformers' own model, with its sdpa attention, which gets our initial weights, and what its Trainer does in a
step: the sum of a micro-batch's losses over the number of targets in the batch (num_items_in_batch), backward, clip,
update, zero_grad; torch.compile of the whole, outside of DDP, as accelerate has it. In its favour is left out what it
does beside that: logits copied to fp32 for the caller, losses looked at by the host after every micro-batch, a
key/value cache, the search for unused parameters, callbacks. Targets are the token after each, the last one's too,
which a Trainer's user would lose.

ddp: our network and kernels without DeepSpeed, by the recipe of nanoGPT's train.py; torch.compile of every block.
Autocast knows PyTorch's operations and not ours, so these get their arguments in bf16, and the residual stream is bf16
from the embedding on, as it is in the engine (nanoGPT's is fp32, which is slower).

Both get what is not theirs: the loader of a run, which reads ahead, and Python's garbage collector at rest. And hf has
two things that are not ours: its vocabulary is not padded to a multiple that suits the tensor cores, and its loss
computes its gradient in backward, where our fused one, ddp's too, does so in forward: these two phases can be compared
with hf's only as a sum.
"""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from megaslm_kernels import Ops
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megaslm.checkpoint import as_transformers, family_of, load_transformers
from megaslm.config import RunConfig
from megaslm.data import IGNORED_TARGET
from megaslm.errors import UserError
from megaslm.model import DTYPES, build_model, count_parameters
from megaslm.parallel import Ranks
from megaslm.training import NO_CLOCK, MicroBatch, StepClock, build_network, build_optimizer, choose_attention

PEERS = ("hf", "ddp")


def check_peer(peer: str, run: RunConfig) -> None:
    """Raise UserError where `peer` can't take the steps of `run`, whose model has its vocabulary."""
    size = run.parallel.tensor_parallel_size
    if size > 1:
        raise UserError(
            f"--compare {peer} has the whole model on every rank, and parallel.tensor_parallel_size is {size}: compare "
            "without tensor parallelism"
        )
    if peer == "ddp":
        return
    try:
        load_transformers()
    except ImportError:
        raise UserError("--compare hf needs transformers, which is not installed: pip install transformers") from None
    family_of(run.model)
    if run.data.mask_documents:
        raise UserError(
            "--compare hf: transformers' loop knows no documents within a window: data.mask_documents=false"
        )
    if run.train.z_loss:
        raise UserError(f"--compare hf: transformers has no z-loss, and train.z_loss is {run.train.z_loss:g}: set it 0")


def check_peer_precision(peer: str, precision: str) -> None:
    """Raise UserError where `peer` can't compute in it."""
    if precision not in ("fp32", "bf16"):
        raise UserError(f"--compare {peer} computes in fp32 or bf16, not in {precision}: change train.precision")


class PeerStepper:
    """Optimizer steps of a network that torch alone trains.

    Attributes:
        parameters: of the model that is trained.
        compiled: "off", "every block", "whole model", or why it is off.
    """

    def __init__(
        self, network: nn.Module, run: RunConfig, ranks: Ranks, precision: str, masked_targets: bool, compiled: str
    ):
        """
        Args:
            network: of a `MicroBatch`'s fields, gives the objective, to be differentiated, and the loss, each a sum.
            masked_targets: targets may be -100, and are counted in every step.
            compiled: "whole model": is done here.
        """
        self.parameters = count_parameters(run.model)
        self.compiled = compiled
        self._run, self._ranks, self._masked_targets = run, ranks, masked_targets
        self._dtype = DTYPES[precision]
        self._optimizer = build_optimizer(network, run.optimizer, offload=False)
        self._network, self._local_gradients = network.train(), contextlib.nullcontext
        if ranks.data_parallel_size > 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has another name for the next argument
                self._network = DistributedDataParallel(
                    network,
                    broadcast_buffers=False,  # they are constants
                    process_group=ranks.data_parallel.process_group,
                    gradient_as_bucket_view=True,
                )
            self._local_gradients = self._network.no_sync
        if compiled == "whole model":
            self._network.compile()

    def step(self, micro_batches: list[MicroBatch], lr: float, clock: StepClock = NO_CLOCK) -> Tensor:
        """As `TrainingEngine.train_step`: [2] float64, the sum of this rank's losses and the number of its targets."""
        clock.enter("forward")
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        sums = torch.zeros(2, dtype=torch.float64, device=self._ranks.device)
        losses, targets = sums
        scale = self._scale(micro_batches, targets)
        last = len(micro_batches) - 1
        for i, batch in enumerate(micro_batches):
            with contextlib.nullcontext() if i == last else self._local_gradients():
                clock.enter("forward")
                with torch.autocast(self._ranks.device.type, self._dtype, enabled=self._dtype != torch.float32):
                    objective, loss = self._network(*batch)
                losses += loss
                clock.enter("backward")
                (objective * scale).backward()
        clock.enter("optimizer")
        if self._run.optimizer.gradient_clipping:
            nn.utils.clip_grad_norm_(self._network.parameters(), self._run.optimizer.gradient_clipping)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return sums

    def _scale(self, micro_batches: list[MicroBatch], count: Tensor) -> float | Tensor:
        """What objectives are multiplied with: DDP takes the mean over ranks, the loss is one over the global batch's
        targets. `count` gets the number of this rank's."""
        size = self._ranks.data_parallel_size
        if not self._masked_targets:
            count.fill_(sum(batch.targets.numel() for batch in micro_batches))
            return size / self._run.tokens_per_step
        for batch in micro_batches:
            count += (batch.targets != IGNORED_TARGET).sum()
        total = count.clone()
        if size > 1:
            torch.distributed.all_reduce(total, group=self._ranks.data_parallel.process_group)
        return (size / total).float()


class TransformersLoss(nn.Module):
    """transformers' model with the interface of `LanguageModel.forward` with targets."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor, *documents: None) -> tuple[Tensor, Tensor]:
        # Over one item a mean is a sum. Labels that are shifted already are taken as they are.
        labels = {"labels": targets, "shift_labels": targets.contiguous(), "num_items_in_batch": 1}
        loss = self.model(input_ids=tokens, use_cache=False, **labels).loss
        return loss, loss.detach()


def build_transformers(
    run: RunConfig, ranks: Ranks, precision: str, compiled: bool, masked_targets: bool
) -> PeerStepper:
    """The peer "hf". Raises UserError: train.attention cannot be had here."""
    choose_attention(run, precision, ranks.device, tensor_parallel_size=1)  # sdpa goes by it too
    # Where the ranks compute: all of them on the host would hold the weights there several times each.
    model = as_transformers(build_model(run.model, run.train.seed, ranks.device))
    model.set_attn_implementation("sdpa")
    model.loss_type = "ForCausalLM"  # what transformers takes for it where a class's name says nothing, with a warning
    if run.train.activation_checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers 5 has another name for it too
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    how = "whole model" if compiled else "off"
    return PeerStepper(TransformersLoss(model), run, ranks, precision, masked_targets, how)


def build_ddp(
    run: RunConfig, ranks: Ranks, ops: Ops, precision: str, micro_batch_size: int, masked_targets: bool
) -> PeerStepper:
    """The peer "ddp", whose blocks are compiled where train.compile says so. Collective."""
    run = run.model_copy(update={"train": run.train.model_copy(update={"float8": "off"})})
    dtype = DTYPES[precision]
    if dtype != torch.float32:
        ops = within_autocast(ops, dtype, ranks.device.type)
    model, compiled = build_network(run, ranks, ops, precision, micro_batch_size, stage=0)
    if dtype != torch.float32:
        for embedding in (model.decoder.embedding, model.decoder.position_embedding):
            if embedding is not None:
                embedding.register_forward_hook(lambda module, inputs, output: output.to(dtype))
    return PeerStepper(model, run, ranks, precision, masked_targets, compiled)


def within_autocast(ops: Ops, dtype: torch.dtype, device_type: str) -> Ops:
    """`ops` for activations and fp32 weights that an autocast to `dtype` surrounds: their arguments are cast, and what
    they do inside is theirs."""

    def cast(op: Callable, count: int) -> Callable:
        """`op` with its first `count` arguments in `dtype`."""

        def in_dtype(*inputs):
            with torch.autocast(device_type, enabled=False):
                return op(*(x.to(dtype) for x in inputs[:count]), *inputs[count:])

        return in_dtype

    return replace(
        ops,
        rms_norm=cast(ops.rms_norm, 2),  # x, weight
        add_rms_norm=cast(ops.add_rms_norm, 3),  # x, residual, weight
        qk_norm_rotary=cast(ops.qk_norm_rotary, 4),  # queries, keys, their weights
        linear_cross_entropy=cast(ops.linear_cross_entropy, 2),  # hidden, weight
    )
