import pytest
import torch
from comparison import assert_as_good_as_torch, random
from megaslm_kernels.swiglu import swiglu, swiglu_reference

SHAPES = [(1, 2 * 64), (3, 2 * 192), (2, 2, 2 * 512), (5, 2 * 1000), (3, 2 * 2816), (40, 2 * 12)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_reference(shape, dtype):
    assert_as_good_as_torch(swiglu, swiglu_reference, [random(*shape, dtype=dtype, scale=3.0)])


def test_rows_with_gaps_and_columns_with_strides():
    for gate_up in (random(6, 300)[:, 8:200], random(192, 6).T):
        assert_as_good_as_torch(swiglu, swiglu_reference, [gate_up])


def test_gates_far_from_zero():
    gate_up = torch.cat((torch.tensor([[-200.0, -88.0, -30.0, 0.0, 30.0, 88.0, 200.0, 1.0]]), random(1, 8)), dim=1)
    assert_as_good_as_torch(swiglu, swiglu_reference, [gate_up])
