import pytest
import torch
from comparison import assert_as_good_as_torch, random
from megaslm_kernels.rms_norm import rms_norm, rms_norm_reference

SHAPES = [(1, 64), (3, 192), (2, 2, 256), (5, 1000), (4, 1128), (3, 2048), (40, 32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_reference(shape, dtype):
    inputs = [random(*shape, dtype=dtype), random(shape[-1], dtype=dtype), 1e-5]
    assert_as_good_as_torch(rms_norm, rms_norm_reference, inputs)
