"""The host's part of an eager call against torch.nn.functional's in the same run: at small sizes, the whole cost."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")
# Ours over torch's microseconds, forward and forward with backward: half as much again as was measured.
BOUNDS = {
    ("rms_norm", "forward"): 1.2,
    ("rms_norm", "both"): 0.8,
    ("add_rms_norm", "forward"): 1.4,
    ("add_rms_norm", "both"): 0.9,
    ("swiglu", "forward"): 2.5,
    ("swiglu", "both"): 1.5,
    ("rotary", "forward"): 0.5,
    ("rotary", "both"): 0.5,
    ("qk_norm_rotary", "forward"): 0.3,
    ("qk_norm_rotary", "both"): 0.5,
    # One C++ call in torch, and ours saves a tensor more; a model calls linear_cross_entropy, whose products hide it.
    ("cross_entropy", "forward"): 7.5,
    ("cross_entropy", "both"): 3.5,
    # Its forward computes the gradients.
    ("linear_cross_entropy", "forward"): 11.0,
    ("linear_cross_entropy", "both"): 4.5,
}


@pytest.mark.alone
def test_host_microseconds_per_call(python):
    run = python(Path(__file__).with_name("host_cost.py"))
    assert run.returncode == 0, run.stderr
    costs = [json.loads(line) for line in run.stdout.splitlines()]
    assert {(cost["op"], cost["direction"]) for cost in costs} == set(BOUNDS)
    slow = [
        f"{cost['op']} {cost['direction']}: {cost['ours']:.1f} us, torch.nn.functional {cost['torch']:.1f} us, "
        f"at most {bound} times that"
        for cost in costs
        if cost["ours"] > (bound := BOUNDS[cost["op"], cost["direction"]]) * cost["torch"]
    ]
    assert not slow, "\n".join(slow)
