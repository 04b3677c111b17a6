"""The fused chunked loss against the plain one: values, gradients, chunks."""

import pytest
import torch
from comparison import assert_as_good_as_torch, loss_of_shards, random
from megaslm_kernels.cross_entropy_formulas import IGNORE_INDEX, cross_entropy_reference
from megaslm_kernels.linear_cross_entropy import linear_cross_entropy, sharded_linear_cross_entropy


def plain(hidden, weight, targets, vocab_size, z_loss, chunk_bytes):
    logits = hidden @ weight.T
    objective = cross_entropy_reference(logits, targets, vocab_size, z_loss).sum()
    return objective, cross_entropy_reference(logits, targets, vocab_size).sum().detach()


def objective_of(op):
    return lambda *inputs: op(*inputs)[0]


def arguments(rows, vocab, width, dtype):
    hidden, weight = random(rows, width, dtype=dtype), random(vocab, width, dtype=dtype, seed=1, scale=0.3)
    targets = torch.arange(rows) * 7919 % (vocab - 6)
    targets[::5] = IGNORE_INDEX
    targets[-1] = vocab - 7
    return hidden, weight, targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [1, 7, 36, 37, None])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_it_is_the_plain_loss_whatever_the_chunks(z_loss, chunk_rows, dtype):
    hidden, weight, targets = arguments(37, 134, 24, dtype)
    chunk_bytes = chunk_rows and chunk_rows * 134 * hidden.element_size()
    inputs = [hidden, weight, targets, 128, z_loss, chunk_bytes]
    assert_as_good_as_torch(objective_of(linear_cross_entropy), objective_of(plain), inputs, atol=1e-5)
    _, cross_entropy = linear_cross_entropy(*inputs)
    exact = plain(hidden.double(), weight.double(), *inputs[2:])[1]
    torch.testing.assert_close(cross_entropy.double(), exact, atol=0, rtol=2**-9 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shards", "chunk_rows"), [(2, None), (4, 7)])
def test_shards_of_the_vocabulary_make_up_the_whole(shards, chunk_rows, dtype):
    """Of four, the last is padding altogether and the one before it in part."""
    hidden, weight, targets = arguments(20, 512, 24, dtype)
    targets = targets % 350
    targets[::5] = IGNORE_INDEX
    loss = loss_of_shards(sharded_linear_cross_entropy, shards)
    chunk_bytes = chunk_rows and chunk_rows * (512 // shards) * hidden.element_size()
    inputs = [hidden, weight, targets, 350, 1e-2, chunk_bytes]
    assert_as_good_as_torch(objective_of(loss), objective_of(plain), inputs, atol=1e-5)
    exact = plain(hidden.double(), weight.double(), *inputs[2:])[1]
    torch.testing.assert_close(loss(*inputs)[1].double(), exact, atol=0, rtol=1e-6 if dtype == torch.float32 else 2**-9)


def test_padding_gets_a_gradient_of_zero_and_the_cross_entropy_none():
    hidden, weight, targets = arguments(9, 134, 24, torch.bfloat16)
    weight.requires_grad_()
    objective, cross_entropy = linear_cross_entropy(hidden, weight, targets, 128, 1e-2, 4 * 2 * 134)
    assert not cross_entropy.requires_grad and objective > cross_entropy > 0
    objective.backward()
    assert weight.grad[:128].any() and not weight.grad[128:].any()


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_what_is_wanted_is_computed(wanted):
    hidden, weight, targets = arguments(9, 134, 24, torch.float32)
    hidden.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    objective, _ = linear_cross_entropy(hidden, weight, targets)
    assert objective.requires_grad == any(wanted)
    if any(wanted):
        objective.backward()
    assert (hidden.grad is not None, weight.grad is not None) == wanted
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets)[0], objective)


def test_views_that_are_not_contiguous():
    hidden, weight, targets = arguments(9, 134, 24, torch.float32)
    views = hidden.T.contiguous().T, weight.T.contiguous().T, targets.repeat_interleave(2)[::2]
    assert_as_good_as_torch(objective_of(linear_cross_entropy), objective_of(plain), [*views, 128, 1e-2, None])


@pytest.mark.parametrize("rows", [0, 4])
def test_a_batch_without_a_target_has_a_loss_and_gradients_of_zero(rows):
    hidden, weight = random(rows, 24).requires_grad_(), random(134, 24).requires_grad_()
    objective, cross_entropy = linear_cross_entropy(hidden, weight, torch.full((rows,), IGNORE_INDEX), z_loss=1e-2)
    objective.backward()
    assert objective == 0 == cross_entropy and not hidden.grad.any() and not weight.grad.any()
