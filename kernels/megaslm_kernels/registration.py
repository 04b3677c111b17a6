"""One differentiable op from four functions: a Triton forward and backward, and the same two as PyTorch formulas.

In eager mode the Triton functions run in a plain autograd.Function: a call through torch.library costs the host several
times as much, which is more than the GPU's time at the sizes of small models. While torch.compile traces, the op is
a registered one, opaque to the compiler: `megaslm::NAME` and `megaslm::NAME_backward`, Triton on CUDA, the formulas
on the CPU. The formulas also tell the compiler the shapes.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def register(
    name: str,
    forward: Callable,
    backward: Callable | None,
    forward_formula: Callable,
    backward_formula: Callable | None,
    save: Callable,
    gradients: Callable,
    fake: Callable | None = None,
    backward_fake: Callable | None = None,
) -> Callable:
    """A function of forward's arguments that returns its outputs and is differentiable, eager and compiled.

    forward, backward: fully annotated, since torch.library reads the schema off them; they return new tensors, which
        share no memory with an argument. forward_formula, backward_formula: the same in PyTorch operations; their
        outputs have the shapes, types and strides of the former's.
        Without a backward, gradients is made of PyTorch operations.
    save(ctx, inputs, output): keeps what backward needs, as in torch.autograd.Function.setup_context.
    gradients(ctx, backward, *output_gradients): one gradient or None per input of forward.
    fake, backward_fake: the outputs of each, not computed, where its formula is none for symbolic sizes.
    """
    registered = _registered(name, forward, forward_formula, fake)
    registered_backward = backward and _registered(f"{name}_backward", backward, backward_formula, backward_fake)
    registered.register_autograd(
        lambda ctx, *output_gradients: gradients(ctx, registered_backward, *output_gradients), setup_context=save
    )

    in_eager_mode = eager(name, forward, backward, save, gradients)

    def op(*inputs):
        return registered(*inputs) if torch.compiler.is_compiling() else in_eager_mode(*inputs)

    return op


def eager(name: str, forward: Callable, backward: Callable | None, save: Callable, gradients: Callable) -> Callable:
    """`register` without the registered op: for arguments of any kind, and not for torch.compile."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable  # a second derivative is an error, not a term that is missing in silence
        def backward(ctx, *output_gradients):
            return gradients(ctx, backward, *output_gradients)

    Eager.__name__ = Eager.__qualname__ = name
    return lambda *inputs: Eager.apply(*inputs) if torch.is_grad_enabled() else forward(*inputs)


def upcast(x: Tensor) -> Tensor:
    """`x` in fp32, or in fp64 if it is that: what the formulas compute in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _registered(
    name: str, implementation: Callable, formula: Callable, fake: Callable | None = None
) -> torch.library.CustomOpDef:
    op = torch.library.custom_op(f"megaslm::{name}", implementation, mutates_args=(), device_types="cuda")
    op.register_kernel("cpu", formula)
    op.register_fake(fake or formula)
    return op
