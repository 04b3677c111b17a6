"""A run that was stopped and continued by the same command is the run that was not stopped, bit for bit."""

from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS, STOP = 40, 20

# name: (ZeRO stage, overrides, signal). 7 does not divide 20: the stop cuts a logging interval in two.
CASES = {
    "fp32 zero2": (2, ["train.precision=fp32", "logging.interval=1"], "SIGTERM"),
    "fp32 zero2, long intervals": (2, ["train.precision=fp32", "logging.interval=7"], "SIGINT"),
    "bf16 zero1": (1, ["train.precision=bf16", "logging.interval=1"], "SIGINT"),
    "bf16 zero1, long intervals": (1, ["train.precision=bf16", "logging.interval=7"], "SIGTERM"),
    "fp32 zero3": (3, ["train.precision=fp32", "logging.interval=7", "checkpoint.interval=15"], "SIGTERM"),
}


@dataclass(frozen=True)
class Pair:
    uninterrupted: Path
    interrupted: Path
    out: str


@pytest.fixture(scope="module", params=[1, 2])
def pairs(request, preset, pretrain_in_turn, tmp_path_factory) -> dict[str, Pair]:
    """On 1 and on 2 ranks; the signal reaches the last rank only. The stopped run is continued in new processes."""
    ranks = request.param
    launched = ranks if ranks > 1 else None
    folders, first, second = {}, [], []
    for name, (stage, overrides, signal) in CASES.items():
        folders[name] = whole, cut = [tmp_path_factory.mktemp(f"resume_{ranks}") / part for part in ("whole", "cut")]
        engine = ["--ds_config", ROOT / "ds_configs" / f"zero{stage}.json"]
        arguments = ["--preset", preset, *engine, f"train.max_steps={STEPS}", *overrides, "--run_dir"]
        first.append({"arguments": [*arguments, cut], "signal": [signal, STOP, ranks - 1]})
        first.append({"arguments": [*arguments, whole]})
        second.append({"arguments": [*arguments, cut]})
    stopped = pretrain_in_turn(first, launched)
    # All are stopped; then all go on, and a third time they have nothing to do.
    continued = pretrain_in_turn([*second, *second], launched)
    out = stopped.out + continued.out
    return {name: Pair(whole, cut, out) for name, (whole, cut) in folders.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_gives_the_same_numbers_bit_for_bit(pairs, numbers, case):
    assert numbers(pairs[case].interrupted) == numbers(pairs[case].uninterrupted)


@pytest.mark.parametrize("case", CASES)
def test_the_resumed_run_was_cut_in_two(pairs, case):
    pair = pairs[case]
    steps = {int(path.name.removeprefix("step_")) for path in (pair.interrupted / "checkpoints").iterdir()}
    (stop,) = steps & {STOP, STOP + 1}
    assert f"stopped by {CASES[case][2]} at step {stop} of {STEPS}; the same command continues" in pair.out
    assert f"continuing from {pair.interrupted}/checkpoints/step_{stop:08d} at step {stop}" in pair.out


@pytest.mark.parametrize("case", CASES)
def test_metrics_have_every_interval_once(pairs, metrics, case):
    interval = 1 if "logging.interval=1" in CASES[case][1] else 7
    expected = sorted({*range(interval, STEPS + 1, interval), STEPS})
    assert [record["step"] for record in metrics(pairs[case].interrupted)] == expected


@pytest.mark.parametrize("case", CASES)
def test_a_finished_run_says_so_and_ends_well(pairs, case):
    pair = pairs[case]
    assert pair.out.count(f"{pair.interrupted} is finished: step {STEPS} of {STEPS}; to go on, raise") == 1
