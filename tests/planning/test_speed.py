"""Where a speed is taken from: results of this kind of GPU, of this model or of others; or nowhere."""

import json

import pytest

from megaslm.config import load_run_config
from megaslm.errors import UserError
from megaslm.parallel import Layout
from megaslm.planning import GPUS, find_speed, scaling

PEAK = 989e12
ENVIRONMENT = {
    "device": "NVIDIA H200", "cores": 2, "code_version": None, "command": [], "python": "3.11.9", "packages": {},
    "date": "2031-01-02",
}  # fmt: skip
PARAMETERS = {"megaslm_125m": 128_000_000, "megaslm_1.2b": 1_198_000_000, "megaslm_3b": 2_926_000_000}


def load(preset: str, *overrides: str):
    run = load_run_config(preset, overrides)
    return run.model_copy(update={"model": run.model.model_copy(update={"vocab_size": 50304})})


def result(preset: str, utilization: float, **changes) -> dict:
    return {
        "preset": preset, "case": "megaslm", "model": load(preset).model.model_dump(mode="json"),
        "compiled": "every block", "parameters": PARAMETERS[preset], "seq_length": 2048, "global_batch_size": 8,
        "micro_batch_size": 8, "accumulation_steps": 1, "world_size": 1, "zero_stage": 1, "tensor_parallel_size": 1,
        "activation_checkpointing": False, "precision": "bf16", "kernels": "triton", "steps": 1, "rounds": 1,
        "ms_per_step": 1.0, "spread_ms": 0.0, "tokens_per_s": 1.0, "tokens_per_s_per_device": 1.0, "phases_ms": {},
        "tflops": utilization * PEAK / 1e12, "tflops_causal": 1.0, "mfu": None, "mfu_causal": None,
        "matmul_tflops": 1.0, "of_matmul_rate": 1.0, "memory_bytes": 1, "first_loss": 2.0, "last_loss": 1.0, **changes,
    }  # fmt: skip


@pytest.fixture
def speed(tmp_path):
    """speed(result, ..., preset=, layout=, device=): found by results in one file."""

    def find(*results, run=None, layout=None, device="NVIDIA H200", gpu="h200"):
        report = {"format": 1, "environment": ENVIRONMENT | {"device": device}, "results": results}
        (tmp_path / "throughput_it.json").write_text(json.dumps(report))
        layout = layout or Layout(8, 1, 2048)
        return find_speed(run or load("megaslm_125m"), layout, "triton", GPUS[gpu], tmp_path)

    return find


def test_the_same_model_on_the_same_gpu_is_measured(speed):
    found = speed(result("megaslm_125m", 0.45), result("megaslm_125m", 0.48))
    assert (found.kind, found.utilization) == ("measured", pytest.approx(0.48))
    assert "throughput_it.json" in found.source and not found.has_communication


@pytest.mark.parametrize(
    "changes",
    [
        {"seq_length": 128}, {"kernels": "reference"}, {"compiled": "off"}, {"cuda_graphs": True},
        {"tensor_parallel_size": 2}, {"attention": "cudnn"}, {"compiled": "fell back to eager: no compiler"},
    ],
    ids=str,
)  # fmt: skip
def test_other_settings_are_not_measured(speed, changes):
    found = speed(result("megaslm_125m", 0.2, **changes))
    assert (found.kind, found.utilization) == ("estimated", pytest.approx(0.2))


@pytest.mark.parametrize("compiled", ["off", "fell back to eager: no compiler"])
def test_eager_steps_are_those_of_a_run_that_is_not_compiled(speed, compiled):
    """As ZeRO-3 is not where nobody asks for it."""
    eager = result("megaslm_125m", 0.2, compiled=compiled)
    assert speed(eager, run=load("megaslm_125m", "train.compile=false")).kind == "measured"
    assert speed(eager, layout=Layout(8, 1, 2048, zero_stage=3)).kind == "measured"


@pytest.mark.parametrize("changes", [{"precision": "fp32"}, {"float8": "rowwise"}, {"case": "hf"}], ids=str)
def test_other_arithmetic_and_peers_say_nothing(speed, changes):
    assert speed(result("megaslm_125m", 0.05, **changes)).kind == "assumed"


def test_float8_and_fp32_are_found_by_plans_of_their_own(speed):
    float8 = load("megaslm_125m", "train.float8=rowwise")
    found = speed(result("megaslm_125m", 0.6), result("megaslm_125m", 1.1, float8="rowwise"), run=float8)
    assert (found.kind, found.utilization) == ("measured", pytest.approx(1.1))
    fp32 = speed(result("megaslm_125m", 0.03, precision="fp32"), layout=Layout(8, 1, 2048, precision="fp32"))
    assert fp32.utilization == pytest.approx(0.03 * 989 / 67)


def test_recomputation_counts_as_work(speed):
    again = result("megaslm_125m", 0.3, activation_checkpointing=True)
    assert speed(again, layout=Layout(8, 1, 2048, activation_checkpointing=True)).utilization == pytest.approx(0.4)
    assert speed(again).kind == "estimated"


def test_another_model_is_between_those_around_it(speed):
    found = speed(result("megaslm_125m", 0.40), result("megaslm_3b", 0.60), run=load("megaslm_760m"))
    assert found.kind == "estimated" and 0.45 < found.utilization < 0.6
    assert "megaslm_125m and megaslm_3b" in found.source
    assert speed(result("megaslm_1.2b", 0.55), run=load("megaslm_3b")).utilization == pytest.approx(0.55)


def test_results_of_another_gpu_say_nothing(speed):
    found = speed(result("megaslm_125m", 0.2), device="NVIDIA A100-SXM4-80GB")
    assert (found.kind, found.utilization) == ("assumed", scaling.UTILIZATION)


def test_the_number_of_gpus_is_looked_at_after_the_model(speed):
    """Fewer GPUs have less communication in them, which a plan adds; as many in the same layout have all of it."""
    several, one = result("megaslm_125m", 0.5, world_size=8), result("megaslm_125m", 0.4)
    assert speed(several, result("megaslm_3b", 0.3)).kind == "measured"
    assert speed(several, one).utilization == pytest.approx(0.4)
    found = speed(several, one, layout=Layout(8, 1, 2048, data_parallel_size=8))
    assert found.has_communication and found.utilization == pytest.approx(0.5)
    assert not speed(several, layout=Layout(8, 1, 2048, data_parallel_size=8, zero_stage=2)).has_communication


def test_every_gpu_of_the_table_can_be_measured(speed):
    for name, gpu in GPUS.items():
        found = speed(result("megaslm_125m", 0.01), device=gpu.torch_name, gpu=name)
        assert found.kind == "measured" and gpu.peak("fp32") < gpu.peak("bf16")


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "cannot be read"),
        ("[]", "not of tools/benchmark_throughput.py"),
        ({"environment": {"torch": "2.13"}}, "environment.device: Field required"),
        ({"results": [{"case": "megaslm"}]}, "results.0.preset"),
        ({"format": 2}, "has format 2, and this megaslm reads 1"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, says):
    if isinstance(content, dict):
        content = json.dumps({"format": 1, "environment": ENVIRONMENT, "results": []} | content)
    (tmp_path / "throughput_bad.json").write_text(content)
    with pytest.raises(UserError, match="throughput_bad.json") as error:
        find_speed(load("megaslm_125m"), Layout(8, 1, 2048), "triton", GPUS["h200"], tmp_path)
    assert says in str(error.value)


@pytest.mark.parametrize("utilization", [0.0, float("nan"), 3.0])
def test_rates_that_cannot_be_are_refused(speed, utilization):
    with pytest.raises(UserError, match="throughput_it.json"):
        speed(result("megaslm_125m", utilization))
