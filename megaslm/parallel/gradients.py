"""The norm of a gradient that lies on several ranks, and clipping to it: for ZeRO stage 0, where DeepSpeed has none."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaslm.parallel.groups import Group


def global_norm(parameters: Iterable[nn.Parameter], group: Group) -> Tensor:
    """L2 norm of the gradient of the whole model, an fp32 scalar on its device, the same on every rank of `group`.

    Of sliced parameters (those tagged `tensor_model_parallel`) every rank has others; of the rest all have the same.
    """
    sliced, same = [], []
    for parameter in parameters:
        if parameter.grad is not None:
            is_sliced = group.size > 1 and getattr(parameter, "tensor_model_parallel", False)
            (sliced if is_sliced else same).append(parameter.grad)
    if not sliced:
        return nn.utils.get_total_norm(same).float()
    square = nn.utils.get_total_norm(sliced).float().square()
    dist.all_reduce(square, group=group.process_group)
    if same:
        square += nn.utils.get_total_norm(same).float().square()
    return square.sqrt()


@torch.no_grad()
def clip_gradients_(parameters: Iterable[nn.Parameter], max_norm: float, group: Group) -> Tensor:
    """Scale the gradients to a `global_norm` of at most `max_norm`, inf for no limit. Returns the norm before that."""
    parameters = list(parameters)
    norm = global_norm(parameters, group)
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
