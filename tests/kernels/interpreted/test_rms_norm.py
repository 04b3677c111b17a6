import sys

import pytest
import torch
from comparison import assert_as_good_as_torch, random
from megaslm_kernels.launch import Architecture
from megaslm_kernels.rms_norm import rms_norm, rms_norm_reference

SHAPES = [(1, 64), (3, 192), (2, 2, 256), (5, 1000), (4, 1128), (3, 2048), (40, 32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_reference(shape, dtype):
    inputs = [random(*shape, dtype=dtype), random(shape[-1], dtype=dtype), 1e-5]
    assert_as_good_as_torch(rms_norm, rms_norm_reference, inputs)


def test_rows_with_gaps_and_columns_with_strides():
    for x in (random(6, 200)[:, 8:104], random(96, 6).T, random(4, 3, 96).transpose(0, 1), random(1, 96).expand(5, 96)):
        assert_as_good_as_torch(rms_norm, rms_norm_reference, [x, random(96), 1e-5])


def test_no_rows():
    x, weight = torch.empty(0, 96, requires_grad=True), random(96).requires_grad_()
    y = rms_norm(x, weight, 1e-5)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 96) and torch.equal(weight.grad, torch.zeros(96))


def test_programs_that_take_several_rows_in_turn(monkeypatch):
    module = sys.modules["megaslm_kernels.rms_norm"]
    monkeypatch.setattr(module, "architecture", lambda device: Architecture(1, 2**20))
    assert module.backward_config(100, 32, torch.float32, Architecture(1, 2**20)).programs < 50
    assert_as_good_as_torch(rms_norm, rms_norm_reference, [random(100, 32), random(32), 1e-5])


def test_offsets_past_two_to_the_31():
    """Two rows 2^31 elements apart; the memory between them is never touched."""
    apart = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    apart[:64], apart[-64:] = random(64, dtype=torch.bfloat16), random(64, dtype=torch.bfloat16, seed=1)
    x = apart.as_strided((2, 64), (2**31, 1))
    weight = random(64, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm(x.clone(), weight, 1e-5))
