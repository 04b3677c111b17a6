"""The chunked loss against PyTorch's: values, gradients, ignored targets, padding, chunks that do not divide."""

import pytest
import torch
import torch.nn.functional as F
from megaslm_kernels import IGNORE_INDEX, linear_cross_entropy_reference


def inputs(rows=37, vocab=50, width=24, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab - 6, (rows,), generator=generator)
    targets[::5] = IGNORE_INDEX
    return hidden, weight, targets


@pytest.mark.parametrize("chunk_rows", [1, 7, 36, 37, 1000])
def test_equals_cross_entropy_whatever_the_chunks(chunk_rows):
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy_reference(hidden, weight, targets, 44, chunk_bytes=4 * 50 * chunk_rows)
    (3.0 * loss).backward()
    expected_hidden, expected_weight = (
        hidden.detach().clone().requires_grad_(),
        weight.detach().clone().requires_grad_(),
    )
    expected = F.cross_entropy((expected_hidden @ expected_weight.T)[:, :44], targets, reduction="sum")
    (3.0 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hidden.grad, expected_hidden.grad)
    torch.testing.assert_close(weight.grad, expected_weight.grad)
    assert weight.grad[44:].abs().sum() == 0


def test_gradients_keep_the_precision_of_fp64_inputs():
    hidden, weight, targets = inputs(rows=5, vocab=12, width=4, dtype=torch.float64)
    linear_cross_entropy_reference(hidden, weight, targets).backward()
    reference_hidden = hidden.detach().clone().requires_grad_()
    F.cross_entropy(reference_hidden @ weight.detach().T, targets, reduction="sum").backward()
    torch.testing.assert_close(hidden.grad, reference_hidden.grad, atol=1e-6, rtol=1e-6)


def test_weight_gradient_in_bf16_does_not_get_worse_with_the_number_of_chunks():
    hidden, weight, targets = inputs(rows=512, vocab=64, width=32, dtype=torch.bfloat16)
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.detach().double() @ exact.T, targets, reduction="sum").backward()
    errors = []
    for rows in (512, 8):
        weight.grad = None
        linear_cross_entropy_reference(hidden, weight, targets, chunk_bytes=4 * 64 * rows).backward()
        errors.append(((weight.grad.double() - exact.grad).norm() / exact.grad.norm()).item())
    assert errors[1] <= 1.5 * errors[0] and errors[0] < 0.02


def test_no_gradient_is_computed_without_grad_mode_and_inputs_stay_as_they_are():
    hidden, weight, targets = inputs()
    before = hidden.detach().clone(), weight.detach().clone(), targets.clone()
    with torch.no_grad():
        loss = linear_cross_entropy_reference(hidden, weight, targets)
    assert not loss.requires_grad
    linear_cross_entropy_reference(hidden, weight, targets).backward()
    for now, then in zip((hidden, weight, targets), before, strict=True):
        assert torch.equal(now, then)


def test_all_targets_ignored_is_a_loss_of_zero_with_zero_gradients():
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy_reference(hidden, weight, torch.full_like(targets, IGNORE_INDEX))
    loss.backward()
    assert loss == 0 and hidden.grad.abs().sum() == 0 and weight.grad.abs().sum() == 0
