import pytest
import torch
from comparison import HEADS, angle_tables, assert_as_good_as_torch, packed_heads, random
from megaslm_kernels.rotary import rotary, rotary_reference, strides_of

SHAPES = [*HEADS, (1, 2, 40, 8, 64, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_reference(shape, dtype):
    inputs = [*packed_heads(*shape[:5], dtype), *angle_tables(shape[1] + 2, shape[5])]
    assert_as_good_as_torch(rotary, rotary_reference, inputs, differentiable=[0, 1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_of_documents(dtype):
    positions = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 0, 1, 2]], dtype=dtype)
    inputs = [*packed_heads(2, 5, 4, 2, 32), *angle_tables(5, 32)]
    for given in (positions, positions.repeat_interleave(2, dim=1)[:, ::2]):
        assert_as_good_as_torch(rotary, rotary_reference, [*inputs, given], differentiable=[0, 1])


def test_positions_count_from_the_start_of_each_sequence():
    q, k = packed_heads(3, 4, 2, 1, 16)
    counted = torch.arange(4).expand(3, 4)
    for ours, same in zip(rotary(q, k, *angle_tables(4, 16)), rotary(q, k, *angle_tables(4, 16), counted), strict=True):
        assert torch.equal(ours, same)


def test_any_strides():
    cos, sin = angle_tables(3, 32)
    for q, k in (
        (random(2, 4, 3, 32).transpose(1, 2), random(2, 3, 2, 32)),  # as attention's gradients lie
        (random(3, 2, 4, 33).transpose(0, 1)[..., 1:], random(2, 3, 2, 64)[..., ::2]),  # no alignment; gaps
        (random(1, 3, 4, 32).expand(2, 3, 4, 32), random(2, 1, 1, 32).expand(2, 3, 2, 32)),
    ):
        assert_as_good_as_torch(rotary, rotary_reference, [q, k, cos, sin], differentiable=[0, 1])


def test_gradients_that_lie_head_by_head_are_read_where_they_are():
    q, k = (x.requires_grad_() for x in packed_heads(2, 3, 4, 2, 32))
    dq, dk = random(2, 4, 3, 32).transpose(1, 2), random(2, 2, 3, 32).transpose(1, 2)
    outputs = rotary(q, k, *angle_tables(3, 32))
    strided = torch.autograd.grad(outputs, (q, k), (dq, dk), retain_graph=True)
    dense = torch.autograd.grad(outputs, (q, k), (dq.contiguous(), dk.contiguous()))
    for ours, same in zip(strided, dense, strict=True):
        assert torch.equal(ours, same) and ours.is_contiguous()


def test_one_output_in_use():
    q, k = (x.requires_grad_() for x in packed_heads(1, 3, 2, 2, 16))
    rotary(q, k, *angle_tables(3, 16))[0].sum().backward()
    assert q.grad.any() and not k.grad.any()


def test_strides_are_in_the_largest_unit():
    assert strides_of(torch.empty(2, 3, 4, 64)) == ([96, 32, 8], 8)
    assert strides_of(torch.empty(2, 3, 4, 20), torch.empty(2, 3, 2, 64)) == ([60, 20, 5, 96, 32, 16], 4)
    assert strides_of(torch.empty(2, 3, 4, 33)[..., 1:])[1] == 1


def test_no_tokens():
    q, k = torch.empty(0, 3, 4, 16, requires_grad=True), torch.empty(0, 3, 2, 16)
    outputs = rotary(q, k, *angle_tables(3, 16))
    outputs[0].sum().backward()
    assert outputs[0].shape == q.grad.shape == (0, 3, 4, 16) and outputs[1].shape == k.shape


def test_offsets_past_two_to_the_31():
    """Two sequences 2^31 elements apart; the memory between them is never touched."""
    apart = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    apart[:64], apart[-64:] = random(64, dtype=torch.bfloat16), random(64, dtype=torch.bfloat16, seed=1)
    q = apart.as_strided((2, 2, 1, 32), (2**31, 32, 32, 1))
    k, (cos, sin) = q.clone(), angle_tables(2, 32)
    assert torch.equal(*rotary(q, k, cos, sin))
    assert torch.equal(*rotary(k, q, cos, sin))
