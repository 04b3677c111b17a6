"""tools/benchmark_throughput.py on a network so small that nothing of its figures is of interest but how they fit."""

import json
from pathlib import Path

import pytest

from megaslm.config import load_run_config

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark_throughput.py"
SHAPE = [
    "model.num_layers=1", "model.hidden_size=32", "model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=8",
    "model.ffn_hidden_size=64", "model.vocab_size=256", "data.seq_length=16", "train.global_batch_size=8",
    "train.precision=fp32",
]  # fmt: skip


def named(path: Path) -> Path:
    """A config file whose run is called as the file."""
    path.write_text(json.dumps(load_run_config("slm_tiny").model_dump(mode="json") | {"name": path.stem}))
    return path


@pytest.fixture(scope="module")
def benchmark(fork_ranks, tmp_path_factory):
    """(what the command printed, BASE.json, the folder) for two ranks, all peers, an engine config, and a preset that
    is a file, with a dot in its name."""
    folder = tmp_path_factory.mktemp("throughput")
    preset = named(folder / "tiny_1.2b.json")
    options = ["--preset", preset, "--world_size", 2, "--compare", "hf,ddp", "--steps", 3, "--rounds", 1]
    options += ["--ds_config", TOOL.parents[1] / "ds_configs" / "zero2.json", "--max_accumulation", 2]
    options += ["--micro_batch", 2, "--output", folder / "throughput_here.json", *SHAPE, "train.global_batch_size=16"]
    finished = fork_ranks(TOOL, options, None)
    assert finished.code == 0, finished.err
    return finished.out, (folder / "throughput_here.json").read_text(), folder


def test_figures_of_every_case_are_printed_and_written(benchmark):
    out, text, folder = benchmark
    assert str(folder) not in text and "throughput_here" in text
    written = json.loads(text)
    facts = written["environment"]
    assert written["format"] == 1 and facts["device"] and facts["threads_per_rank"] and "code_version" in facts
    assert written["options"]["preset"] == ["tiny_1.2b.json"] and written["left_out"] == []
    assert "steps of 8 x 16 tokens (a run's: of 16)" in out
    assert {result["preset"] for result in written["results"]} == {"tiny_1.2b"}
    assert [result["case"] for result in written["results"]] == ["megaslm", "hf", "ddp"]
    for name in ("megaslm", "transformers", "DDP"):
        assert name in out
    assert "NOT COMPARABLE" not in out
    assert (folder / "throughput_here.png").stat().st_size > 10_000
    assert "throughput_here.json" in (folder / "RESULTS.md").read_text()


def test_figures_of_a_case_agree_with_each_other(benchmark):
    tokens = 8 * 16
    for result in json.loads(benchmark[1])["results"]:
        assert (result["micro_batch_size"], result["accumulation_steps"], result["world_size"]) == (2, 2, 2)
        assert result["steps"] == 3 and result["rounds"] == 1
        assert result["zero_stage"] == (2 if result["case"] == "megaslm" else None)
        # The mean of three steps is at least a third of the median and twice the smaller ones, and at most anything.
        assert tokens / result["tokens_per_s"] >= result["ms_per_step"] / 1e3 * 2 / 3
        assert result["tokens_per_s_per_device"] == result["tokens_per_s"] / 2
        assert sum(result["phases_ms"].values()) == pytest.approx(result["ms_per_step"])
        assert list(result["phases_ms"]) == ["data", "forward", "backward", "optimizer", "rest"]
        assert all(milliseconds > 0 for milliseconds in result["phases_ms"].values())
        # Block: q and o 32 x 32, k and v 32 x 16, three of 32 x 64; head 256 x 32. Attention: 12 x 4 x 8 x 16.
        matmul, attention = 6 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 256 * 32), 12 * 4 * 8 * 16
        per_device = result["tokens_per_s"] / 2 / 1e12
        assert result["tflops"] == pytest.approx((matmul + attention) * per_device)
        assert result["tflops_causal"] == pytest.approx((matmul + attention / 2) * per_device)
        assert result["of_matmul_rate"] == pytest.approx(result["tflops"] / result["matmul_tflops"])
        assert result["mfu"] is None and result["memory_bytes"] > 50e6
        assert 4.5 < result["first_loss"] < 6.5 and result["last_loss"] != result["first_loss"]


def test_all_cases_begin_with_the_same_loss(benchmark):
    ours, *peers = json.loads(benchmark[1])["results"]
    for peer in peers:
        assert peer["first_loss"] == pytest.approx(ours["first_loss"], rel=1e-5)
        assert peer["last_loss"] == pytest.approx(ours["last_loss"], rel=1e-3)


def test_the_largest_micro_batch_is_searched(fork_ranks, tmp_path):
    """All fit here, of two networks, of each of which two ranks hold one together."""
    other = named(tmp_path / "other.json")
    options = ["--preset", "slm_tiny", other, "--micro_batch", "auto", "--steps", 1, "--rounds", 1, "--world_size", 2]
    options += [*SHAPE, "train.global_batch_size=2", "data.mask_documents=true", "parallel.tensor_parallel_size=2"]
    finished = fork_ranks(TOOL, options, None)
    assert finished.code == 0, finished.err
    for preset in ("slm_tiny", other):
        for size in (1, 2):
            assert f"{preset}, megaslm: micro-batch {size} fits" in finished.out
    assert finished.out.count(" 2 x 1 ") == 2 and finished.out.count("tensor parallel 2") == 2
    assert "\nslm_tiny: " in finished.out and "\nother: " in finished.out


def test_a_mistake_that_the_ranks_find_is_one_message(fork_ranks):
    options = ["--preset", "slm_tiny", "--world_size", 2, *SHAPE, "data.train=nowhere"]
    finished = fork_ranks(TOOL, options, None)
    assert "token file nowhere.bin does not exist" in finished.message()
    assert "round 1" not in finished.out


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--preset", "nosuch"), "nosuch"),
        (("--preset", "slm_tiny", "--steps", 0), "--steps 0: give 1 or more"),
        (("--preset", "slm_tiny", "--compare", "hf,megatron"), "--compare megatron: give hf, ddp"),
        (("--preset", "slm_tiny", "--compile", "maybe"), "--compile maybe: give on, off"),
        (("--preset", "slm_tiny", "--micro_batch", "many"), "--micro_batch many: give auto, or a number"),
        (("--preset", "slm_tiny", "train.global_batch_size=12", "--micro_batch", 5), "take one of 1, 2, 3, 4, 6, 12"),
        (("--preset", "slm_tiny", "--world_size", 3, "train.global_batch_size=8"), "does not divide among 3"),
        (("--preset", "slm_tiny", "--output", "not/there/x"), "a folder that is there"),
        (("--preset", "slm_tiny", "--compile", "on", "train.compile=false"), "this command has an option for it"),
        (("--preset", "slm_tiny", "train.micro_batch_size=2"), "this command has an option for it: --micro_batch"),
        (("--preset", "slm_tiny", "--compile", ","), "--compile ,: give on, off"),
        (("--preset", "slm_tiny", "--compare", ","), "--compare ,: give hf, ddp"),
        (("--preset", "slm_tiny", "--max_accumulation", 0), "--max_accumulation 0: give 1 or more"),
        (("--preset", "shakespeare_char"), "takes its vocabulary from its data: give model.vocab_size=N"),
        (("--preset", "slm_tiny", "--ds_config", "no.json"), "no.json cannot be read"),
        (("--preset", "slm_tiny", "parallel.tensor_parallel_size=2"), "does not divide --world_size 1"),
        (
            ("--preset", "slm_tiny", "--world_size", 2, "--compare", "ddp", "parallel.tensor_parallel_size=2"),
            "compare without tensor parallelism",
        ),
        (("--preset", "slm_tiny", "--compare", "hf", "model.parallel_residual=true"), "parallel_residual"),
        (("--preset", "model.num_layers=1"), "--preset: give the name of one"),
    ],
)
def test_mistakes(run_tool, arguments, says):
    assert says in run_tool("benchmark_throughput.py", *arguments).message()


def test_more_ranks_than_gpus(run_tool, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    message = run_tool("benchmark_throughput.py", "--preset", "slm_tiny", "--world_size", 4).message()
    assert "--world_size 4: this machine has 2 GPUs" in message
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # they are not to be used
    message = run_tool("benchmark_throughput.py", "--preset", "nosuch", "--world_size", 4).message()
    assert "nosuch" in message and "GPU" not in message
