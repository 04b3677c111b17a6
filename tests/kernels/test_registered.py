"""The ops as torch.compile sees them, on the CPU: registered, opaque, computed by their formulas."""

import copy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from megaslm_kernels import REFERENCE, TRITON
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.library import opcheck

pytest.importorskip("triton", reason="without Triton there is no triton backend")
sys.path.insert(0, str(Path(__file__).parent))
from comparison import assert_as_good_as_torch, random  # noqa: E402

from megaslm.config import ModelConfig  # noqa: E402
from megaslm.model import build_model  # noqa: E402

TARGETS = torch.tensor([3, -100, 0, 39, 7, -100, 12, 1])


def arguments(op: str, dtype: torch.dtype = torch.float32) -> list:
    """Arguments of an op, with views of larger tensors where the model has them."""
    packed = random(2, 3, 8 * 16, dtype=dtype).unflatten(-1, (8, 16))
    q, k, _ = packed.split((4, 2, 2), dim=2)
    cos, sin = random(5, 6), random(5, 6, seed=1)
    return {
        "rms_norm": [random(2, 3, 48, dtype=dtype), random(48, dtype=dtype), 1e-5],
        "add_rms_norm": [
            random(2, 3, 48, dtype=dtype), random(2, 3, 48, dtype=dtype, seed=1), random(48, dtype=dtype), 1e-5,
        ],
        "rotary": [q, k, cos, sin, torch.tensor([[0, 1, 2], [0, 1, 0]])],
        "qk_norm_rotary": [q, k, random(16, dtype=dtype), random(16, dtype=dtype, seed=1), cos, sin, 1e-5],
        "swiglu": [random(2, 3, 96, dtype=dtype)],
        "cross_entropy": [random(8, 48, dtype=dtype), TARGETS, 40, 1e-2],
        "linear_cross_entropy": [random(8, 24, dtype=dtype), random(48, 24, dtype=dtype), TARGETS, 40, 1e-2],
    }[op]  # fmt: skip


OPS = ("rms_norm", "add_rms_norm", "rotary", "qk_norm_rotary", "swiglu", "cross_entropy", "linear_cross_entropy")


def differentiable(op: str) -> list[int]:
    return {"rotary": [0, 1], "qk_norm_rotary": [0, 1, 2, 3], "cross_entropy": [0], "linear_cross_entropy": [0, 1]}.get(
        op, [i for i, x in enumerate(arguments(op)) if isinstance(x, torch.Tensor)]
    )


@pytest.fixture(autouse=True)
def fresh_compiler():
    """All ops share one piece of code, of which the compiler keeps only so many variants."""
    torch.compiler.reset()


@pytest.fixture
def calls(monkeypatch):
    """calls(op) -> every call, with its arguments, of a registered op of ours while TRITON's `op` is compiled and
    differentiated."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function.namespace == "megaslm":
                self.calls.append((function, arguments))
            return function(*arguments, **(keywords or {}))

    def record(op: str) -> list:
        inputs = arguments(op)
        for index in differentiable(op):
            inputs[index] = inputs[index].detach().requires_grad_()
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        with Record() as recorded:
            outputs = getattr(TRITON, op)(*inputs)
            outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
            sum(y.sum() for y in outputs if y.requires_grad).backward()
        monkeypatch.undo()
        return recorded.calls

    return record


@pytest.mark.parametrize("op", OPS)
def test_opcheck(calls, op):
    """Schema, autograd registration, fake tensors and shapes that vary, of the op and of its backward."""
    recorded = calls(op)
    assert str(recorded[0][0]) == f"megaslm.{op}.default"
    assert len(recorded) == (1 if op == "linear_cross_entropy" else 2), recorded
    for function, inputs in recorded:
        # A backward op has no backward of its own: nothing of ours is differentiated twice.
        forward = not str(function).endswith("_backward.default")
        opcheck(function, tuple(
            x.detach().requires_grad_(x.requires_grad and forward) if isinstance(x, torch.Tensor) else x for x in inputs
        ))  # fmt: skip


BACKENDS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", OPS)
def test_compiled_ops_are_the_reference(op, dtype, backend):
    compiled = torch.compile(getattr(TRITON, op), fullgraph=True, backend=backend)
    outputs = {"linear_cross_entropy": 1}.get(op)  # the second is not differentiable

    def differentiable_outputs(function):
        return lambda *inputs: function(*inputs)[0] if outputs else function(*inputs)

    assert_as_good_as_torch(
        differentiable_outputs(compiled),
        differentiable_outputs(getattr(REFERENCE, op)),
        arguments(op, dtype),
        differentiable=differentiable(op),
        atol=2e-6,
    )


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_one_graph_serves_any_number_of_rows(op):
    """Also where the formula would take its blocks one after the other."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        getattr(TRITON, op), dynamic=True, backend=aot_autograd(fw_compiler=count, bw_compiler=count)
    )
    for rows in (8, 3000, 70_000):
        inputs = arguments(op)
        inputs[0] = random(rows, inputs[0].size(1)).requires_grad_()
        inputs = [torch.zeros(rows, dtype=torch.int64) if x is TARGETS else x for x in inputs]
        outputs = compiled(*inputs)
        (outputs if isinstance(outputs, torch.Tensor) else outputs[0]).sum().backward()
    assert len(graphs) == 2


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_compiled_model_on_the_registered_ops_is_the_reference(checkpointing):
    config = ModelConfig(
        vocab_size=40, context_length=16, num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_hidden_size=48,
        qk_norm=True,
    )  # fmt: skip
    expected = build_model(config, seed=1)
    model = build_model(config, seed=1, ops=TRITON)
    model.decoder.activation_checkpointing = checkpointing
    tokens = torch.arange(32).view(2, 16) % 40
    losses = []
    for network in (expected, torch.compile(model, fullgraph=not checkpointing, backend="aot_eager")):
        objective, loss = network(tokens, tokens.roll(1))
        objective.backward()
        losses.append(loss)
    torch.testing.assert_close(losses[1], losses[0])
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_a_model_with_its_ops_can_be_copied():
    """compile_blocks tries a copy of the first block."""
    config = ModelConfig(
        vocab_size=40, context_length=16, num_layers=1, hidden_size=32, num_heads=4, ffn_hidden_size=48
    )  # fmt: skip
    model = build_model(config, seed=1, ops=TRITON)
    assert copy.deepcopy(model).decoder.blocks[0].attention.ops.rotary is TRITON.rotary
