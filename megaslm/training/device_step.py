"""An optimizer step for which the host never waits: clipping, and the skip of a step whose gradient is not finite.

DeepSpeed 0.19.8 brings the gradient's norm to the host in every step, to decide whether to clip and whether to skip; on
a GPU the host waits until the last gradient is computed, and queues nothing meanwhile. Here both are decided on the
device: torch's fused AdamW divides the gradient by a `grad_scale` as it reads it (so that clipping costs no pass over
the gradient either), and leaves weights, moments and its step counts as they are where `found_inf` is 1. Both were made
for torch.amp.GradScaler.

That replaces what `step` of DeepSpeed's optimizers decides, and reaches below its public interface for it: with other
versions than the pinned one `check_engine` refuses to run, and tests/training/test_device_step.py compares. What keeps
DeepSpeed's own step: fp16, whose loss scale is the host's; optimizers other than torch's AdamW; offload, where the host
computes. All else is as in DeepSpeed's own step, but for a gradient of finite numbers whose norm is beyond fp32: it is
left out here, and ZeRO-3 would apply it, clipped to nothing.

What still waits for a GPU is DeepSpeed's passes, where they communicate: ZeRO-3 at the end of every micro-batch's
backward pass (for its stream of reductions), before it reduces a bucket while many others are on their way, and in some
of its fetches of parameters; ZeRO-2 with overlap_comm=true (the files of ds_configs have false) at the end of every
backward pass and before every bucket, and so does ZeRO-1 without fp32 accumulation. A CPU runs none of these lines.
"""

import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from megaslm.parallel import Group, global_norm

EPS = 1e-6  # added to the norm before it divides, as in torch.nn.utils.clip_grad_norm_


class DeviceStep:
    """What a step does with the norm of its gradient, before the AdamW under it runs.

    clipping: largest norm of the gradient that is applied; 0: any.
    """

    def __init__(self, adamw: torch.optim.AdamW, clipping: float, tensor_parallel: Group, device: torch.device):
        self.norm: Tensor | None = None
        """Global L2 norm of the last step's gradient before clipping, on the device; None before the first step."""
        self.skipped = torch.zeros((), device=device)
        """Steps that were left out, on the device."""
        self._adamw = adamw
        self._clipping = clipping
        self._tensor_parallel = tensor_parallel

    @torch.no_grad()
    def prepare(self, gradients: Iterable[tuple[nn.Parameter, Tensor]], shards=None) -> None:
        """Have the next steps of the AdamW clip to, or leave out, the gradient of which these are this rank's parts.

        gradients, shards: as in `global_norm`.
        """
        self.norm = global_norm(gradients, self._tensor_parallel, self.skipped.device, shards)
        skip = (~self.norm.isfinite()).float()
        self.skipped += skip
        self._adamw.found_inf = skip
        self._adamw.grad_scale = ((self.norm + EPS) / self._clipping).clamp(min=1.0) if self._clipping else None


def take_over(optimizer, step: DeviceStep) -> bool:
    """Let `step` decide in the steps of DeepSpeed's `optimizer`. False: it is one whose own step stays."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if getattr(optimizer, "offload_param", False):
        return False
    if isinstance(optimizer, BF16_Optimizer) and optimizer.grad_acc_dtype == torch.float32:
        optimizer.step = functools.partial(_step_of_bf16, optimizer, step, _own_parts(optimizer))
        if not optimizer.immediate_grad_update:
            optimizer.update_hp_grads = _accumulation_of_bf16(optimizer)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        # Not its own norm, its check of it, and what it multiplies gradients with.
        optimizer.compute_grad_norm = optimizer.check_grad_overflow = False
        optimizer.unscale_and_clip_grads = _as_they_are
        optimizer.step = functools.partial(_step_of_zero_1_and_2, optimizer, step, optimizer.step)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer._get_norm_groups = functools.partial(_norms_of_zero_3, optimizer, step)
        optimizer.unscale_and_clip_grads = _as_they_are
    else:
        return False
    return True


def _as_they_are(*_) -> None:
    """The AdamW scales the gradients itself."""


@torch.no_grad()
def _step_of_bf16(optimizer, step: DeviceStep, parts: list[tuple[nn.Parameter, Tensor]]) -> None:
    """ZeRO-1 with fp32 accumulation: `BF16_Optimizer.step` without its norm and its end: the engine calls `zero_grad`
    after every step, which clears the same sums."""
    step.prepare(parts, optimizer.dp_process_group)
    partitions = optimizer.fp32_groups_flat_partition, optimizer.fp32_groups_gradient_flat_partition
    for weights, gradient in zip(*partitions, strict=True):
        weights.grad = gradient
    optimizer.optimizer.step()
    optimizer._lazy_init_hp_params_optimizer_state()
    optimizer.update_lp_params()


def _own_parts(optimizer) -> list[tuple[nn.Parameter, Tensor]]:
    """Parameters of which this rank updates a part, and where that part's gradient is summed: every rank has the whole
    gradient, and need not read all of it for its norm."""
    parts = []
    for parameters, own in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradient_flat_partition, strict=True):
        for parameter in parameters:
            if parameter._hp_mapping is not None:
                where = parameter._hp_mapping.get_hp_fragment_address()
                parts.append((parameter, own.narrow(0, where.start, where.numel)))
    return parts


def _accumulation_of_bf16(optimizer) -> Callable[..., None]:
    """`BF16_Optimizer.update_hp_grads` without a copy of every gradient in fp32: the sums read those in bf16 as they
    are, a kernel for each parameter. They are then given up, so that the next backward pass writes new ones instead of
    adding to zeros, and their memory is free between passes; not that of a CUDA graph, whose pool keeps it."""
    parameters = [parameter for group in optimizer.bf16_groups for parameter in group]
    gradients = [gradient for group in optimizer.fp32_groups_gradients for gradient in group]
    sums = [gradient.view_as(parameter) for gradient, parameter in zip(gradients, parameters, strict=True)]

    @torch.no_grad()
    def accumulate(clear_lp_grads: bool = False) -> None:
        found = [(total, p) for total, p in zip(sums, parameters, strict=True) if p.grad is not None]
        torch._foreach_add_([total for total, _ in found], [p.grad for _, p in found])
        for _, p in found:
            p.grad = None

    return accumulate


def _step_of_zero_1_and_2(optimizer, step: DeviceStep, own_step: Callable[[], None]) -> None:
    step.prepare(_partitioned(optimizer, optimizer.params_in_partition), optimizer.dp_process_group)
    own_step()


def _norms_of_zero_3(optimizer, step: DeviceStep) -> list[float]:
    """A norm that DeepSpeed finds in order, without asking the device."""
    step.prepare(_partitioned(optimizer, optimizer.fp16_groups), optimizer.dp_process_group)
    return [0.0]


def _partitioned(optimizer, groups: list[list[nn.Parameter]]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Parameters of which this rank has a part, and that part's gradient."""
    for index, parameters in enumerate(groups):
        gradients = (g for g in optimizer.averaged_gradients[index] if not getattr(g, "_zero_padding", False))
        yield from zip(parameters, gradients, strict=True)
