"""What a kernel must refuse, since it would read other memory or leave a term out in silence."""

import pytest
import torch
from comparison import random
from megaslm_kernels import TRITON


def heads(**changes):
    sizes = dict(b=2, s=3, h=4, k=2, d=16, positions=5, half=8) | changes
    q, k = (
        random(sizes["b"], sizes["s"], sizes["h"], sizes["d"]),
        random(sizes["b"], sizes["s"], sizes["k"], sizes["d"]),
    )
    return q, k, random(sizes["positions"], sizes["half"]), random(sizes["positions"], sizes["half"])


WEIGHTS = [random(8), random(0), random(32)[::2]]


@pytest.mark.parametrize("weight", WEIGHTS, ids=["short", "not gathered by ZeRO-3", "with gaps"])
def test_a_weight_that_is_not_the_rows(weight):
    with pytest.raises(ValueError, match="for rows of 16 elements"):
        TRITON.rms_norm(random(3, 16), weight, 1e-5)
    with pytest.raises(ValueError, match="for rows of 16 elements"):
        TRITON.add_rms_norm(random(3, 16), random(3, 16), weight, 1e-5)
    q, k, cos, sin = heads()
    for weights in ((weight, random(16)), (random(16), weight)):
        with pytest.raises(ValueError, match="for rows of 16 elements"):
            TRITON.qk_norm_rotary(q, k, *weights, cos, sin, 1e-5)


@pytest.mark.parametrize("residual", [random(1, 16), random(3, 16, dtype=torch.bfloat16)], ids=["shape", "type"])
def test_a_residual_that_is_not_like_x(residual):
    with pytest.raises(ValueError, match="and residual"):
        TRITON.add_rms_norm(random(3, 16), residual, random(16), 1e-5)


MISFITS = {
    "more tokens than positions": (heads(s=6), None, "6 tokens, and tables of 5"),
    "tables wider than a head": (heads(half=9), None, "tables"),
    "tables in bf16": ((*heads()[:2], *(x.bfloat16() for x in heads()[2:])), None, "bfloat16"),
    "heads of two sizes": ((heads()[0], *heads(d=20)[1:]), None, "and k"),
    "positions of another batch": (heads(), torch.zeros(2, 4, dtype=torch.int64), "positions"),
}


@pytest.mark.parametrize(("tensors", "positions", "message"), MISFITS.values(), ids=MISFITS)
def test_heads_and_tables_that_do_not_fit(tensors, positions, message):
    q, k, cos, sin = tensors
    with pytest.raises(ValueError, match=message):
        TRITON.rotary(q, k, cos, sin, positions)
    with pytest.raises(ValueError, match=message):
        TRITON.qk_norm_rotary(q, k, random(q.size(3)), random(q.size(3)), cos, sin, 1e-5, positions)


def test_a_loss_of_two_types():
    with pytest.raises(ValueError, match="bfloat16, weight"):
        TRITON.linear_cross_entropy(random(3, 16, dtype=torch.bfloat16), random(8, 16), torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("op", [lambda x: TRITON.rms_norm(x, random(16), 1e-5), TRITON.swiglu], ids=["norm", "gate"])
def test_a_second_derivative_is_an_error(op):
    x = random(3, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(op(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
