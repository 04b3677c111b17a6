"""The loss of given logits, of whole rows and of shards of the vocabulary, against PyTorch's."""

import pytest
import torch
from comparison import assert_as_good_as_torch, random
from megaslm_kernels.cross_entropy import cross_entropy, shard_gradient_, shard_statistics
from megaslm_kernels.cross_entropy_formulas import (
    IGNORE_INDEX,
    cross_entropy_reference,
    shard_gradient_reference_,
    shard_statistics_reference,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Rows, columns, vocabulary: a padded one, one column, less than a block, blocks without a rest, and several with one.
SHAPES = [(5, 128, 96), (1, 8, 3), (3, 192, 192), (4, 1000, 999), (2, 1128, 1128), (2, 4096, 4096), (3, 33000, 32768)]


def targets_of(rows: int, vocab_size: int) -> torch.Tensor:
    """The last id of the vocabulary in row 0, and an ignored row wherever there is a second."""
    targets = torch.arange(rows) * 7919 % vocab_size
    targets[0] = vocab_size - 1
    targets[1::3] = IGNORE_INDEX
    return targets


@DTYPES
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_reference(shape, z_loss, dtype):
    rows, columns, vocab_size = shape
    logits = random(rows, columns, dtype=dtype, scale=3.0)
    inputs = [logits, targets_of(rows, vocab_size), vocab_size, z_loss]
    assert_as_good_as_torch(cross_entropy, cross_entropy_reference, inputs)


@DTYPES
def test_logits_and_upstream_gradient_of_any_stride(dtype):
    logits = random(3, 4 * 320, dtype=dtype)[:, 320:640].requires_grad_()
    targets = torch.tensor([0, 9, 317, 1, 2, 319])[::2]
    exact = logits.detach().double().requires_grad_()
    losses = cross_entropy(logits, targets)
    losses.sum().backward()  # an upstream gradient of stride 0
    cross_entropy_reference(exact, targets).sum().backward()
    torch.testing.assert_close(losses.double(), cross_entropy_reference(exact, targets))
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-6, rtol=2**-8)


def test_large_logits_and_logits_of_minus_infinity():
    logits = random(4, 500, scale=1e4)
    logits[1, 3:] = -torch.inf
    logits[2, :490] = -torch.inf  # no finite one before the end
    targets = torch.tensor([0, 2, 499, 7])
    torch.testing.assert_close(cross_entropy(logits, targets), cross_entropy_reference(logits, targets))


def test_a_confident_loss_does_not_cancel():
    logits = torch.full((1, 64), 1000.0)
    logits[0, 5] += 12.0
    exact = cross_entropy_reference(logits.double(), torch.tensor([5]))
    torch.testing.assert_close(cross_entropy(logits, torch.tensor([5])).double(), exact, atol=0, rtol=1e-3)


def test_a_target_out_of_range_is_seen():
    losses = cross_entropy(random(3, 128), torch.tensor([96, -1, 5]), 96)
    assert losses.isnan().tolist() == [True, True, False]


def test_an_ignored_row_has_no_gradient_however_large_its_logits():
    """Nor has it NaN, which the exponential of a large logit times nothing would be."""
    logits, targets = random(3, 64, scale=1e4), torch.tensor([3, IGNORE_INDEX, 5])
    for op in (cross_entropy, cross_entropy_reference):
        x = logits.clone().requires_grad_()
        op(x, targets, 60, 1e-2).sum().backward()
        assert x.grad.isfinite().all() and not x.grad[1].any() and x.grad[0].any()
    for statistics, gradient_ in BACKENDS.values():
        x = logits.clone()
        maximum, total, _ = statistics(x, targets, 0, 60)
        gradient_(x, targets, 0, 60, maximum + total.log(), torch.ones(3), 1e-2)
        assert x.isfinite().all() and not x[1].any() and x[0].any()


BACKENDS = {
    "triton": (shard_statistics, shard_gradient_),
    "reference": (shard_statistics_reference, shard_gradient_reference_),
}


@DTYPES
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_of_the_vocabulary_make_up_the_whole(backend, shards, dtype):
    """With four, the last is padding altogether and the one before it in part."""
    statistics, gradient_ = BACKENDS[backend]
    rows, columns, vocab_size, z_loss = 6, 640, 470, 1e-2
    logits = random(rows, columns, dtype=dtype, scale=3.0)
    targets = torch.tensor([0, 159, 160, IGNORE_INDEX, 320, 469])
    scale = random(rows, seed=1)

    exact = logits.double().requires_grad_()
    expected = cross_entropy_reference(exact, targets, vocab_size, z_loss)
    expected.backward(scale.double())

    width = columns // shards
    parts = [(logits[:, first : first + width], first) for first in range(0, columns, width)]
    maxima, sums, target_logits = (
        torch.stack(column)
        for column in zip(*(statistics(x, targets, first, vocab_size) for x, first in parts), strict=True)
    )
    maximum = maxima.amax(0)
    log_sum = (sums * (maxima - maximum).exp()).sum(0).log()
    logsumexp = maximum + log_sum
    losses = log_sum + (maximum - target_logits.sum(0)) + z_loss * logsumexp.square()
    losses = losses.where(targets != IGNORE_INDEX, 0.0)
    torch.testing.assert_close(losses.double(), expected.detach(), atol=2e-6, rtol=1e-6)
    assert maxima.dtype == sums.dtype == target_logits.dtype == torch.float32
    if shards == 4:
        assert (maxima[3] == -torch.inf).all() and not sums[3].any() and not target_logits[3].any()

    for x, first in parts:
        gradient_(x, targets, first, vocab_size, logsumexp, scale, z_loss)
    torch.testing.assert_close(logits.double(), exact.grad, atol=2e-6, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5)
    assert not logits[:, vocab_size:].any() and not logits[3].any()
