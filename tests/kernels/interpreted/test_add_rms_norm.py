import pytest
import torch
from comparison import assert_as_good_as_torch, random
from megaslm_kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference

SHAPES = [(1, 64), (3, 192), (2, 2, 256), (5, 1000), (4, 1128), (3, 2048), (40, 32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_reference(shape, dtype):
    inputs = [random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1), random(shape[-1], dtype=dtype), 1e-5]
    assert_as_good_as_torch(add_rms_norm, add_rms_norm_reference, inputs)


@pytest.mark.parametrize("used", [0, 1], ids=["only the sum", "only the norm"])
def test_one_of_the_results_may_go_unused(used):
    inputs = [random(6, 96), random(6, 96, seed=1), random(96), 1e-5]
    differentiable = [0, 1, 2] if used else [0, 1]  # the sum alone knows nothing of the weight
    assert_as_good_as_torch(
        lambda *inputs: add_rms_norm(*inputs)[used],
        lambda *inputs: add_rms_norm_reference(*inputs)[used],
        inputs,
        differentiable=differentiable,
    )


def test_rows_with_gaps_and_columns_with_strides():
    x, residual = random(6, 200)[:, 8:104], random(96, 6, seed=1).T
    assert_as_good_as_torch(add_rms_norm, add_rms_norm_reference, [x, residual, random(96), 1e-5])


def test_the_shared_gradient_survives_accumulation_into_one_of_its_inputs():
    """x also reaches the loss another way: autograd adds to its gradient, which is residual's too."""
    for op in (add_rms_norm, add_rms_norm_reference):
        x, residual = random(6, 96).requires_grad_(), random(6, 96, seed=1).requires_grad_()
        total, y = op(x, residual, random(96), 1e-5)
        (total.sum() + (y * random(6, 96, seed=2)).sum() + 100 * x.sum()).backward()
        torch.testing.assert_close(x.grad - residual.grad, torch.full_like(x, 100.0), atol=1e-4, rtol=0)
