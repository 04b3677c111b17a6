"""The norm of a gradient that lies on several ranks, and clipping to it."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaslm.parallel.groups import Group


def global_norm(
    gradients: Iterable[tuple[nn.Parameter, Tensor]],
    tensor_parallel: Group,
    device: torch.device,
    shards: dist.ProcessGroup | None = None,
) -> Tensor:
    """L2 norm of the gradient of the whole model, an fp32 scalar on `device`, the same on every rank of the groups.

    gradients: (parameter, its gradient or this rank's part of that), of any type. Of sliced parameters (those tagged
        `tensor_model_parallel`) every rank of `tensor_parallel` has others; of the rest all have the same.
    shards: the ranks that have the other parts of these gradients. None: all of it is here.
    """
    own = [g for p, g in gradients if tensor_parallel.rank == 0 or getattr(p, "tensor_model_parallel", False)]
    norms = torch._foreach_norm(own, 2.0, dtype=torch.float32) if own else [torch.zeros((), device=device)]
    square = torch.stack(norms).square().sum()
    if shards is not None and shards.size() > 1:
        dist.all_reduce(square, group=shards)
    if tensor_parallel.size > 1:
        dist.all_reduce(square, group=tensor_parallel.process_group)
    return square.sqrt()


@torch.no_grad()
def clip_gradients_(parameters: Iterable[nn.Parameter], max_norm: float, group: Group) -> Tensor:
    """Scale the gradients to a `global_norm` of at most `max_norm`, inf for no limit. Returns the norm before that."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = global_norm([(p, p.grad) for p in parameters], group, parameters[0].device)
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
