"""tools/plan.py: what it recommends for the presets, what it writes, and what it refuses."""

import json
import shlex
from pathlib import Path

import pytest

from megaslm.config import load_run_config

PRESETS = {
    # micro-batch, accumulation, recomputed, GB at the peak, days for 100B tokens at the assumed speed
    "megaslm_125m": (32, 1, False, 23.8, 0.37),
    "megaslm_350m": (32, 1, False, 58.0, 0.98),
    "megaslm_760m": (32, 2, False, 92.5, 2.02),
    "megaslm_1.2b": (32, 2, False, 106.4, 2.83),
    "megaslm_3b": (16, 8, False, 108.1, 6.82),
}


@pytest.fixture
def plan(run_tool, tmp_path):
    """plan(argument, ...) -> (printed, JSON to the letter)"""

    def run(*arguments):
        path = tmp_path / "plan.json"
        finished = run_tool("plan.py", *arguments, "--json", path)
        assert finished.code == 0, finished.err
        return finished.out, json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))

    return run


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_on_eight_h200(plan, preset):
    out, found = plan("--preset", preset, "--tokens", "100B")
    best = found["recommended"]
    assert (best["engine_config"], best["tensor_parallel_size"]) == ("zero1.json", 1)
    micro, accumulation, recomputed, gigabytes, days = PRESETS[preset]
    assert (best["micro_batch_size"], best["accumulation_steps"]) == (micro, accumulation)
    assert best["activation_checkpointing"] is recomputed and best["fits"]
    assert best["total_bytes"] / 1e9 == pytest.approx(gigabytes, abs=0.06)
    if found["speed"]["kind"] == "assumed":  # until there are results
        assert found["speed"]["seconds"] / 86400 == pytest.approx(days, abs=0.01)
    with_margin = f"{1.1 * best['total_bytes'] / 1e9:.1f}"
    assert f"{gigabytes} GB, {with_margin} with 10% of margin, of 139.9" in out and found["speed"]["kind"] in out


def test_the_printed_command_is_one_that_the_run_accepts(plan, command):
    out, found = plan(
        "--preset", "megaslm_3b", "--gpu", "a100_40gb", "--nodes", 2, "--tokens", "1B", "optimizer.lr=1e-4"
    )
    best = found["recommended"]
    assert found["command"] in out and "slots=8" in out and "InfiniBand port of 46 GB/s" in out
    assert found["command"].startswith("bash launch/cluster.sh --hostfile hosts --preset megaslm_3b ")
    assert "data.train=PREFIX" in found["command"]
    words = shlex.split(found["command"])
    finished = command(*words[words.index("--preset") :], "--print_config")
    assert finished.code == 0, finished.err
    run = json.loads(finished.out)
    assert run["train"]["micro_batch_size"] == best["micro_batch_size"] and run["train"]["max_tokens"] == 10**9
    assert run["train"]["activation_checkpointing"] is best["activation_checkpointing"]
    assert run["optimizer"]["lr"] == 1e-4


def test_the_command_runs_what_was_planned(plan):
    """Not the steps of an override, nor the epochs of the preset, nor a micro-batch that was overridden."""
    overrides = (
        "train.max_steps=100",
        "train.micro_batch_size=3",
        "parallel.tensor_parallel_size=2",
        "eval.sample_prompt=two words",
    )
    _, found = plan("--preset", "sab_3b", "--gpu", "h100", "--tokens", "1e9", *overrides)
    words = shlex.split(found["command"])
    assert words[:4] == ["bash", "launch/node.sh", "--gpus", "8"] and "eval.sample_prompt=two words" in words
    given = words[words.index("--ds_config") + 2 :]
    run = load_run_config("sab_3b", given)
    assert (run.train.max_tokens, run.train.max_steps, run.train.max_epochs) == (10**9, None, None)
    assert run.parallel.sequence_parallel and run.parallel.tensor_parallel_size == 2
    assert len({word.partition("=")[0] for word in given}) == len(given)


def test_recomputation_of_a_preset_is_no_order(plan):
    preset = "--preset", "sab_3b", "--gpu", "h200", "--tokens", "1B"
    out, found = plan(*preset)
    assert found["recommended"]["activation_checkpointing"] is False and found["recommended"]["zero_stage"] == 1
    _, found = plan(*preset, "train.activation_checkpointing=true")
    assert found["recommended"]["activation_checkpointing"] is True


def test_options_keep_the_plan_within_their_bounds(plan, run_tool):
    out, found = plan("--preset", "megaslm_1.2b", "train.float8=rowwise", "--gpu", "h100")
    assert {one["tensor_parallel_size"] for one in found["choices"]} == {1} and "float8 gains is not in" in out
    # 3 x 2056 tokens would fit, and are no multiple of 16.
    sizes = "--gpu", "rtx4090", "train.global_batch_size=48", "model.context_length=2056"
    micro_batches = [
        plan("--preset", "megaslm_1.2b", f"train.float8={recipe}", *sizes)[1]["recommended"]["micro_batch_size"]
        for recipe in ("off", "rowwise")
    ]
    assert micro_batches == [3, 2]
    _, found = plan("--preset", "megaslm_125m", "train.cuda_graphs=true")
    assert {(one["zero_stage"], one["tensor_parallel_size"]) for one in found["choices"]} == {(1, 1)}
    for arguments, says in (
        (("--gpu", "a100_80gb", "train.float8=rowwise"), "sm_89 or later"),
        (
            ("train.float8=rowwise", "parallel.tensor_parallel_size=2"),
            "does not go with parallel.tensor_parallel_size=2",
        ),
        (("train.cuda_graphs=true", "train.precision=fp32"), "goes with bf16 under ZeRO-1"),
        (("train.cuda_graphs=true", "optimizer.type=apex_fused_adam"), "optimizer.type=adamw"),
        (("train.float8=rowwise", "model.ffn_hidden_size=5000"), "model.ffn_hidden_size (5,000)"),
        (("train.float8=rowwise", "data.seq_length=1032", "train.global_batch_size=8"), "a micro-batch (1,032)"),
        (("train.float8=rowwise", "--gpu", "cpu", "train.precision=bf16"), "needs an NVIDIA GPU"),
    ):
        assert says in run_tool("plan.py", "--preset", "megaslm_1.2b", *arguments).message()


def test_fp32_computes_at_the_peak_of_fp32(plan):
    _, bf16 = plan("--preset", "megaslm_125m", "--gpus", 1)
    _, fp32 = plan("--preset", "megaslm_125m", "--gpus", 1, "train.precision=fp32")
    assert fp32["speed"]["seconds"] / bf16["speed"]["seconds"] == pytest.approx(989 / 67)


def test_offloading_has_no_speed_and_takes_the_hosts_memory(plan):
    path = Path(__file__).resolve().parents[2] / "ds_configs" / "zero3_offload.json"
    out, found = plan("--preset", "megaslm_1.2b", "--ds_config", path)
    assert found["speed"] is None and "speed: not known with offloading" in out
    assert "host memory for what is offloaded: 2.7 GB for each rank, 21.6 GB a node" in out


def test_a_batch_too_small_for_the_gpus_is_said(plan):
    out, found = plan("--preset", "neox_1.2b", "--nodes", 4, "--tokens", "1B")
    assert found["recommended"]["tensor_parallel_size"] == 2
    assert "16 sequences do not divide among 32 GPUs" in out and "a larger batch" in out
    assert "take a larger batch" not in plan("--preset", "megaslm_125m")[0]


def test_cost_and_disk(plan):
    out, found = plan("--preset", "megaslm_1.2b", "--tokens", "100B", "--price", 2.5)
    hours = 8 * found["speed"]["seconds"] / 3600
    assert found["cost"] == pytest.approx(2.5 * hours) and "GPU hours at 2.5" in out
    assert found["disk_bytes"]["checkpoint"] == 12 * found["parameters"]["all"]  # 50304 is a multiple of 128
    assert "cost" not in plan("--preset", "megaslm_1.2b")[0]
    assert "copy of a background save" in out
    assert "background save" not in plan("--preset", "megaslm_1.2b", "checkpoint.background=false")[0]


@pytest.mark.parametrize(
    "steps, policy, kept",
    [
        (100, ("interval=10", "keep_last=5"), 7),  # 5, the best, one to come
        (100, ("interval=10", "keep_last=5", "keep_best=false"), 6),
        (20, ("interval=10", "keep_last=5"), 3),  # two saves, and the best
        (100, ("interval=0",), 2),
        (100, ("interval=10", "keep_last=2", "keep_every=50"), 5),  # 90, 100, 50, the best, one to come
    ],
)
def test_checkpoints_at_once(plan, steps, policy, kept):
    overrides = [f"checkpoint.{option}" for option in policy]
    _, found = plan("--preset", "megaslm_125m", f"train.max_steps={steps}", *overrides)
    assert found["disk_bytes"]["checkpoints_kept"] == kept * found["disk_bytes"]["checkpoint"]


def test_a_model_that_does_not_fit_gets_told_what_would_help(plan):
    out, found = plan("--preset", "sab_3b", "--gpus", 1, "--gpu", "rtx4090", "--tokens", "1B")
    assert found["recommended"] is None and found["command"] is None and found["speed"] is None
    assert "nothing fits" in out and "of the host's memory for each rank" in out
    changes = {one["change"]: one for one in found["would_help"]}
    assert list(changes) == ["8 GPUs (--gpus 8 --nodes 1)", "ds_configs/zero3_offload.json"]
    assert all(one["fits"] for one in changes.values()) and "seq_length" not in str(list(changes))
    assert changes["8 GPUs (--gpus 8 --nodes 1)"]["data_parallel_size"] == 8


def test_a_small_gpu_asks_for_recomputation_or_a_higher_stage(plan):
    _, large = plan("--preset", "megaslm_3b", "--gpu", "h200")
    long = ("model.context_length=32768", "train.global_batch_size=64")
    _, middle = plan("--preset", "megaslm_3b", "--gpu", "h100", *long)
    _, small = plan("--preset", "megaslm_3b", "--gpu", "rtx4090")
    found = [
        (one["recommended"]["zero_stage"], one["recommended"]["activation_checkpointing"])
        for one in (large, middle, small)
    ]
    assert found == [(1, False), (1, True), (2, False)]
    assert small["recommended"]["total_bytes"] < small["gpu"]["usable_bytes"] < 0.95 * 23.64 * 2**30


def test_this_machine(plan):
    out, found = plan("--preset", "slm_small", "--gpu", "CPU", "--gpus", 1, "--tokens", "1M", "model.vocab_size=8000")
    assert found["precision"] == "fp32" and found["speed"] is None and "speed: not known" in out
    assert found["recommended"]["total_bytes"] > 0 and "CUDA, NCCL" not in out
    assert "launch/node.sh --cpu_ranks 1 " in found["command"]


def test_an_engine_config_of_ones_own(plan, write_json):
    path = write_json("mine.json", {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}})
    out, found = plan("--preset", "megaslm_350m", "--ds_config", path)
    assert {one["zero_stage"] for one in found["choices"]} == {2} and f"--ds_config {path}" in out
    assert found["recommended"]["reduce_bucket"] == 500_000_000


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--gpu", "b9000"), "give one of h200, h100"),
        (("--tokens", "100X"), "--tokens 100X: give a number of tokens such as 100B"),
        (("--gpu", "cpu", "--nodes", 4), "--nodes 4 goes with GPUs alone"),
        (("--tokens", "1e99"), "--tokens 1e99"),
        (("--gpus", 0), "--gpus 0: give the GPUs of one node, 1 to 8"),
        (("--gpus", 9), "--gpus 9: give the GPUs of one node, 1 to 8"),
        (("--nodes", 0), "--nodes 0: give 1 or more"),
        (("--price", -1), "--price -1.0"),
        (("--preset", "shakespeare_char"), "takes its vocabulary from its data: give model.vocab_size=N"),
        (("--gpus", 6), "does not divide among 6 GPUs"),
        (("parallel.tensor_parallel_size=8",), "does not divide among 8 tensor-parallel ranks"),
        (("--gpus", 4, "--preset", "megaslm_1.2b", "parallel.tensor_parallel_size=8"), "divide its 4 GPUs"),
        (("--json", "not/there/x.json"), "a folder that is there"),
    ],
)
def test_mistakes_get_one_message(run_tool, arguments, says):
    given = arguments if "--preset" in arguments else ("--preset", "megaslm_125m", *arguments)
    assert says in run_tool("plan.py", *given).message()
