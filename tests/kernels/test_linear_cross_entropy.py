"""The chunked loss against PyTorch's: values, gradients, ignored targets, padding, z-loss, chunks of any size."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from megaslm_kernels.cross_entropy_formulas import IGNORE_INDEX
from megaslm_kernels.linear_cross_entropy import (
    chunk_limit,
    chunk_rows,
    linear_cross_entropy_reference,
    sharded_linear_cross_entropy_reference,
)

sys.path.insert(0, str(Path(__file__).parent))
from comparison import assert_as_good_as_torch, loss_of_shards  # noqa: E402


def inputs(rows=37, vocab=50, width=24, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab - 6, (rows,), generator=generator)
    targets[::5] = IGNORE_INDEX
    return hidden, weight, targets


def plain(hidden, weight, targets, vocab_size, z_loss):
    logits = (hidden @ weight.T)[:, :vocab_size]
    cross_entropy = F.cross_entropy(logits, targets, reduction="sum")
    return cross_entropy + z_loss * (logits.logsumexp(1).square() * (targets != IGNORE_INDEX)).sum(), cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk_rows", [1, 7, 36, 37, None])
def test_equals_cross_entropy_whatever_the_chunks(chunk_rows, z_loss, dtype):
    hidden, weight, targets = inputs(dtype=dtype)
    chunk_bytes = chunk_rows and dtype.itemsize * 50 * chunk_rows
    objective, cross_entropy = linear_cross_entropy_reference(hidden, weight, targets, 44, z_loss, chunk_bytes)
    assert objective.dtype == cross_entropy.dtype == dtype and not cross_entropy.requires_grad
    expected, expected_cross_entropy = plain(hidden, weight, targets, 44, z_loss)
    torch.testing.assert_close(objective, expected)
    torch.testing.assert_close(cross_entropy, expected_cross_entropy.detach())
    gradients = torch.autograd.grad(3.0 * objective, (hidden, weight))
    torch.testing.assert_close(gradients, torch.autograd.grad(3.0 * expected, (hidden, weight)))
    assert not gradients[1][44:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [None, 2])
@pytest.mark.parametrize("chunk_rows", [16, None])
def test_the_blocks_that_a_cpu_takes_do_not_show(chunk_rows, shards, dtype, monkeypatch):
    """Rows 6 at a time, and 5 of the vocabulary in a sum of products, against all at once."""
    hidden, weight, targets = inputs(dtype=dtype)
    op, chunk_bytes = linear_cross_entropy_reference, chunk_rows and dtype.itemsize * 50 * chunk_rows
    if shards:
        op = loss_of_shards(sharded_linear_cross_entropy_reference, shards)
    found = []
    for rows, product_rows in [(1000, 1000), (6, 5)]:
        monkeypatch.setattr("megaslm_kernels.cross_entropy_formulas.reference_rows", lambda *_, rows=rows: rows)
        monkeypatch.setattr("megaslm_kernels.linear_cross_entropy.product_rows", lambda n, rows=product_rows: rows)
        sums = op(hidden, weight, targets, 44, 1e-2, chunk_bytes)
        found.append((*sums, *torch.autograd.grad(sums[0], (hidden, weight))))
    *whole, of_weight = found[0]
    *blocks, of_weight_too = found[1]
    assert all(torch.equal(one, other) for one, other in zip(whole, blocks, strict=True))
    torch.testing.assert_close(of_weight, of_weight_too)  # the matrix library may sum smaller products differently


def test_weight_gradient_in_bf16_does_not_get_worse_with_the_number_of_chunks():
    hidden, weight, targets = inputs(rows=512, vocab=64, width=32, dtype=torch.bfloat16)
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.detach().double() @ exact.T, targets, reduction="sum").backward()
    errors = []
    for rows in (512, 8):
        weight.grad = None
        linear_cross_entropy_reference(hidden, weight, targets, chunk_bytes=2 * 64 * rows)[0].backward()
        errors.append(((weight.grad.double() - exact.grad).norm() / exact.grad.norm()).item())
    assert errors[1] <= 1.2 * errors[0] and errors[0] < 0.01


@pytest.mark.parametrize("chunk_bytes", [None, 2 * 50 * 8])
def test_the_upstream_gradient_is_not_rounded_to_bf16(chunk_bytes):
    """Its error would be one and the same for all elements: a learning rate that is off."""
    hidden, weight, targets = inputs(dtype=torch.bfloat16)
    objective, _ = linear_cross_entropy_reference(hidden, weight, targets, chunk_bytes=chunk_bytes)
    ones = torch.autograd.grad(objective, (hidden, weight), retain_graph=True)
    scale = 1.5 + 0.95 * 2**-8  # bf16 would make 1.5 of it
    scaled = torch.autograd.grad(objective, (hidden, weight), torch.tensor(scale))
    for one, other in zip(ones, scaled, strict=True):
        torch.testing.assert_close(
            other.double().norm() / one.double().norm() / scale, torch.tensor(1.0).double(), atol=5e-4, rtol=0
        )


def test_a_second_backward_pass_gives_the_same():
    hidden, weight, targets = inputs()
    objective, _ = linear_cross_entropy_reference(hidden, weight, targets)
    first = torch.autograd.grad(2.0 * objective, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(2.0 * objective, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_gradient_is_computed_without_grad_mode_and_inputs_stay_as_they_are():
    hidden, weight, targets = inputs()
    before = hidden.detach().clone(), weight.detach().clone(), targets.clone()
    with torch.no_grad():
        objective, _ = linear_cross_entropy_reference(hidden, weight, targets)
    assert not objective.requires_grad
    linear_cross_entropy_reference(hidden, weight, targets)[0].backward()
    for now, then in zip((hidden, weight, targets), before, strict=True):
        assert torch.equal(now, then)


def test_all_targets_ignored_is_a_loss_of_zero_with_zero_gradients():
    hidden, weight, targets = inputs()
    targets = torch.full_like(targets, IGNORE_INDEX)
    objective, cross_entropy = linear_cross_entropy_reference(hidden, weight, targets, z_loss=1e-2)
    objective.backward()
    assert objective == 0 == cross_entropy and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("row_bytes", [2 * 128, 2 * 16128, 2 * 50304, 2 * 128256, 4 * 50304])
@pytest.mark.parametrize("count", [1, 4096, 4097, 12288, 16384, 32768, 131072])
def test_chunks_are_large_even_and_within_their_budget(count, row_bytes):
    limit = chunk_limit(row_bytes, None)
    rows = chunk_rows(count, limit)
    chunks = -(-count // rows)
    assert chunks == -(-count // limit) and rows <= limit and limit >= 4096
    assert chunks == 1 or (rows % 128 == 0 or rows == limit) and rows - count // chunks <= 128


def test_in_fp16_the_weight_gradient_of_a_large_batch_is_finite():
    """It is the gradient of a sum: fp16 would overflow before the number of targets divides it."""
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(20_000, 8, generator=generator) + 4).half().requires_grad_()
    weight = torch.zeros(64, 8, dtype=torch.float16).requires_grad_()
    targets = torch.zeros(20_000, dtype=torch.int64)
    (linear_cross_entropy_reference(hidden, weight, targets)[0] / 20_000).backward()
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.detach().double() @ exact.T, targets).backward()
    torch.testing.assert_close(weight.grad.double(), exact.grad, atol=1e-4, rtol=2e-3)
    assert hidden.grad.isfinite().all()


def test_in_fp16_small_probabilities_have_a_gradient():
    hidden, weight = torch.ones(1, 1).half(), torch.tensor([[17.0], [0.0]]).half().requires_grad_()
    objective, _ = linear_cross_entropy_reference(hidden, weight, torch.tensor([0]))
    (2.0**15 * objective).backward()  # as a loss scale does
    assert weight.grad[1].item() == pytest.approx(2.0**15 * torch.tensor(-17.0).sigmoid().item(), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize(("shards", "chunk_rows"), [(1, 7), (2, None), (4, 36), (4, 1)])
def test_shards_of_the_vocabulary_make_up_the_whole(shards, chunk_rows, z_loss, dtype):
    """Of four, the last is padding altogether and the one before it in part."""
    hidden, weight, targets = inputs(vocab=48, dtype=dtype)
    targets = targets.where(targets == IGNORE_INDEX, targets % 30)
    chunk_bytes = chunk_rows and dtype.itemsize * (48 // shards) * chunk_rows

    def in_shards(hidden, weight):
        loss = loss_of_shards(sharded_linear_cross_entropy_reference, shards)
        return loss(hidden, weight, targets, 30, z_loss, chunk_bytes)[0]

    def whole(hidden, weight):
        logits = (hidden @ weight.T)[:, :30].to(torch.promote_types(hidden.dtype, torch.float32))
        squares = logits.logsumexp(1).square().where(targets != IGNORE_INDEX, 0.0).sum()
        return F.cross_entropy(logits, targets, reduction="sum") + z_loss * squares

    assert_as_good_as_torch(in_shards, whole, [hidden.detach(), weight.detach()], atol=1e-5)


def test_a_target_that_no_shard_holds_gives_no_number():
    hidden, weight, targets = inputs()
    targets[3] = 44
    loss, _ = sharded_linear_cross_entropy_reference(hidden, weight, targets, 0, 44, gather=lambda one: one[None])
    assert loss.isnan()


def test_shards_without_grad_mode_compute_no_gradient():
    hidden, weight, targets = inputs()
    before = hidden.detach().clone(), weight.detach().clone(), targets.clone()
    with torch.no_grad():
        objective, _ = sharded_linear_cross_entropy_reference(
            hidden, weight, targets, 0, 44, gather=lambda one: one[None]
        )
    assert not objective.requires_grad
    assert all(torch.equal(now, then) for now, then in zip((hidden, weight, targets), before, strict=True))


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


def test_shards_of_a_loss_that_nobody_wants_the_gradient_of():
    hidden, weight, targets = inputs()
    loss, _ = sharded_linear_cross_entropy_reference(hidden, weight, targets, 0, 44, gather=lambda one: one[None])
    (NoGradient.apply(loss) + hidden.sum()).backward()
    assert torch.equal(hidden.grad, torch.ones_like(hidden)) and weight.grad is None
