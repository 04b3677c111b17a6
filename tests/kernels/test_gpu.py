"""The kernels on a GPU, against the reference on the same GPU: what neither the interpreter nor the assembler shows."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from comparison import assert_as_good_as_torch, random  # noqa: E402
from megaslm_kernels import IGNORE_INDEX, REFERENCE, TRITON  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROWS = [(1, 64), (3, 192), (33, 1128), (4099, 1000), (4099, 4096)]
DTYPES = [torch.float32, torch.bfloat16]


def compare(op: str, inputs: list, differentiable: list[int] | None = None, atol: float = 1e-5) -> None:
    """Eager and compiled."""
    inputs = [x.cuda() if isinstance(x, torch.Tensor) else x for x in inputs]
    torch.compiler.reset()
    for function in (getattr(TRITON, op), torch.compile(getattr(TRITON, op), fullgraph=True)):
        assert_as_good_as_torch(function, getattr(REFERENCE, op), inputs, differentiable=differentiable, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, n", ROWS)
def test_norms_and_gate(tokens, n, dtype):
    x, residual, weight = random(tokens, n, dtype=dtype), random(tokens, n, dtype=dtype, seed=1), random(n, dtype=dtype)
    compare("rms_norm", [x, weight, 1e-5], atol=1e-4)
    compare("add_rms_norm", [x, residual, weight, 1e-5], atol=1e-4)
    compare("swiglu", [random(tokens, 2 * n, dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d, half", [(64, 32), (128, 64), (128, 16), (20, 6), (256, 128)])
@pytest.mark.parametrize("heads", [(12, 4), (7, 1), (36, 12)], ids=str)
def test_heads(heads, d, half, dtype):
    h, k = heads
    q, k, _ = random(3, 65, (h + 2 * k) * d, dtype=dtype).unflatten(-1, (-1, d)).split((h, k, k), dim=2)
    cos, sin = random(70, half), random(70, half, seed=1)
    positions = torch.arange(65).remainder(30).expand(3, 65).contiguous()
    weights = [random(d, dtype=dtype), random(d, dtype=dtype, seed=1)]
    compare("rotary", [q, k, cos, sin, positions], differentiable=[0, 1])
    compare("qk_norm_rotary", [q, k, *weights, cos, sin, 1e-5], differentiable=[0, 1, 2, 3], atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [(96, 128), (32000, 32000), (50257, 50304)], ids=str)
def test_losses(vocab, dtype):
    used, padded = vocab
    targets = torch.arange(4099).mul(7919).remainder(used)
    targets[::5] = IGNORE_INDEX
    compare("cross_entropy", [random(4099, padded, dtype=dtype), targets, used, 1e-3], differentiable=[0])
    inputs = [x.cuda() for x in (random(9000, 64, dtype=dtype), random(padded, 64, dtype=dtype, scale=0.1))]
    targets = torch.arange(9000).mul(7919).remainder(used).cuda()
    results = []
    for ops in (TRITON, REFERENCE):
        hidden, weight = (x.detach().requires_grad_() for x in inputs)
        objective, loss = ops.linear_cross_entropy(hidden, weight, targets, used, 1e-4)
        objective.backward()
        results.append([objective.detach(), loss, hidden.grad, weight.grad])
    for ours, theirs in zip(*results, strict=True):
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < (1e-4 if dtype == torch.float32 else 1e-2)


def test_the_weight_gradient_does_not_get_worse_with_the_number_of_chunks():
    """Its sum over chunks is in fp32, by products of bf16 that CUDA alone has."""
    hidden, weight = (random(n, 64, dtype=torch.bfloat16, seed=n).cuda().requires_grad_() for n in (8192, 128))
    targets = torch.arange(8192, device="cuda") % 128
    exact = weight.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(hidden.detach().double() @ exact.T, targets, reduction="sum").backward()
    errors = []
    for rows in (8192, 128):
        objective, _ = TRITON.linear_cross_entropy(hidden, weight, targets, None, 0.0, 2 * 128 * rows)
        (gradient,) = torch.autograd.grad(objective, weight)
        errors.append(float((gradient.double() - exact.grad).norm() / exact.grad.norm()))
    assert errors[1] <= 1.5 * errors[0] and errors[0] < 0.02


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_device_than_the_current_one():
    x, weight = random(8, 64), random(64)
    y = TRITON.rms_norm(x.to("cuda:1"), weight.to("cuda:1"), 1e-5)
    torch.testing.assert_close(y.cpu(), REFERENCE.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("chunk_bytes", [None, 2 * 128 * 128], ids=["one chunk", "several"])
def test_the_upstream_gradient_is_not_rounded_to_bf16(chunk_bytes):
    """CUDA rounds a scalar to the type of the tensor it is multiplied with, where a CPU does not."""
    hidden, weight = (random(n, 64, dtype=torch.bfloat16).cuda().requires_grad_() for n in (512, 128))
    targets = torch.arange(512, device="cuda") % 128
    objective, _ = TRITON.linear_cross_entropy(hidden, weight, targets, None, 0.0, chunk_bytes)
    ones = torch.autograd.grad(objective, (hidden, weight), retain_graph=True)
    scale = 1.5 + 0.95 * 2**-8  # bf16 would make 1.5 of it
    scaled = torch.autograd.grad(objective, (hidden, weight), torch.tensor(scale, device="cuda"))
    for one, other in zip(ones, scaled, strict=True):
        assert other.double().norm() / one.double().norm() / scale == pytest.approx(1.0, abs=5e-4)


def test_offsets_past_two_to_the_31():
    x = random(2, 64, dtype=torch.bfloat16).cuda()
    apart = torch.empty(2**31 + 64, dtype=torch.bfloat16, device="cuda")
    apart[:64], apart[-64:] = x
    weight = random(64, dtype=torch.bfloat16).cuda()
    strided = apart.as_strided((2, 64), (2**31, 1))
    assert torch.equal(TRITON.rms_norm(strided, weight, 1e-5), TRITON.rms_norm(x, weight, 1e-5))
