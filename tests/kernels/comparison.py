"""An op against its reference: values, gradients, and what must not happen to its arguments."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers that `dtype` holds exactly, so that every precision computes on the same input."""
    generator = torch.Generator().manual_seed(hash((shape, seed)) & 0xFFFFFFFF)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


HEADS = [
    (1, 1, 1, 1, 16, 16),
    (2, 5, 12, 4, 64, 64),
    (1, 3, 5, 3, 80, 80),
    (2, 3, 4, 2, 96, 24),
    (2, 2, 3, 2, 12, 12),
    (1, 3, 6, 2, 20, 10),
    (1, 2, 3, 2, 256, 256),
    (1, 2, 28, 8, 64, 64),  # more tiles than one
]
"""Batch, sequence, query and key heads, channels of a head and how many of them are rotated."""


def packed_heads(b: int, s: int, h: int, k: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Queries and keys as views of one projection."""
    q, k, _ = random(b, s, (h + 2 * k) * d, dtype=dtype).unflatten(-1, (-1, d)).split((h, k, k), dim=2)
    return q, k


def angle_tables(positions: int, rotated: int) -> tuple[Tensor, Tensor]:
    """cos and sin of random angles."""
    angles = random(positions, rotated // 2, scale=3.0)
    return angles.cos(), angles.sin()


def assert_as_good_as_torch(
    op: Callable, reference: Callable, inputs: list, *, differentiable: list[int] | None = None, atol: float = 1e-6
) -> None:
    """`op` errs, in every output and gradient, at most twice as much as `reference` in the same type, plus `atol`.

    Errors are largest absolute differences from `reference` in fp64. Both are called with `inputs`; differentiable: the
    positions of those whose gradient is compared (all floating tensors by default). Upstream gradients are random. Also
    checked: the inputs are as they were, no output shares memory with an input, every gradient has something in it,
    and a second backward pass over the same graph gives the same again, bit for bit.
    """
    if differentiable is None:
        differentiable = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_floating_point()]
    before = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
    ours, again = _run(op, inputs, differentiable, torch.Tensor.detach, twice=True)
    theirs, _ = _run(reference, inputs, differentiable, torch.Tensor.detach)
    exact, _ = _run(reference, inputs, differentiable, _as_fp64)
    for index, (x, old) in enumerate(zip(inputs, before, strict=True)):
        assert not isinstance(x, Tensor) or torch.equal(x, old), f"input {index} was written to"
    for name, value in ours.items():
        assert value.shape == theirs[name].shape and value.dtype == theirs[name].dtype, name
        assert torch.isfinite(value).all(), name
        error, bound = ((y.double() - exact[name]).abs().max().item() for y in (value, theirs[name]))
        assert error <= 2 * bound + atol, f"{name}: error {error:.3g}, PyTorch's {bound:.3g}"
        assert name.startswith("output") or value.any(), f"{name} is zero everywhere"
        assert torch.equal(value, again[name]), f"{name} is another one the second time"


def loss_of_shards(op: Callable, shards: int) -> Callable:
    """The vocabulary-parallel loss `op` as one function of the whole weight: objective and cross-entropy.

    Every shard is computed in turn, twice: first to learn its statistics, then with those of all of them. The objective
    is the first one's, and its gradient the sum of all of theirs, as over ranks.
    """

    def loss(hidden, weight, targets, vocab_size, z_loss, chunk_bytes):
        size = weight.size(0) // shards
        told: list[list[Tensor]] = [[] for _ in range(shards)]

        def listen(shard: int) -> Callable:
            return lambda statistics: told[shard].append(statistics) or statistics.unsqueeze(0)

        def answer(calls: Iterator) -> Callable:
            return lambda statistics: torch.stack(next(calls))

        def run(shard: int, gather: Callable) -> tuple[Tensor, Tensor]:
            part = weight[shard * size : (shard + 1) * size]
            return op(hidden, part, targets, shard * size, vocab_size, z_loss, chunk_bytes, gather=gather)

        with torch.no_grad():
            for shard in range(shards):
                run(shard, listen(shard))
        results = [run(shard, answer(zip(*told, strict=True))) for shard in range(shards)]
        for objective, cross_entropy in results:
            assert torch.equal(objective, results[0][0]) and torch.equal(cross_entropy, results[0][1])
        gradients = sum(objective - objective.detach() for objective, _ in results)
        return results[0][0].detach() + gradients, results[0][1]

    return loss


def _as_fp64(x: Tensor) -> Tensor:
    return x.detach().double() if x.is_floating_point() else x


def _run(function: Callable, inputs: list, differentiable: list[int], convert: Callable, twice: bool = False):
    """Outputs and gradients by name, and the same of a second backward pass with the same upstream gradients."""
    inputs = [convert(x) if isinstance(x, Tensor) else x for x in inputs]
    for index in differentiable:
        inputs[index].requires_grad_()
    outputs = function(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    storages = {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, Tensor)}
    assert all(y.untyped_storage().data_ptr() not in storages for y in outputs), "an output is a view of an input"
    upstream = [random(*y.shape, seed=i + 1).to(y.dtype).to(torch.bfloat16).to(y.dtype) for i, y in enumerate(outputs)]
    wanted = [inputs[i] for i in differentiable]
    passes = []
    for last in [False, True] if twice else [True]:
        gradients = torch.autograd.grad(outputs, wanted, upstream, retain_graph=not last)
        named = {f"output {i}": y.detach().clone() for i, y in enumerate(outputs)}
        named |= {f"gradient of input {i}": g.clone() for i, g in zip(differentiable, gradients, strict=True)}
        passes.append(named)
    return passes[0], passes[-1]
