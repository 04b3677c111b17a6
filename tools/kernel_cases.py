"""The cases of benchmark_kernels.py: of every op its inputs, the fewest bytes it can move, and who implements it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar

import megaslm_kernels
import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
SEQUENCE = 2048  # tokens of one sequence, for the ops that know positions
QUERIES_PER_KEY = 4
IMPLEMENTATIONS = ("triton", "reference", "torch", "compile", "torch_fused", "liger", "apex")


class Absent(Exception):
    """The implementation is not here, or does not offer the op; the message says which."""


@dataclass(frozen=True)
class Case:
    """One op at one shape."""

    tokens: int
    width: int
    """Of the model. Of cross_entropy, which knows none, the vocabulary."""
    dtype: torch.dtype

    op: ClassVar[str]
    directions: ClassVar[tuple[str, ...]] = ("forward", "backward", "both")
    evaluates: ClassVar[bool] = False
    """Its forward direction is the one of evaluation: nothing requires a gradient."""
    passes: ClassVar[tuple[int, int]] = (2, 3)
    """How often forward and backward move a tensor of `elements` between memory and chip, at the least."""
    operations: ClassVar[tuple[int, int]]
    """Floating-point operations per element, forward and backward; exp, tanh and rsqrt count as one."""

    def sizes(self) -> dict[str, int]:
        """What tells this case from the others of its op."""
        return {"tokens": self.tokens, "width": self.width}

    def elements(self) -> int:
        return self.tokens * self.width

    def inputs(self, device: torch.device, seed: int) -> list:
        """Arguments of the op. Those that get a gradient require it."""
        raise NotImplementedError

    def traffic(self, direction: str) -> int:
        """Minimal bytes of device memory: every tensor once; weights and tables come from L2."""
        return self.elements() * self.dtype.itemsize * _of_direction(self.passes, direction)

    def flops(self, direction: str) -> int:
        return self.elements() * _of_direction(self.operations, direction)

    def _random(self, device: torch.device, seed: int, *shape: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        values = torch.randn(shape, generator=generator, device=device, dtype=self.dtype)
        return values.mul_(scale).add_(mean).requires_grad_()


def _of_direction(pair: tuple[int, int], direction: str) -> int:
    return {"forward": pair[0], "backward": pair[1], "both": sum(pair)}[direction]


class RmsNorm(Case):
    op = "rms_norm"
    operations = (4, 10)

    def inputs(self, device, seed):
        x = self._random(device, seed, self.tokens, self.width)
        return [x, self._random(device, seed + 1, self.width, mean=1.0, scale=0.1), EPS]


class AddRmsNorm(RmsNorm):
    op = "add_rms_norm"
    passes = (4, 4)
    operations = (5, 11)

    def inputs(self, device, seed):
        x, weight, eps = super().inputs(device, seed)
        return [x, self._random(device, seed + 2, self.tokens, self.width), weight, eps]


class LayerNorm(RmsNorm):
    op = "layer_norm"
    operations = (6, 13)

    def inputs(self, device, seed):
        x, weight, eps = super().inputs(device, seed)
        return [x, weight, self._random(device, seed + 2, self.width, scale=0.1), eps]


@dataclass(frozen=True)
class Rotary(Case):
    head_size: int

    op: ClassVar[str] = "rotary"
    passes = (2, 2)
    operations = (3, 3)

    def sizes(self):
        return super().sizes() | {"head_size": self.head_size, "heads": self.heads, "key_heads": self.key_heads}

    @property
    def heads(self) -> int:
        return self.width // self.head_size

    @property
    def key_heads(self) -> int:
        return max(1, self.heads // QUERIES_PER_KEY)

    def elements(self):
        return self.tokens * (self.heads + self.key_heads) * self.head_size

    def inputs(self, device, seed):
        """q and k are views of one packed projection, as in the model, and leaves: no gradient passes the slicing."""
        length = math.gcd(self.tokens, SEQUENCE)
        shape = self.tokens // length, length, self.heads + 2 * self.key_heads, self.head_size
        packed = self._random(device, seed, *shape).detach()
        q = packed[:, :, : self.heads].requires_grad_()
        k = packed[:, :, self.heads : self.heads + self.key_heads].requires_grad_()
        frequencies = 10000.0 ** -(torch.arange(0, self.head_size, 2, device=device) / self.head_size)
        angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
        return [q, k, angles.cos(), angles.sin()]


class QkNormRotary(Rotary):
    op = "qk_norm_rotary"
    passes = (2, 3)
    operations = (7, 13)

    def inputs(self, device, seed):
        q, k, cos, sin = super().inputs(device, seed)
        weights = (self._random(device, seed + i, self.head_size, mean=1.0, scale=0.1) for i in (1, 2))
        return [q, k, *weights, cos, sin, EPS]


class SwiGLU(Case):
    op = "swiglu"
    passes = (3, 5)
    operations = (5, 11)

    @property
    def ffn(self) -> int:
        """8/3 of the width, so that three matrices hold what two of four widths do, rounded up to 128."""
        return -(-8 * self.width // (3 * 128)) * 128

    def sizes(self):
        return super().sizes() | {"ffn": self.ffn}

    def elements(self):
        return self.tokens * self.ffn

    def inputs(self, device, seed):
        return [self._random(device, seed, self.tokens, 2 * self.ffn)]


class Gelu(Case):
    op = "gelu"
    operations = (9, 15)

    def elements(self):
        return self.tokens * 4 * self.width

    def inputs(self, device, seed):
        return [self._random(device, seed, self.tokens, 4 * self.width)]


class CrossEntropy(Case):
    """A loss may compute its gradient in the forward pass (Liger's does): its backward alone would compare nothing."""

    op = "cross_entropy"
    directions = ("forward", "both")
    evaluates = True
    passes = (1, 2)
    operations = (4, 4)

    def sizes(self):
        return {"tokens": self.tokens, "vocab": self.width}

    def inputs(self, device, seed):
        logits = self._random(device, seed, self.tokens, self.width, scale=2.0)
        return [logits, _targets(self.tokens, self.width, device, seed)]


@dataclass(frozen=True)
class LinearCrossEntropy(Case):
    vocab: int

    op: ClassVar[str] = "linear_cross_entropy"
    directions = ("forward", "both")
    evaluates = True

    def sizes(self):
        return super().sizes() | {"vocab": self.vocab}

    def inputs(self, device, seed):
        hidden = self._random(device, seed, self.tokens, self.width)
        weight = self._random(device, seed + 1, self.vocab, self.width, scale=self.width**-0.5)
        return [hidden, weight, _targets(self.tokens, self.vocab, device, seed)]

    def traffic(self, direction):
        """hidden and weight read, their gradients written."""
        each = (self.tokens + self.vocab) * self.width * self.dtype.itemsize
        return _of_direction((each, each), direction)

    def flops(self, direction):
        """One matrix product forward, two backward."""
        product = 2 * self.tokens * self.width * self.vocab
        return _of_direction((product, 2 * product), direction)

    def products(self, direction: str, device: torch.device) -> Callable[[], None]:
        """The matrix products of `direction` alone, logits and all: what the op is measured against."""
        hidden, weight, _ = (x.detach() for x in self.inputs(device, 0))
        logits = torch.empty(self.tokens, self.vocab, dtype=self.dtype, device=device)
        torch.mm(hidden, weight.T, out=logits)

        def run():
            torch.mm(hidden, weight.T, out=logits)
            if direction == "both":
                _ = logits @ weight, logits.T @ hidden

        return run


def _targets(rows: int, vocab: int, device: torch.device, seed: int) -> Tensor:
    targets = torch.randint(vocab, (rows,), generator=torch.Generator(device).manual_seed(seed), device=device)
    targets[::16] = megaslm_kernels.IGNORE_INDEX
    return targets


CASES = {
    case.op: case
    for case in (
        RmsNorm, AddRmsNorm, Rotary, QkNormRotary, SwiGLU, CrossEntropy, LinearCrossEntropy, LayerNorm, Gelu,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Implementation:
    """A way to compute an op."""

    function: Callable
    """Of the op's arguments after `prepare`; returns the op's differentiable outputs, in its order."""
    prepare: Callable[[list], list] = lambda arguments: arguments
    """What a user of it has at hand before the call: not timed."""


def implementation(op: str, name: str, device: torch.device) -> Implementation:
    """`name`'s way to compute `op`, for one shape (after eight of them torch.compile gives a function up).

    Raises Absent where there is none.
    """
    if name == "compile":
        torch.compiler.reset()
        # The chunks of the linear loss's reference are there to save memory: the plain formula is the better rival.
        found = implementation(op, "torch", device) if op == "linear_cross_entropy" else standard(op, device)
        return Implementation(torch.compile(found.function, dynamic=False), found.prepare)
    if name in ("triton", "reference"):
        function = getattr(megaslm_kernels.TRITON if name == "triton" else megaslm_kernels.REFERENCE, op, None)
        found = None if function is None else Implementation(function)
    else:
        found = {"torch": _torch, "torch_fused": _torch_fused, "liger": _liger, "apex": _apex}[name](op)
    if found is None:
        raise Absent("has no such op")
    if name in ("triton", "liger", "apex") and device.type != "cuda":
        raise Absent("needs a GPU")
    return found


def standard(op: str, device: torch.device) -> Implementation:
    """What every implementation of `op` is compared with."""
    return implementation(op, "reference" if hasattr(megaslm_kernels.REFERENCE, op) else "torch", device)


def _torch(op: str) -> Implementation | None:
    """Eager, as a user of PyTorch would write it."""

    def rotate(x, cos, sin):
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)

    def rotary(q, k, cos, sin):
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def qk_norm_rotary(q, k, q_weight, k_weight, cos, sin, eps):
        q, k = F.rms_norm(q, q_weight.shape, q_weight, eps), F.rms_norm(k, k_weight.shape, k_weight, eps)
        return rotary(q, k, cos, sin)

    def add_rms_norm(x, residual, weight, eps):
        total = x + residual
        return total, F.rms_norm(total, weight.shape, weight, eps)

    def swiglu(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def tables(arguments):
        """cos and sin in the model's type, with the axis of the heads."""
        return [x.unsqueeze(1).to(arguments[0].dtype) if _is_table(x) else x for x in arguments]

    return {
        "rms_norm": Implementation(lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps)),
        "add_rms_norm": Implementation(add_rms_norm),
        "layer_norm": Implementation(lambda x, weight, bias, eps: F.layer_norm(x, weight.shape, weight, bias, eps)),
        "gelu": Implementation(lambda x: F.gelu(x, approximate="tanh")),
        "rotary": Implementation(rotary, tables),
        "qk_norm_rotary": Implementation(qk_norm_rotary, tables),
        "swiglu": Implementation(swiglu),
        "cross_entropy": Implementation(lambda logits, targets: F.cross_entropy(logits, targets, reduction="none")),
        "linear_cross_entropy": Implementation(
            lambda hidden, weight, targets: F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
        ),
    }.get(op)


def _torch_fused(op: str) -> Implementation | None:
    """PyTorch's own chunked loss, from 2.13 on."""
    if op != "linear_cross_entropy":
        return None
    options = _symbol("torch.nn", "LinearCrossEntropyOptions")()
    return Implementation(
        lambda hidden, weight, targets: F.linear_cross_entropy(
            hidden, weight, targets, reduction="sum", options=options
        )
    )  # fmt: skip


def _liger(op: str) -> Implementation | None:
    """Liger as of 0.8.5, computing the same function: losses per row, sums of dW in fp32, norms that spare dy."""

    def symbol(name: str, module: str = "liger_kernel.transformers.functional") -> Callable:
        return _symbol(module, name)

    def rotary():
        rope = symbol("liger_rope")

        # As Hugging Face, Liger takes heads before tokens, each angle twice, and tables with an axis of sequences
        # (without it, 0.5.10 reads beyond them for the second).
        def function(q, k, cos, sin):
            q, k = rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            return q.transpose(1, 2), k.transpose(1, 2)

        return Implementation(function, lambda a: [x[None] if _is_table(x) else x for x in _tables_twice(a)])

    def add_rms_norm():
        fused = symbol("liger_fused_add_rms_norm")
        return Implementation(lambda x, residual, weight, eps: fused(x, residual, weight, eps, in_place=False)[::-1])

    def rms_norm():
        fused = symbol("liger_rms_norm")
        return Implementation(lambda x, weight, eps: fused(x, weight, eps, in_place=False))

    def cross_entropy():
        fused = symbol("liger_cross_entropy")
        return Implementation(lambda logits, targets: fused(logits, targets, reduction="none"))

    def linear_cross_entropy():
        fused = symbol("liger_fused_linear_cross_entropy")
        options = {"reduction": "sum", "accum_dtype": torch.float32}
        return Implementation(lambda hidden, weight, targets: fused(hidden, weight, targets, **options))

    build = {
        "rms_norm": rms_norm,
        "add_rms_norm": add_rms_norm,
        "rotary": rotary,
        "swiglu": lambda: Implementation(
            symbol("LigerFusedGateUpSiLUMulFunction", "liger_kernel.ops.swiglu").apply
        ),
        "cross_entropy": cross_entropy,
        "linear_cross_entropy": linear_cross_entropy,
        "layer_norm": lambda: Implementation(symbol("liger_layer_norm")),
    }.get(op)  # fmt: skip
    return build and build()


def _apex(op: str) -> Implementation | None:
    def norm(name: str):
        _symbol("fused_layer_norm_cuda", "__name__")  # apex imports without it and fails at the first call
        return _symbol("apex.normalization.fused_layer_norm", name)

    def rms_norm():
        fused = norm("fused_rms_norm_affine")
        return Implementation(lambda x, weight, eps: fused(x, weight, weight.shape, eps))

    def layer_norm():
        fused = norm("fused_layer_norm_affine")
        return Implementation(lambda x, weight, bias, eps: fused(x, weight, bias, weight.shape, eps))

    def rotary():
        rope = _symbol("apex.transformer.functional", "fused_apply_rotary_pos_emb_cached")

        def function(q, k, cos, sin):  # apex takes tokens before sequences
            return tuple(rope(x.transpose(0, 1), cos, sin, True).transpose(0, 1) for x in (q, k))

        return Implementation(
            function, lambda a: [x[:, None, None] if _is_table(x) else x for x in _tables_twice(a)]
        )  # fmt: skip

    def cross_entropy():
        loss = _symbol("apex.contrib.xentropy", "SoftmaxCrossEntropyLoss").apply
        ignored = megaslm_kernels.IGNORE_INDEX
        return Implementation(lambda logits, targets: loss(logits, targets, 0.0, ignored, True))

    build = {"rms_norm": rms_norm, "layer_norm": layer_norm, "rotary": rotary, "cross_entropy": cross_entropy}.get(op)
    return build and build()


def _is_table(x) -> bool:
    return isinstance(x, Tensor) and x.dim() == 2


def _tables_twice(arguments: list) -> list:
    """cos and sin as [tokens, head size], in the model's type."""
    return [torch.cat((x, x), dim=-1).to(arguments[0].dtype) if _is_table(x) else x for x in arguments]


def _symbol(module: str, name: str) -> Callable:
    """Of an optional package: probed one by one, since their versions differ in what they offer."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, OSError) as error:  # OSError: a library of another CUDA
        raise Absent(str(error)) from error
