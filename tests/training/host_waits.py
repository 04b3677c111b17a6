"""What in a piece of PyTorch makes the host wait for a GPU, or would if there were one, counted on any device."""

import contextlib
from collections import Counter
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# A number or a shape that the host asks of the device; numbers of the host that are copied there from memory that is
# not pinned (torch.tensor); and fills with the value of a tensor, which the host reads.
WAITING_OPERATIONS = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.allclose.default,
    aten.bincount.default,
    aten.equal.default,
    aten.lift_fresh.default,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
}
# These look for the true elements of a mask first.
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# No operation of PyTorch on a CPU, where the tensor lies in the host's memory already.
WAITING_METHODS = {Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__array__}


class _Operations(TorchDispatchMode):
    def __init__(self, found: Counter[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = function in INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if masks or function in WAITING_OPERATIONS:
            self.found[str(function)] += 1
        return function(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found: Counter[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_host = function is Tensor.to and not kwargs.get("non_blocking")
        to_host = to_host and any(leaf in ("cpu", torch.device("cpu")) for leaf in tree_leaves((args[1:], kwargs)))
        if to_host or function in WAITING_METHODS:
            self.found[f"Tensor.{function.__name__}"] += 1
        return function(*args, **kwargs)


@contextlib.contextmanager
def host_waits():
    """Yields a counter of the waits within the context, by what waits: the operations and methods above and
    `synchronize` of the accelerator. What runs on a GPU alone (waits for streams and events) no CPU can show."""
    found, accelerator = Counter(), get_accelerator()
    synchronize = accelerator.synchronize

    def counted(*arguments):
        found["synchronize"] += 1
        return synchronize(*arguments)

    with mock.patch.object(accelerator, "synchronize", counted), _Operations(found), _Methods(found):
        yield found
