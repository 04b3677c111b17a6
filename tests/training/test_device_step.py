"""The optimizer step without a wait of the host: how often it waits, and that it is DeepSpeed's own step otherwise."""

import contextlib
import functools
import math
from collections import Counter
from unittest import mock

import deepspeed
import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from host_waits import host_waits
from layout_engines import LayoutEngine, as_run, make_plan, run_config

from megaslm.parallel import ALONE
from megaslm.training import engine
from megaslm.training.device_step import DeviceStep
from megaslm.training.run import engine_of

MODEL = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "num_kv_heads": 1, "ffn_hidden_size": 32}
CASES = [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]


class Run(LayoutEngine):
    """A tiny run on the one rank of the session's group; accumulation 4, clipping active."""

    def __init__(
        self, ranks, stage: int, precision: str, *, clipping: float = 0.02, masked: bool = False,
        engine: dict | None = None, **train,
    ):  # fmt: skip
        self.run = as_run(run_config(MODEL, optimizer={"gradient_clipping": clipping}, train=train))
        self.ranks, self.masked, self.samples = ranks, masked, 0
        self.plan = make_plan(self.run, stage, ranks, precision, masked)
        for section, values in (engine or {}).items():
            self.plan.engine_config[section] |= values
        self.engine, _ = engine_of(self.plan)

    def weights(self) -> list[torch.Tensor]:
        parameters = list(self.engine.model.parameters())
        with deepspeed.zero.GatheredParameters(parameters):
            return [parameter.detach().float().clone() for parameter in parameters]

    def moments(self) -> list[torch.Tensor]:
        """And the step counts, of this rank."""
        states = self.engine.deepspeed.basic_optimizer.state.values()
        return [value.clone() for state in states for value in state.values()]


@pytest.fixture
def deepspeeds_own(monkeypatch):
    """Engines that are built from here on step as DeepSpeed does."""
    return lambda: monkeypatch.setattr(engine, "take_over", lambda optimizer, step: False)


def waits(run: Run) -> Counter[str]:
    """Of a step after those in which things are made."""
    for _ in range(2):
        run.step()
    batches = [run.batch(first, 1) for first in range(4)]
    with host_waits() as found:
        run.engine.train_step(batches, 2e-3)
    return found


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_the_host_waits_for_nothing_in_a_step(ranks, stage, precision):
    # ZeRO-3 looks at the norm that it is given instead of its own: a number of the host.
    expected = {"aten.lift_fresh.default": 1, "aten._local_scalar_dense.default": 1} if stage == 3 else {}
    assert waits(Run(ranks, stage, precision)) == expected


WAITS = {
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "to with a type": lambda x: x.to(device="cpu", dtype=torch.float64),
    "numpy": lambda x: x.numpy(),
    "asarray": np.asarray,
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0]),
    "if": lambda x: bool(x[0] > 0),
    "equal": lambda x: torch.equal(x, x),
    "a mask": lambda x: x[x > 0],
    "to a mask": lambda x: x.__setitem__(x > 0, x[:1]),
    "unique": lambda x: x.unique(),
    "allclose": lambda x: torch.allclose(x, x),
    "nonzero": lambda x: x.nonzero(),
    "a list of the host": lambda x: x + torch.tensor([1.0, 2.0]),
    "synchronize": lambda x: get_accelerator().synchronize(),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_seen(name):
    x = torch.ones(2)
    with host_waits() as found:
        WAITS[name](x)
    assert found.total() >= 1


def test_what_does_not_wait_is_not_counted():
    x, index = torch.ones(2, requires_grad=True), torch.zeros(1, dtype=torch.int64)
    with host_waits() as found:
        y = (x.to(torch.float64)[index] * 2).sum() + x[0] + x.to(x.device, non_blocking=True)[1:].sum()
        y.clamp(min=0.0).backward()
    assert not found


@pytest.mark.gpu
@pytest.mark.parametrize(("stage", "precision"), [case for case in CASES if case[0] < 3])
def test_a_gpu_waits_for_nothing_in_a_step(ranks, stage, precision):
    """As CUDA sees it, and with the waits for streams and events that DeepSpeed has for GPUs alone."""
    if ranks.device.type != "cuda":
        pytest.skip("needs a CUDA device")
    run = Run(ranks, stage, precision)
    for _ in range(2):
        run.step()
    batches = [run.batch(first, 1) for first in range(4)]
    batches = [batch._replace(tokens=batch.tokens.cuda(), targets=batch.targets.cuda()) for batch in batches]
    torch.cuda.synchronize()
    refuse = functools.partial(pytest.fail, "the host waits")
    with contextlib.ExitStack() as stack:
        for kind in (torch.cuda.Stream, torch.cuda.Event):
            stack.enter_context(mock.patch.object(kind, "synchronize", lambda self: refuse()))
        found = stack.enter_context(host_waits())
        torch.cuda.set_sync_debug_mode("error")
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        run.engine.train_step(batches, 2e-3)
    assert not found


@pytest.mark.parametrize(("stage", "precision"), [case for case in CASES if case[0]])
def test_all_else_is_as_in_deepspeeds_own_step(ranks, deepspeeds_own, stage, precision):
    ours = Run(ranks, stage, precision)
    deepspeeds_own()
    theirs = Run(ranks, stage, precision)
    for _ in range(4):
        (loss, norm), (expected_loss, expected_norm) = ours.step(), theirs.step()
        assert loss == pytest.approx(expected_loss, rel=1e-4)
        assert norm == pytest.approx(expected_norm, rel=1e-4 if precision == "fp32" else 5e-3)
        assert norm > 1.5 * ours.run.optimizer.gradient_clipping, "clipping is not active"
    for weight, expected in zip(ours.weights(), theirs.weights(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-5 if precision == "fp32" else 2e-3)
    for state, expected in zip(ours.moments(), theirs.moments(), strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-3, atol=1e-5)
    assert waits(theirs).total() > waits(ours).total(), "DeepSpeed no longer waits by itself: is this still needed?"


def test_gradients_in_bf16_go_into_the_sums_and_are_given_up(ranks):
    """Kept, the next backward pass would add to them, and zero them before."""
    run = Run(ranks, 1, "bf16")
    objective, _ = run.engine.deepspeed(*run.batch(0, 1))
    run.engine.deepspeed.backward(objective)
    assert all(parameter.grad is None for parameter in run.engine.model.parameters())
    sums = run.engine.deepspeed.optimizer.fp32_groups_gradients_flat
    assert all(gradients.any() for gradients in sums)


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "bf16"), (3, "bf16")])
@pytest.mark.parametrize(("clipping", "factor"), [(0.02, math.nan), (0.0, math.nan), (0.02, 1e30)])
def test_a_step_that_is_not_finite_leaves_all_as_it_was(ranks, stage, precision, clipping, factor):
    """In fp32: test_engine.py. 1e30: a gradient of finite numbers whose norm is beyond fp32."""
    run = Run(ranks, stage, precision, clipping=clipping)
    run.step()
    weights, moments, scale = run.weights(), run.moments(), run.engine._gradient_scale
    run.engine._gradient_scale = factor
    _, norm = run.step()
    assert not math.isfinite(norm)
    assert run.engine.skipped_steps == 1
    assert all(map(torch.equal, run.weights(), weights))
    assert all(map(torch.equal, run.moments(), moments))
    run.engine._gradient_scale = scale
    _, norm = run.step()
    assert math.isfinite(norm), "the next gradient is not a clean one"
    assert run.engine.skipped_steps == 1
    assert not any(map(torch.equal, run.weights(), weights))


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_the_first_step_may_be_left_out(ranks, stage, precision):
    """There are no moments yet: the next step is as if it were the first."""
    skipping, other = Run(ranks, stage, precision), Run(ranks, stage, precision)
    scale, skipping.engine._gradient_scale = skipping.engine._gradient_scale, math.nan
    skipping.step()
    skipping.engine._gradient_scale, skipping.samples = scale, 0
    assert skipping.step() == other.step()
    assert all(map(torch.equal, skipping.weights(), other.weights()))
    assert all(map(torch.equal, skipping.moments(), other.moments()))


@pytest.mark.parametrize(("norm", "applied"), [(0.25, 0.25), (1.0, 1.0), (4.0, 1.0)])
def test_a_gradient_at_the_limit_and_below_is_applied_as_it_is(norm, applied):
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), norm / 2)
    step = DeviceStep(torch.optim.AdamW([weight], fused=True), 1.0, ALONE, torch.device("cpu"))
    step.prepare([(weight, weight.grad)])
    assert float(step.norm) == norm
    found = float(step.norm / step._adamw.grad_scale)
    assert found == applied if norm < 1 else found == pytest.approx(applied, rel=2e-6)
