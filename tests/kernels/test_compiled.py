"""What the assembler makes of every kernel on sm_90, at the shapes of the presets: registers, memory, widths, types."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")
FOLDER = Path(__file__).parent
REGISTERS = {"forward": 64, "backward": 128}
# Numbers that a program reads or writes one at a time beside its rows: (op, kernel) -> (loads, stores).
SINGLE = {
    ("rms_norm", "_forward_kernel"): (0, 1),  # rstd
    ("rms_norm", "_backward_kernel"): (1, 0),
    ("add_rms_norm", "_forward_kernel"): (0, 1),
    ("add_rms_norm", "_backward_kernel"): (1, 0),
    ("rotary", "_kernel"): (1, 0),  # the position of a document's token
    ("qk_norm_rotary", "_forward_kernel"): (1, 0),
    ("qk_norm_rotary", "_backward_kernel"): (1, 4),  # and sums of dw, once a program
    ("cross_entropy", "_loss_kernel"): (2, 2),  # target and its logit; loss and logsumexp
    ("cross_entropy", "_gradient_kernel"): (3, 0),  # target, logsumexp, scale
    ("cross_entropy", "_statistics_kernel"): (2, 3),  # target and its logit; maximum, sum, target's logit
    ("linear_cross_entropy", "_loss_kernel"): (2, 2),
}
WARP_OF_WIDE_LOADS = 32 * 8
OPS = ("rms_norm", "add_rms_norm", "swiglu", "rotary", "qk_norm_rotary", "cross_entropy", "linear_cross_entropy")


@pytest.fixture
def machines(fork_ranks):
    """machines(script, argument, ...) -> the figures that it printed, one kernel a line."""

    def run(script: str, *arguments) -> list[dict]:
        finished = fork_ranks(FOLDER / script, arguments, None)
        assert finished.code == 0, finished.out + finished.err
        return [json.loads(line) for line in finished.out.splitlines()]

    return run


def faults(machine: dict) -> list[str]:
    """Every rule that a kernel breaks, with the figure."""
    found = []
    limit = REGISTERS[machine["direction"]]
    if machine["registers"] > limit:
        found.append(f"{machine['registers']} registers, at most {limit}")
    if machine["local_bytes"] or machine["local_accesses"]:
        found.append(f"{machine['local_bytes']} bytes of local memory, {machine['local_accesses']} accesses")
    if machine["doubles"]:
        found.append(f"{machine['doubles']} instructions on fp64")
    if machine["narrow_offsets"]:
        found.append(f"32-bit offsets: {machine['narrow_offsets']}")
    if machine["row"] < WARP_OF_WIDE_LOADS:
        return found  # too little for wide loads: a model of width 128
    singles = SINGLE.get((machine["op"], machine["name"]), (0, 0))
    for kind, single in zip(("loads", "stores"), singles, strict=True):
        narrow = {width: count for width, count in machine[kind].items() if width != "128"}
        if machine["name"] != "_sum_rows_kernel" and sum(narrow.values()) > single:
            found.append(f"{kind} of {narrow} (bits: number) beside those of 128 bits, at most {single}")
    return found


@pytest.mark.parametrize("op", OPS)
def test_kernels_at_the_shapes_of_the_presets(machines, op):
    kernels = machines("compile_presets.py", op)
    assert {"forward", "backward"} <= {kernel["direction"] for kernel in kernels} or op == "linear_cross_entropy"
    wrong = [
        f"{op} {kernel['name']} ({kernel['direction']}) at {tuple(kernel['shape'])}: {fault}"
        for kernel in kernels
        for fault in faults(kernel)
    ]
    assert not wrong, "\n".join(wrong)


def test_each_rule_finds_a_kernel_that_breaks_it(machines):
    found = {kernel["name"]: faults(kernel) for kernel in machines("broken_kernels.py")}
    assert found.pop("nothing") == []
    assert len(found) == 5
    for rule, broken in found.items():
        assert any(rule in fault for fault in broken), (rule, broken)
