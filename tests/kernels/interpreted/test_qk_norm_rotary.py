import sys

import pytest
import torch
from comparison import HEADS, angle_tables, assert_as_good_as_torch, packed_heads, random
from megaslm_kernels.launch import HOPPER, Architecture
from megaslm_kernels.qk_norm_rotary import backward_config, forward_config, qk_norm_rotary, qk_norm_rotary_reference

SHAPES = [*HEADS, (1, 3, 14, 6, 64, 64)]
DIFFERENTIABLE = [0, 1, 2, 3]


def arguments(b, s, h, k, d, rotated, dtype=torch.float32, positions=None):
    """q and k as views of one projection, weights around one, and tables."""
    weights = [(1 + random(d, seed=seed, scale=0.5)).to(dtype) for seed in (1, 2)]
    return [*packed_heads(b, s, h, k, d, dtype), *weights, *angle_tables(s + 2, rotated), 1e-5, positions]


def assert_right(inputs):
    assert_as_good_as_torch(qk_norm_rotary, qk_norm_rotary_reference, inputs, differentiable=DIFFERENTIABLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_reference(shape, dtype):
    assert_right(arguments(*shape, dtype))


def test_weights_of_another_type():
    inputs = arguments(2, 3, 4, 2, 32, 32, torch.bfloat16)
    inputs[2:4] = random(32, seed=1), random(32, seed=2)
    outputs = qk_norm_rotary(*inputs)
    exact = qk_norm_rotary_reference(*(x.double() if isinstance(x, torch.Tensor) else x for x in inputs))
    for y, expected in zip(outputs, exact, strict=True):
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_of_documents(dtype):
    positions = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 0, 1, 2]], dtype=dtype)
    for given in (positions, positions.repeat_interleave(2, dim=1)[:, ::2]):
        assert_right(arguments(2, 5, 4, 2, 32, 32, positions=given))


def test_any_strides():
    for q, k in (
        (random(2, 4, 3, 32).transpose(1, 2), random(2, 3, 2, 32)),
        (random(3, 2, 4, 33).transpose(0, 1)[..., 1:], random(2, 3, 2, 64)[..., ::2]),  # no alignment; gaps
        (random(1, 3, 4, 32).expand(2, 3, 4, 32), random(2, 1, 1, 32).expand(2, 3, 2, 32)),
    ):
        assert_right([q, k, *arguments(2, 3, 4, 2, 32, 32)[2:]])


def test_gradients_that_lie_head_by_head_are_read_where_they_are():
    inputs = arguments(2, 3, 4, 2, 32, 32)
    wanted = [x.requires_grad_() for x in inputs[:4]]
    dq, dk = random(2, 4, 3, 32).transpose(1, 2), random(2, 2, 3, 32).transpose(1, 2)
    outputs = qk_norm_rotary(*inputs)
    strided = torch.autograd.grad(outputs, wanted, (dq, dk), retain_graph=True)
    dense = torch.autograd.grad(outputs, wanted, (dq.contiguous(), dk.contiguous()))
    for ours, same in zip(strided, dense, strict=True):
        assert torch.equal(ours, same) and ours.is_contiguous()


def test_programs_that_take_several_tokens_in_turn(monkeypatch):
    module = sys.modules["megaslm_kernels.qk_norm_rotary"]
    monkeypatch.setattr(module, "architecture", lambda device: Architecture(1, 2**20))
    shape = (3, 13, 14, 6, 64, 64)
    programs, tiles, _ = backward_config(39, 20, 64, 32, torch.float32, Architecture(1, 2**20)).programs
    assert programs < 39 and tiles == 3
    assert_right(arguments(*shape))


def test_no_tokens():
    inputs = arguments(1, 3, 4, 2, 32, 32)
    inputs[:2] = torch.empty(0, 3, 4, 32), torch.empty(0, 3, 2, 32)
    for x in inputs[:4]:
        x.requires_grad_()
    sum(y.sum() for y in qk_norm_rotary(*inputs)).backward()
    assert inputs[0].grad.shape == (0, 3, 4, 32)
    assert torch.equal(inputs[2].grad, torch.zeros(32)) and torch.equal(inputs[3].grad, torch.zeros(32))


def test_offsets_past_two_to_the_31():
    """Two sequences 2^31 elements apart; the memory between them is never touched."""
    apart = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    apart[:64], apart[-64:] = random(64, dtype=torch.bfloat16), random(64, dtype=torch.bfloat16, seed=1)
    far = apart.as_strided((2, 2, 1, 32), (2**31, 32, 32, 1))
    _, _, weight, _, cos, sin, eps, _ = arguments(2, 2, 1, 1, 32, 32, torch.bfloat16)
    near = far.clone()
    assert torch.equal(*qk_norm_rotary(far, near, weight, weight, cos, sin, eps))
    leaves = [far.detach().requires_grad_(), near.requires_grad_()]
    outputs = qk_norm_rotary(*leaves, weight, weight, cos, sin, eps)
    assert torch.equal(*torch.autograd.grad(outputs, leaves, (near.detach(), far.detach())))


@pytest.mark.parametrize(
    "heads, d, tile, tiles", [(16, 64, 16, 1), (20, 64, 8, 3), (20, 128, 8, 3), (32, 128, 16, 2), (128, 64, 32, 4)]
)
def test_the_persistent_grid_fills_the_gpu_once(heads, d, tile, tiles):
    config = backward_config(32768, heads, d, d // 2, torch.bfloat16, HOPPER)
    assert (config.heads, config.programs[1]) == (tile, tiles)
    warps = config.programs[0] * tiles * config.num_warps / HOPPER.multiprocessors
    assert 15.9 < warps <= 16
    assert forward_config(32768, heads, d, d // 2, torch.bfloat16, HOPPER).programs[0] == 32768
