"""The benchmark of the kernels: its command on a CPU, its counts, its verdicts, and its timer without the GPU."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
import benchmark_kernels  # noqa: E402
import kernel_cases  # noqa: E402
import kernel_timing  # noqa: E402
from kernel_cases import CASES, IMPLEMENTATIONS, Implementation, implementation  # noqa: E402
from kernel_report import judge, verdict, verdict_text  # noqa: E402
from kernel_timing import Benchmark, CudaTimer, HostTimer, Standard, Subject, measure  # noqa: E402

from megaslm.errors import UserError  # noqa: E402

CPU = torch.device("cpu")
OPTIONS = ("ops", "widths", "tokens", "head_sizes", "vocab_sizes", "dtype", "backends", "compile_widths")


@pytest.fixture(autouse=True)
def haste(monkeypatch):
    """No figure is looked at here: none needs many bytes moved or cold caches."""
    monkeypatch.setattr(HostTimer, "minimum_bytes", 1e5)
    monkeypatch.setattr(HostTimer, "cold_bytes", 4e3)


@pytest.fixture
def run(monkeypatch):
    """run(*arguments) -> exit code of the command, in this process."""

    def in_process(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark_kernels.py", *map(str, arguments)])
        return benchmark_kernels.main()

    return in_process


def chosen(device_type="cuda", **given):
    arguments = argparse.Namespace(**dict.fromkeys((*OPTIONS, "compile_tokens")), quick=False, full=False)
    vars(arguments).update(given)
    benchmark_kernels.complete(arguments, device_type, list(CASES), list(IMPLEMENTATIONS))
    return arguments


def case_of(op, tokens=64, width=128, dtype=torch.float32):
    more = {"head_size": 64} if "rotary" in op else {"vocab": 96} if op == "linear_cross_entropy" else {}
    return CASES[op](tokens=tokens, width=width, dtype=dtype, **more)


def ours(monkeypatch, function):
    """Let `function` compute our op."""
    real = kernel_timing.implementation
    monkeypatch.setattr(
        kernel_timing, "implementation",
        lambda op, name, device: Implementation(function) if name == "triton" else real(op, name, device),
    )  # fmt: skip


def benchmark(monkeypatch, triton, backends=("triton", "torch")):
    """A Benchmark on the CPU, for which `triton` computes our op."""
    ours(monkeypatch, triton)
    return Benchmark(list(backends), lambda case: True, HostTimer(CPU), float("inf"))


# The command


def test_every_op_on_a_cpu(run, capsys, tmp_path):
    assert run("--quick", "--output", tmp_path, "--backends", "triton", "reference", "torch") == 0
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert report["cases_left"] == 0 and report["copy_gb_per_s"] > 0 and report["products_tflop_per_s"] > 0
    assert set(report["absent"]["triton"]["needs a GPU"]) == set(CASES) - {"layer_norm", "gelu"}
    printed = capsys.readouterr().out
    assert "absent: triton: needs a GPU" in printed
    assert report["left_out"] == {"widths": [512], "linear_widths": [512], "tokens": [256]}
    assert "left out without --full: widths 512" in printed
    measured = {(row["op"], row["direction"], row["implementation"]) for row in report["rows"]}
    for op, case in CASES.items():
        names = {"torch"} if op in ("layer_norm", "gelu") else {"torch", "reference"}
        names |= {"products"} if op == "linear_cross_entropy" else set()
        assert {row[1:] for row in measured if row[0] == op} == {(d, n) for d in case.directions for n in names}
    for row in report["rows"]:
        assert row["status"] == "ok" and row["ms"] > 0 and row["percent_of_roof"] > 0, row
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"kernels.json", "roofline.png"}


def test_compiled_reference_on_a_cpu(run, tmp_path):
    options = ["--ops", "rms_norm", "--backends", "compile", "--widths", "64", "--tokens", "64"]
    assert run(*options, "--output", tmp_path) == 0
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert [(row["direction"], row["status"]) for row in rows] == [(d, "ok") for d in ("forward", "backward", "both")]


def test_time_limit_ends_in_good_order(run, capsys, tmp_path):
    assert run("--limit_seconds", "0", "--output", tmp_path) == 0
    assert json.loads((tmp_path / "kernels.json").read_text())["cases_left"] == 9
    assert "stopped at --limit_seconds: 9 of 9" in capsys.readouterr().out


def test_a_fault_of_the_device_ends_the_run(run, capsys, monkeypatch, tmp_path):
    def fails(x, weight, eps):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    ours(monkeypatch, fails)
    options = ["--ops", "rms_norm", "gelu", "--backends", "reference", "triton", "torch", "--widths", "64"]
    assert run(*options, "--tokens", "64", "--output", tmp_path) == 1
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert [(row["implementation"], row["status"] == "ok") for row in report["rows"]] == [
        *[("reference", True)] * 3, *[("triton", False)] * 3
    ]  # fmt: skip
    assert report["fault"].startswith("triton of rms_norm at tokens 64, width 64: failed: RuntimeError: Triton Error")
    assert report["cases_left"] == 1 and report["fault"] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "rms_nrom"], "rms_nrom is not one of rms_norm, add_rms_norm"),
        (["--backends", "cuda"], "cuda is not one of triton, reference"),
        (["--tokens", "0"], "--tokens: 0 is below 1"),
        (["--ops", "gelu", "--head_sizes", "64"], "--head_sizes is for rotary and qk_norm_rotary"),
        (["--backends", "torch", "--compile_tokens", "256"], "--compile_tokens is for compile"),
        (["--compile_widths", "96"], "--compile_widths: 96 is not among the --widths"),
        (["--ops", "rotary", "--widths", "96"], "--head_sizes: 64 is odd or does not divide the width 96"),
    ],
)
def test_mistakes_of_the_user(run, tmp_path, arguments, message):
    with pytest.raises(UserError) as mistake:
        run(*arguments, "--output", tmp_path)
    assert message in str(mistake.value)


def test_a_mistake_as_a_command_ends(environment):
    command = [sys.executable, TOOLS / "benchmark_kernels.py", "--output", "/dev/null/folder"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert (finished.returncode, finished.stderr) == (2, "error: --output /dev/null/folder: Not a directory\n")


# The cases


@pytest.mark.parametrize(
    ("op", "forward", "backward"),
    [
        ("rms_norm", 4, 6), ("add_rms_norm", 8, 8), ("rotary", 4, 4), ("qk_norm_rotary", 4, 6), ("swiglu", 6, 10),
        ("cross_entropy", 2, 4), ("layer_norm", 4, 6), ("gelu", 4, 6),
    ],
)  # fmt: skip
def test_minimal_bytes_of_an_element_in_bf16(op, forward, backward):
    case = case_of(op, tokens=16384, width=1024, dtype=torch.bfloat16)
    elements = {"rotary": 16384 * (16 + 4) * 64, "swiglu": 16384 * 2816, "gelu": 16384 * 4096}
    elements["qk_norm_rotary"] = elements["rotary"]
    count = elements.get(op, 16384 * 1024)
    for direction, each in (("forward", forward), ("backward", backward), ("both", forward + backward)):
        assert case.traffic(direction) == each * count


def test_products_of_the_linear_loss():
    case = case_of("linear_cross_entropy", tokens=256, width=512)
    assert case.flops("forward") == 2 * 256 * 512 * 96 and case.flops("both") == 3 * case.flops("forward")
    assert case.traffic("both") == 2 * 4 * 512 * (256 + 96)


def test_queries_and_keys_are_views_of_a_packed_projection():
    q, k, cos, _ = CASES["rotary"](tokens=4096, width=768, dtype=torch.bfloat16, head_size=64).inputs(CPU, 0)
    assert q.shape == (2, 2048, 12, 64) and k.shape == (2, 2048, 3, 64) and cos.shape == (2048, 32)
    assert q.stride(1) == k.stride(1) == 18 * 64 and q.is_leaf and k.requires_grad
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_computes_what_the_reference_does(op, dtype):
    case = case_of(op, dtype=dtype)
    values = Subject(case, implementation(op, "torch", CPU), CPU, 1).values()
    error, limit = Standard(case, CPU).worst(values, rival=dtype != torch.float32)
    assert error <= limit


def test_liger_gets_tables_with_an_axis_of_sequences(monkeypatch):
    """Version 0.5.10 reads beyond those that have none."""

    def liger_rope(q, k, cos, sin):
        assert q.shape == (2, 1, 32, 64) and cos.shape == sin.shape == (1, 32, 64)

        def rotated(x):
            x1, x2 = x.chunk(2, dim=-1)
            return x * cos.unsqueeze(1) + torch.cat((-x2, x1), dim=-1) * sin.unsqueeze(1)

        return rotated(q), rotated(k)

    functional = ModuleType("functional")
    functional.liger_rope = liger_rope
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    monkeypatch.setattr(kernel_cases, "SEQUENCE", 32)
    case = case_of("rotary", width=64)
    values = Subject(case, implementation("rotary", "liger", torch.device("cuda")), CPU, 1).values()
    error, limit = Standard(case, CPU).worst(values, rival=False)
    assert error <= limit


def test_default_shapes_of_a_gpu():
    arguments = chosen()
    cases = benchmark_kernels.select_cases(arguments)
    assert {case.tokens for case in cases[:71]} == {16384}  # a run that is stopped has these complete
    assert {case.width for case in cases if case.op == "rms_norm"} == {512, 768, 1024, 1536, 2048, 3072, 4096}
    assert {(case.width, case.vocab) for case in cases if case.op == "linear_cross_entropy"} == {
        (width, vocab) for width in (768, 1024, 2048) for vocab in (50304, 32000)
    }
    compiled = [case for case in cases if benchmark_kernels.compiles(arguments, case)]
    assert {case.tokens for case in compiled} == {16384} and {case.op for case in compiled} == set(CASES)
    assert len(cases) == 213 and len(compiled) == 44
    assert len(benchmark_kernels.select_cases(chosen(quick=True))) == 16
    fewer = {512, 1536, 3072, 4096}
    assert {option: set(sizes) for option, sizes in arguments.left_out.items()} == {
        "linear_widths": fewer, "compile_widths": fewer - {4096}, "compile_tokens": {4096, 32768}
    }  # fmt: skip
    assert set(chosen(ops=["rms_norm"]).left_out) == {"compile_widths", "compile_tokens"}
    assert set(chosen(ops=["rms_norm"], backends=["torch"], quick=True).left_out) == {"widths", "tokens"}


def test_full_leaves_nothing_out():
    arguments = chosen(full=True)
    cases = benchmark_kernels.select_cases(arguments)
    widths = {512, 768, 1024, 1536, 2048, 3072, 4096}
    for op in set(CASES) - {"cross_entropy"}:
        assert {(case.width, case.tokens) for case in cases if case.op == op} == {
            (width, tokens) for width in widths for tokens in (4096, 16384, 32768)
        }
    assert arguments.left_out == {} and all(benchmark_kernels.compiles(arguments, case) for case in cases)


def test_shapes_that_are_asked_for_are_compiled_too():
    arguments = chosen(widths=[512], tokens=[4096], ops=["rms_norm", "linear_cross_entropy"])
    cases = benchmark_kernels.select_cases(arguments)
    assert {case.width for case in cases} == {512} and arguments.left_out == {}
    assert all(benchmark_kernels.compiles(arguments, case) for case in cases)


# The measurements


def test_a_wrong_op_is_reported_and_not_timed(monkeypatch):
    def wrong_in_one_row(x, weight, eps):
        scale = torch.ones(x.size(0), 1)
        scale[-1] = 1.02
        return torch.nn.functional.rms_norm(x * scale, weight.shape, weight, eps) * scale

    rows = benchmark(monkeypatch, wrong_in_one_row).rows_of(case_of("rms_norm"))
    ours = [row for row in rows if row["implementation"] == "triton"]
    assert len(ours) == 3 and all(row["status"].startswith("WRONG, not timed") and "ms" not in row for row in ours)
    assert [row["status"] for row in rows if row["implementation"] == "torch"] == ["ok"] * 3


def test_a_loss_may_write_its_gradient_over_the_logits(monkeypatch):
    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits, targets):
            with torch.enable_grad():
                copy = logits.detach().clone().requires_grad_()
                losses = torch.nn.functional.cross_entropy(copy, targets, reduction="none")
                gradient = torch.autograd.grad(losses.sum(), copy)[0]
            if logits.requires_grad:
                logits.detach().copy_(gradient)
            ctx.save_for_backward(logits)
            return losses.detach()

        @staticmethod
        def backward(ctx, upstream):
            return ctx.saved_tensors[0] * upstream.unsqueeze(1), None

    rows = benchmark(monkeypatch, Loss.apply, ["triton"]).rows_of(case_of("cross_entropy"))
    assert [row["status"] for row in rows] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB"), "out of memory"),
        (ValueError("no such\nthing"), "failed: ValueError: no such"),
    ],
)
def test_one_that_fails_leaves_the_others_their_rows(monkeypatch, error, status):
    def fails(x, weight, eps):
        raise error

    rows = benchmark(monkeypatch, fails).rows_of(case_of("rms_norm"))
    assert [row["status"] for row in rows] == [status] * 3 + ["ok"] * 3


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("CUDA error: misaligned address"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory."), False),
        (RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"), False),
        (ValueError("an illegal memory access"), False),
    ],
)
def test_errors_after_which_the_device_is_lost(monkeypatch, error, lost):
    def fails(x, weight, eps):
        raise error

    measuring = benchmark(monkeypatch, fails)
    rows = measuring.rows_of(case_of("rms_norm"))
    assert bool(measuring.fault) == lost and len(rows) == (3 if lost else 6)


def test_a_device_that_does_not_answer_is_lost(monkeypatch):
    def fails(x, weight, eps):
        raise ValueError("hides the fault")

    def no_answer():
        raise RuntimeError("unspecified launch failure")

    measuring = benchmark(monkeypatch, fails)
    monkeypatch.setattr(measuring._timer, "synchronize", lambda: None)
    measuring.rows_of(case_of("rms_norm"))
    assert measuring.fault is None
    monkeypatch.setattr(measuring._timer, "synchronize", no_answer)
    measuring._failure(case_of("rms_norm"), "triton", ValueError("hides the fault"))
    assert measuring.fault == "triton of rms_norm at tokens 64, width 128: failed: ValueError: hides the fault"


def test_an_op_that_is_right_gets_a_verdict(monkeypatch):
    rows = benchmark(monkeypatch, lambda gate_up: implementation("swiglu", "torch", CPU).function(gate_up)).rows_of(
        case_of("swiglu")
    )
    assert [("verdict" in row, row["implementation"]) for row in rows] == [(True, "triton")] * 3 + [
        (False, "torch")
    ] * 3
    assert all(row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6) for row in rows)


@pytest.mark.parametrize("op", ["rms_norm", "cross_entropy"])
def test_the_calls_of_a_sample_write_to_places_of_their_own(op):
    case = case_of(op)
    subject = Subject(case, implementation(op, "reference", CPU), CPU, 4)
    subject.values()
    for direction in case.directions:
        prepare, body = subject.work(direction)
        made = tensors(body(prepare(4)))
        of_a_call = {"forward": 1, "backward": 2, "both": 2 if op == "cross_entropy" else 3}[direction]
        assert len(made) == len({x.data_ptr() for x in made}) == 4 * of_a_call, direction


def tensors(results):
    return [results] if isinstance(results, torch.Tensor) else [x for result in results for x in tensors(result)]


def test_the_calls_of_a_sample_read_upstream_gradients_of_their_own():
    seen = []

    def doubled(x):
        y = 2 * x
        y.register_hook(lambda upstream: seen.append((upstream.data_ptr(), upstream.sum().item())))
        return y

    subject = Subject(case_of("gelu"), Implementation(doubled), CPU, 3)
    subject.values()
    seen.clear()
    prepare, body = subject.work("both")
    body(prepare(3))
    assert len({place for place, _ in seen}) == 3 and len({total for _, total in seen}) == 1


def test_memory_for_a_sample_is_there_before_it_is_timed():
    made, samples = [], []

    def sample(prepare, body, count, host_us):
        samples.extend((max(made), len(prepare())))
        return [1.0] * count

    timer = SimpleNamespace(synchronize=lambda: None, samples=sample, has_queue=True)
    measure(timer, range, lambda state: made.append(len(state)), 16)
    assert samples == [16, 16] and made[:2] == [1, 1]  # one call to compile


def test_enough_bytes_are_moved_at_once():
    measuring = Benchmark(
        [], lambda case: True, SimpleNamespace(minimum_bytes=CudaTimer.minimum_bytes, device=CPU), 0.0
    )
    small = CASES["rms_norm"](tokens=4096, width=512, dtype=torch.bfloat16)
    assert [measuring._calls(small, d) for d in ("forward", "backward", "both")] == [16, 11, 7]
    assert measuring._calls(CASES["rms_norm"](tokens=32768, width=4096, dtype=torch.bfloat16), "forward") == 1


class Result:
    """Says when nobody holds it any more."""

    def __init__(self, events):
        self._events = events

    def __del__(self):
        self._events.append("let go")


@pytest.fixture
def device(monkeypatch):
    """A CudaTimer without a device, and what it does in order."""
    events = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            events.append("record")

        def elapsed_time(self, end):
            return 0.25

    cuda = SimpleNamespace(
        Event=Event,
        _sleep=lambda cycles: events.append(("hold", cycles)),
        synchronize=lambda device: events.append("synchronize"),
        get_device_properties=lambda device: SimpleNamespace(L2_cache_size=1024),
        reset_peak_memory_stats=lambda device: events.append("reset"),
        memory_allocated=lambda device: 100,
        max_memory_allocated=lambda device: 700,
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    timer = CudaTimer(CPU)
    timer._cold = SimpleNamespace(sum=lambda: events.append("flush"))
    return timer, events


def test_the_device_is_held_until_the_host_has_queued_the_work(device):
    timer, events = device

    def body(state):
        events.append("body")
        return Result(events)

    found = timer.samples(lambda: events.append("prepare"), body, 3, host_us=200.0)
    assert found == [0.25] * 3
    sample = ["prepare", "flush", ("hold", 450 * 2000), "record", "body", "record", "let go"]
    assert events == sample * 3 + ["synchronize"]


def test_the_host_lets_go_of_a_sample_before_the_next():
    events = []
    timer = SimpleNamespace(_cold=torch.ones(1))
    HostTimer.samples(timer, lambda: events.append("prepare"), lambda state: Result(events), 2, host_us=200.0)
    assert events == ["prepare", "let go"] * 2


def test_the_peak_is_taken_of_work_that_is_done(device):
    timer, events = device
    assert timer.peak_bytes(lambda: events.append("work")) == 600
    assert events == ["reset", "work", "synchronize"]


# The verdicts


def row(ms, op="rms_norm", direction="forward", percent=95.0, tokens=16384, width=1024, **more):
    shape = {"tokens": tokens, "width": width} | ({"vocab": 50304} if op == "linear_cross_entropy" else {})
    figures = {"ms": ms, "ms_spread": 0.01, "end_to_end_us": 1e3 * ms, "end_to_end_us_spread": 10.0, "peak_mb": 100.0}
    roof = {"percent_of_roof": percent, "roof_ms": percent / 100 * ms, "roof_ms_spread": 0.01}
    return {"op": op, "direction": direction, "shape": shape} | figures | roof | more


@pytest.mark.parametrize(
    ("ours", "rivals", "missed"),
    [
        (row(1.0), {"torch": row(1.5)}, []),
        (row(1.0, percent=84.2), {}, ["84 % of copy, target 90 %"]),
        (row(1.0, percent=84.2, direction="backward"), {}, []),
        (row(1.0, percent=88.0), {}, ["88 % of copy, target 90 %"]),
        (row(1.0, percent=88.0, ms_spread=0.03), {}, []),  # within the spread
        (row(1.0, percent=88.0, roof_ms_spread=0.03), {}, []),
        (row(1.0, percent=20.0, width=768), {}, []),
        (row(1.0, percent=84.2, op="qk_norm_rotary"), {"compile": row(0.8)}, ["25% slower than compile"]),
        (row(1.0), {"torch": row(0.995)}, []),  # within the spread
        (row(1.0, end_to_end_us=0.0), {"torch": row(0.5, end_to_end_us=1.0)}, ["100% slower than torch"]),
        (row(1.0, end_to_end_us=90.0), {"torch": row(2.0, end_to_end_us=60.0)}, ["50% slower than torch end to end"]),
        (row(1.0, end_to_end_us=90.0, tokens=4096), {"torch": row(2.0, end_to_end_us=60.0)}, []),
        (row(1.2, op="linear_cross_entropy", roof_ms=1.0), {}, ["1.20 x its products, target 1.10"]),
        (row(1.12, op="linear_cross_entropy", roof_ms=1.0), {}, ["1.12 x its products, target 1.10"]),
        (row(1.12, op="linear_cross_entropy", roof_ms=1.0, ms_spread=0.03), {}, []),
        (row(1.05, op="linear_cross_entropy", roof_ms=1.0), {"torch": row(2.0, peak_mb=500.0)}, []),
        (
            row(1.05, op="linear_cross_entropy", roof_ms=1.0),
            {"torch": row(2.0, peak_mb=200.0)},
            ["50% of torch's memory, target 25%"],
        ),
    ],
)
def test_targets(ours, rivals, missed):
    assert verdict(ours, rivals)["missed"] == missed


def test_the_text_says_to_whom_we_lose_and_by_how_much():
    rows = [
        row(1.0, implementation="triton", status="ok"),
        row(0.8, implementation="torch", status="ok"),
        row(0.5, implementation="liger", status="ok"),
        row(0.1, implementation="apex", status="out of memory"),
        row(0.1, implementation="compile", status="ok", direction="both"),
    ]
    judge(rows)
    text = verdict_text(rows[0]["verdict"])
    assert text == "MISSES: 25% slower than torch; 25% slower than torch end to end; 100% slower than liger"
    assert verdict_text({"missed": [], "behind": {}}) == "meets its targets"
