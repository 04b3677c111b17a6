"""From measurements to results, on a GPU that is made up; token files; the rate of matrix products."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from megaslm.config import BatchLayout, load_run_config
from megaslm.data import TokenFile
from megaslm.errors import UserError
from megaslm.throughput import Case, benchmark, matmul, run_benchmark
from megaslm.throughput.benchmark import result_of, token_files, with_common_batch
from megaslm.throughput.examine import Examination, examine
from megaslm.throughput.measure import Measurement, measure
from megaslm.throughput.tokens import write_tokens

SHAPE = ("model.num_layers=1", "data.seq_length=64", "train.global_batch_size=8", "train.precision=fp32")


def measurement(step_ms: list[float], busy: dict[str, float] | None, **changes) -> Measurement:
    """Steps of which a hundredth is data; seconds of all of them as they are. busy: ms."""
    run = load_run_config("slm_tiny", list(SHAPE))
    run = run.model_copy(update={"model": run.model.model_copy(update={"vocab_size": 16000})})
    steps = [
        {"data": 1e-5 * ms, "forward": 3.9e-4 * ms, "backward": 4e-4 * ms, "optimizer": 1.5e-4 * ms, "rest": 5e-5 * ms}
        for ms in step_ms
    ]
    facts = {"run": run, "layout": BatchLayout(4, 2), "parameters": 5, "compiled": "off", "kernels": "triton"}
    facts |= {"seconds": sum(step_ms) / 1e3, "steps": steps, "memory": {"memory_bytes": 7}}
    facts |= {"busy": busy and {phase: ms / 1e3 for phase, ms in busy.items()}}
    facts |= {"first_loss": 9.0, "last_loss": 8.0, "matmul_flops": 4e14, "peak_flops": 8e14}
    return Measurement(**facts | changes)


ON_GPU = {"memory_bytes": 7, "memory_reserved_bytes": 8}


def test_on_a_gpu_the_gap_is_what_it_was_not_busy():
    busy = {"data": 0.3, "forward": 20.0, "backward": 41.0, "optimizer": 9.0, "rest": 0.1}
    rounds = [measurement([100.0] * 3, busy | {"forward": ms}, memory=ON_GPU) for ms in (20.0, 22.0, 30.0)]
    result = result_of(Case("slm_tiny"), rounds, 4e14)
    assert result["ms_per_step"] == pytest.approx(100)
    expected = {"data": 1.0, "forward": 22.0, "backward": 41.0, "optimizer": 9.0, "gap": 27.0}
    assert result["phases_ms"] == pytest.approx(expected)


def test_a_gap_is_never_negative():
    """A little below zero is zero, and the phases still add up; more than that is not known."""
    for backward, gap in ((70.0, 0.0), (71.5, None)):
        busy = {"forward": 20.0, "backward": backward, "optimizer": 10.0}
        phases = result_of(Case("slm_tiny"), [measurement([100.0], busy, memory=ON_GPU)], 4e14)["phases_ms"]
        assert phases.pop("gap") == gap
        assert sum(phases.values()) == pytest.approx(100) and min(phases.values()) > 0
        assert ("rest" in phases) == (gap is None)


@pytest.mark.parametrize("busy", [None, {"forward": 0.0, "backward": 0.0}, {"data": 1.0}], ids=str)
def test_a_gap_without_work_in_the_phases_is_not_known(busy):
    """As of an empty trace, and of kernels that no phase launched."""
    phases = result_of(Case("slm_tiny"), [measurement([100.0], busy, memory=ON_GPU)], 4e14)["phases_ms"]
    assert phases.pop("gap") is None and sum(phases.values()) == pytest.approx(100)


def test_figures_are_medians_of_all_rounds():
    rounds = [measurement(ms, None) for ms in ([100, 110, 900], [100, 100, 100], [120, 120, 120])]
    rounds[1] = measurement([100, 100, 100], None, memory={"memory_bytes": 9})
    result = result_of(Case("slm_tiny", world_size=2), rounds, 4e14)
    assert result["ms_per_step"] == pytest.approx(110) and result["spread_ms"] == pytest.approx(10)
    assert result["tokens_per_s"] == pytest.approx(8 * 64 / 0.12)
    assert result["tokens_per_s_per_device"] == result["tokens_per_s"] / 2
    assert sum(result["phases_ms"].values()) == pytest.approx(110) and "gap" not in result["phases_ms"]
    assert result["memory_bytes"] == 9 and result["steps"] == 3 and result["rounds"] == 3
    assert result["mfu"] == pytest.approx(result["tflops"] / 800)
    assert result["mfu_causal"] == pytest.approx(result["tflops_causal"] / 800) and result["mfu_causal"] < result["mfu"]
    assert result["of_matmul_rate"] == pytest.approx(result["tflops"] / 400)


def machine(most: int, started: list, fail=lambda case, turn: None, obstacles=lambda case: False):
    """Stands for `start_ranks`, on a machine where micro-batches up to `most` fit. fail: may raise in a measurement."""
    turns = Counter()

    def start(work, arguments, world_size, on_gpus):
        case = arguments[0]
        if work is examine:
            cases = [replace(one, precision="fp32", compiled=bool(one.compiled)) for one in case]
            found = {one: "no compiler" for one in cases if obstacles(one)}
            return Examination(cases, found, 2**34, {"device": "made up"})
        started.append((work.__name__, case.kind, case.micro_batch_size))
        if case.micro_batch_size > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if work is measure:
            turns[case] += 1
            fail(case, turns[case])
            return measurement([100.0], None, matmul_flops=len(started) * 1e12)
        return {"memory_bytes": 2**27, "memory_reserved_bytes": 2**28}

    return start


@pytest.fixture
def bench(monkeypatch):
    """bench(cases, the arguments of `machine`, ...) -> (what was found, what was started, what was said, saved)."""

    def run(cases, most=1000, rounds=1, fit=False, saved=None, **options):
        started, said = [], []
        saved = [] if saved is None else saved

        def save(progress):
            saved.append(([(r.case, r.rounds) for r in progress.results], [m.reason for m in progress.missing]))

        monkeypatch.setattr(benchmark, "start_ranks", machine(most, started, **options))
        arguments = {"warm_up_steps": 1, "steps": 1, "rounds": rounds, "fit": fit, "say": said.append, "save": save}
        return run_benchmark(cases, **arguments), started, said, saved

    return run


def three(**changes) -> list[Case]:
    sizes = {"megaslm": 4, "ddp": 8, "hf": 2}
    return [Case("slm_tiny", kind, overrides=SHAPE, micro_batch_size=n, **changes) for kind, n in sizes.items()]


def test_cases_take_turns_and_one_that_does_not_fit_is_left_out(bench):
    """In the opposite order in every second round."""
    progress, started, said, saved = bench(three(), most=4, rounds=2)
    assert [kind for _, kind, _ in started] == ["megaslm", "ddp", "hf", "hf", "megaslm"]
    results = progress.results
    assert [result.case for result in results] == ["megaslm", "hf"]
    assert [result.matmul_tflops for result in results] == [3.5, 3.5], "the median of 1, 3, 4 and 5, for both"
    assert "slm_tiny, ddp: left out: a rank ran out of memory (CUDA out of memory)" in said
    assert [found for found, _ in saved] == [[("megaslm", 1), ("hf", 1)], [("megaslm", 2), ("hf", 2)]]
    assert progress.missing[0].model_dump() == {
        "preset": "slm_tiny", "case": "ddp", "compiled": False, "rounds": 0,
        "reason": "a rank ran out of memory (CUDA out of memory)",
    }  # fmt: skip
    with pytest.raises(UserError, match="no case could be measured: a rank ran out of memory"):
        bench(three()[1:2], most=4)


@pytest.mark.parametrize(
    "error, reason",
    [
        (torch.OutOfMemoryError("full"), "a rank ran out of memory (full)"),
        (UserError("the disk is gone"), "the disk is gone"),
        (ProcessRaisedException("Traceback:\n  ...\nKeyError: 3\n", 0, 1), "a rank failed: KeyError: 3"),
    ],
)
def test_a_case_that_fails_in_a_later_round_keeps_its_earlier_ones(bench, error, reason):
    def fail(case, turn):
        if case.kind == "ddp" and turn == 3:
            raise error

    progress, started, _, saved = bench(three(), rounds=4, fail=fail)
    assert [(result.case, result.rounds) for result in progress.results] == [("megaslm", 4), ("ddp", 2), ("hf", 4)]
    assert [(one.case, one.rounds, one.reason) for one in progress.missing] == [("ddp", 2, reason)]
    assert len(saved) == 4 and len(started) == 3 + 3 + 3 + 2


def test_what_is_found_before_ctrl_c_is_kept(bench):
    def fail(case, turn):
        if case.kind == "megaslm" and turn == 2:
            raise KeyboardInterrupt

    saved = []
    with pytest.raises(KeyboardInterrupt):
        bench(three(), rounds=2, fail=fail, saved=saved)
    assert saved[-1] == ([("megaslm", 1), ("ddp", 2), ("hf", 2)], [])


def test_every_case_is_measured_with_the_largest_that_fits_it(bench):
    cases = [Case("slm_tiny", kind, overrides=SHAPE) for kind in ("megaslm", "ddp")]
    _, started, said, _ = bench(cases, most=4, fit=True)
    assert any(line.startswith("slm_tiny, megaslm: micro-batch 4 fits: 0.25 GiB of 16.0") for line in said)
    probes = [("probe", size) for size in (1, 2, 8, 4)]
    for kind in ("megaslm", "ddp"):
        of_kind = [(work, size) for work, one, size in started if one == kind]
        assert of_kind == [*probes, ("measure", 4)]


def test_a_peer_that_does_not_fit_at_all_is_left_out_with_advice_for_it(bench, monkeypatch):
    """And the others are measured."""
    fits = iter([2, None])
    monkeypatch.setattr(benchmark, "largest_micro_batch", lambda *arguments: next(fits))
    progress, started, said, _ = bench([Case("slm_tiny", k, overrides=SHAPE) for k in ("megaslm", "hf")], fit=True)
    assert started == [("measure", "megaslm", 2)]
    (line,) = [line for line in said if "left out" in line]
    assert line.startswith(
        "slm_tiny, hf: left out: not even a micro-batch of 1 fits in 16.0 GiB of a rank: take a short"
    )
    assert "train.activation_checkpointing=true" in line and "ZeRO" not in line and len(progress.missing) == 1


def test_without_a_compiler_the_compiled_cases_of_every_kind_are_left_out(bench):
    cases = [*three(compiled=True), *three(compiled=False)]
    progress, started, *_ = bench(cases, obstacles=lambda case: case.compiled)
    assert len(started) == 3 and [one.reason for one in progress.missing] == ["no compiler"] * 3


def test_steps_are_short_and_of_the_same_batch_for_all_cases_of_a_preset(bench):
    overrides = ("train.global_batch_size=480", "data.seq_length=64")
    sizes = {"megaslm": 20, "hf": 16, "ddp": 20}
    cases = [Case("slm_tiny", kind, overrides=overrides, micro_batch_size=n) for kind, n in sizes.items()]
    assert [one.global_batch_size for one in with_common_batch(cases, 8)] == [80] * 3, "at most 8 x 16, in 20s and 16s"
    assert [one.global_batch_size for one in with_common_batch(cases[:1], 8)] == [160]
    assert [one.global_batch_size for one in with_common_batch(cases[:1], 100)] == [480], "that of the run"
    on_two = replace(cases[0], world_size=2)
    (one,) = with_common_batch([on_two], 8)
    assert one.global_batch_size == 320 and one.batch(one.run_config()) == BatchLayout(20, 8)
    # 24 is the largest up to 32 in 48; of 96 it would be 32
    (one,) = with_common_batch([Case("slm_tiny", overrides=("train.global_batch_size=48",), micro_batch_size=24)], 8)
    assert one.batch(one.run_config()) == BatchLayout(24, 2)
    progress, *_ = bench(cases)
    assert {result.run_global_batch_size for result in progress.results} == {480}


def test_a_dot_in_a_name_and_two_kinds_read_one_token_file():
    cases = [Case("megaslm_1.2b", kind, overrides=("data.seq_length=64",)) for kind in ("megaslm", "ddp")]
    cases.append(Case("slm_tiny", overrides=SHAPE))
    with token_files(cases, 1) as given:
        first, second, other = (case.token_file for case in given)
        assert first == second != other and Path(f"{first}.bin").exists() and Path(f"{other}.idx").exists()


def test_data_that_a_config_file_names_is_read(tmp_path):
    values = load_run_config("slm_tiny", list(SHAPE)).model_dump(mode="json")
    values["data"]["train"] = [{"prefix": "mine"}]
    (tmp_path / "own.json").write_text(json.dumps(values))
    with token_files([Case(str(tmp_path / "own.json"))], 1) as (case,):
        assert case.token_file is None and case.run_config().data.train[0].prefix == "mine"


def test_two_files_of_one_name_are_refused(bench, tmp_path):
    values = load_run_config("slm_tiny", list(SHAPE)).model_dump(mode="json")
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"a.json and .*b.json are both called slm_tiny"):
        bench([Case(str(tmp_path / name), overrides=SHAPE) for name in ("a.json", "b.json")])


def test_token_files_have_a_zipf_distribution_over_the_vocabulary(tmp_path):
    write_tokens(str(tmp_path / "tokens"), 1000, 300_000)
    file = TokenFile(str(tmp_path / "tokens"))
    counts = Counter(file.tokens[:].tolist())
    assert 300_000 <= counts.total() < 300_000 * 1.01 and set(counts) == set(range(1000))
    assert counts[4] / counts[49] == pytest.approx(10, rel=0.15)


def test_the_rate_of_matrix_products_is_their_operations_over_their_time(monkeypatch):
    """In the type that is asked for."""
    moments, types = iter(range(1000)), set()
    mm = torch.mm
    monkeypatch.setattr(matmul.time, "perf_counter", lambda: next(moments) / 4)
    monkeypatch.setattr(torch, "mm", lambda a, b, out: types.add((a.dtype, b.dtype)) or mm(a, b, out=out))
    assert matmul.matmul_flops(torch.float32, torch.device("cpu"), width=8) == 4 * 2 * 8**3
    assert types == {(torch.float32, torch.float32)}


def test_on_a_gpu_several_products_are_queued_between_two_events(monkeypatch):
    """So that the host's launch of the first counts little."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 500.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert matmul.seconds_of(lambda: log.append("work"), torch.device("cuda")) == pytest.approx(0.5 / matmul.QUEUED)
    assert log == ["record", *["work"] * matmul.QUEUED, "record", "wait"] and matmul.QUEUED >= 8
