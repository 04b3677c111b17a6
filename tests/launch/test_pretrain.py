"""launch/pretrain.py as people use it: what it prints, what it writes, when it stops."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megaslm.config import list_presets, load_run_config
from megaslm.evaluation import MeanLoss
from megaslm.training import loop
from megaslm.training.evaluation import Evaluation

ROOT = Path(__file__).resolve().parents[2]
TRAIN_KEYS = {"kind", "step", "samples", "tokens", "loss", "grad_norm", "lr", "tokens_per_s", "ms_per_step"}


# --- one run on two ranks, with everything that can be written -------------------------------------------------------


@pytest.fixture(scope="module")
def run(preset, corpus, pretrain, tmp_path_factory):
    """The finished command and its run folder."""
    folder = tmp_path_factory.mktemp("pretrain") / "run"
    shown = [
        "eval.interval=10",
        "eval.max_sequences=20",
        "eval.sample_tokens=20",
        "eval.sample_prompt=the cat",
        "checkpoint.interval=10",
    ]
    sets = [f'data.validation={{"seen": "{corpus.prefix}", "twice": ["{corpus.prefix}", "{corpus.prefix}"]}}']
    logs = ["logging.interval=5", "logging.tensorboard=true", "logging.wandb=offline"]
    engine = ["--ds_config", ROOT / "ds_configs" / "zero2.json"]
    # No answer can come from this address: whoever asks the network fails.
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    finished = pretrain("--preset", preset, *engine, "--run_dir", folder, *shown, *sets, *logs, ranks=2, env=nowhere)
    assert finished.code == 0, f"{finished.out}\n{finished.err}"
    return finished, folder


def test_each_line_is_printed_once(run):
    """By rank 0; the front end of deepspeed has its own lines, which begin with a date."""
    lines = [line for line in run[0].out.splitlines() if line.strip() and not re.match(r"\[\d{4}-", line)]
    samples = [i for i, line in enumerate(lines) if line == "sample:"]
    generated = {i + 1 for i in samples}
    repeated = {line for line in lines if lines.count(line) > 1}
    assert repeated - {"sample:"} - {lines[i] for i in generated} == set()
    assert [line.split(" |")[0] for line in lines if line.startswith("step ")] == [
        f"step {step:>2}/20" for step in (5, 10, 15, 20)
    ]
    assert len(samples) == 2


def test_nothing_else_talks(run):
    """Neither DeepSpeed nor torch, on any rank."""
    finished, _ = run
    foreign = [line for line in finished.err.splitlines() if not re.match(r"\[\d{4}-.*\[(launch|runner)\.py", line)]
    assert foreign == []
    of_launcher = [line for line in finished.out.splitlines() if re.match(r"\[\d{4}-", line)]
    assert [line for line in of_launcher if not re.search(r"\[(launch|runner)\.py:", line)] == []


def test_the_header_says_what_is_about_to_happen(run):
    out = run[0].out
    for row in ("parameters", "tokens", "FLOPs", "backends", "precision", "layout", "run folder", "to stop"):
        assert re.search(rf"^  {row} +\S", out, re.MULTILINE), row
    assert "ZeRO 2, micro-batch 2 x 2 accumulation x 2 data parallel" in out
    assert "kernels reference, gloo" in out


def test_the_line_of_an_interval_has_every_figure(run):
    line = next(line for line in run[0].out.splitlines() if line.startswith("step 20/20"))
    patterns = (r"loss \d", r"grad norm \d", r"lr \d", r"[\d,]+ tokens/s", r"TFLOP/s", r"mem [\d.]+ [MG]iB", r"ETA \d")
    assert [pattern for pattern in patterns if not re.search(pattern, line)] == []
    assert "MFU" not in line, "the peak of a processor is not known"


def test_metrics_are_one_object_a_line_with_the_promised_keys(run, metrics):
    records = metrics(run[1])
    assert [(r["step"], r["samples"], r["tokens"]) for r in records] == [
        (step, 8 * step, 8 * 32 * step) for step in (5, 10, 15, 20)
    ]
    for record in records:
        assert record.keys() >= TRAIN_KEYS | {"memory_bytes"}
        assert all(math.isfinite(record[key]) for key in record.keys() - {"kind"})
        assert record["tokens_per_s"] == pytest.approx(8 * 32 / record["ms_per_step"] * 1e3)
        assert 50e6 < record["memory_bytes"] < 20e9
    evals = metrics(run[1], "eval")
    assert [record["step"] for record in evals] == [10, 20]
    for record in evals:
        assert record.keys() >= {"kind", "step", "samples", "tokens", "loss", "perplexity", "bits_per_byte"}
        assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
        assert record["sets"]["seen"].keys() == {"loss", "perplexity", "bits_per_byte", "targets"}
        assert record["sets"]["seen"]["targets"] == record["sets"]["twice"]["targets"] == 20 * 32


def test_the_run_folder_explains_itself(run):
    _, folder = run
    config = load_run_config(str(folder / "config.json"))
    assert config.train.max_steps == 20 and config.model.vocab_size
    engine = json.loads((folder / "engine.json").read_text())
    assert engine["zero_optimization"]["stage"] == 2
    assert engine["train_batch_size"] == 8 and engine["gradient_accumulation_steps"] == 2
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["ranks"] == 2 and environment["precision"] == "fp32" and environment["kernels"] == "reference"
    assert environment["packages"].keys() >= {"megaslm", "torch", "deepspeed"}
    assert "--run_dir" in environment["command"] and environment["device"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == summary["total_steps"] == 20
    assert summary["validation_loss"] < summary["ln_vocabulary"]
    assert summary["validation_sets"].keys() == {"seen", "twice"}
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step_00000010", "step_00000020"}


def test_the_resolved_config_repeats_the_run(run, metrics, command, tmp_path):
    """On one rank here, hence to rounding."""
    assert command("--preset", run[1] / "config.json", "--run_dir", tmp_path, "logging.wandb=off").code == 0
    found, expected = metrics(tmp_path), metrics(run[1])
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], rel=1e-5)


def test_tensorboard_has_the_loss_and_the_samples(run, metrics):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run[1] / "tensorboard"))
    events.Reload()
    written = {event.step: event.value for event in events.Scalars("train/loss")}
    assert written == pytest.approx({record["step"]: record["loss"] for record in metrics(run[1])}, rel=1e-6)
    for name in ("eval/loss", "eval/sets/seen/loss", "eval/sets/twice/perplexity"):
        assert [event.step for event in events.Scalars(name)] == [10, 20]
    assert events.Tags()["tensors"] == ["sample/text_summary"]


def test_wandb_offline_leaves_a_folder_to_upload(run):
    (offline,) = (run[1] / "wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb"))


# --- one rank --------------------------------------------------------------------------------------------------------


def test_print_config_resolves_and_stops(pretrain, preset, tmp_path):
    finished = pretrain("--preset", preset, "--print_config", "train.max_steps=7", "--run_dir", tmp_path / "run")
    assert finished.code == 0 and finished.err == ""
    config = json.loads(finished.out)
    assert config["train"]["max_steps"] == 7
    assert config["model"]["head_dim"] == 8, "derived values are resolved"
    assert not (tmp_path / "run").exists()


def test_list_presets_and_help_config(command):
    listed = command("--list_presets")
    assert listed.code == 0
    assert [name for name in list_presets() if name not in listed.out] == []
    manual = command("--help_config")
    assert manual.code == 0
    assert "train.max_steps: a whole number >= 1, or null (default null)" in manual.out
    assert "Stop after this many optimizer steps" in manual.out


def test_a_dry_run_takes_one_step_and_writes_nothing(command, preset, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    finished = command("--preset", preset, "--dry_run")
    assert finished.code == 0, finished.err
    report = finished.out[finished.out.index("dry run: ") :]
    for row in ("loss", "grad norm", "memory", "FLOPs", "time"):
        assert re.search(rf"^  {row} +\S", report, re.MULTILINE), row
    assert "parameters" in finished.out and "tokens" in finished.out
    assert list(tmp_path.iterdir()) == []


def test_without_a_launcher_it_runs_as_one_rank_in_runs_name(pretrain, preset, metrics, environment, tmp_path):
    command = [sys.executable, ROOT / "launch" / "pretrain.py", "--preset", preset, "name=alone", "train.max_steps=3"]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    assert "x 1 data parallel" in finished.stdout
    assert len(metrics(tmp_path / "runs" / "alone")) == 3


@pytest.fixture
def from_text(tiny, corpus, write_json, tmp_path) -> Path:
    """A preset that starts at raw text."""
    data = {"input": [str(corpus.text)], "build_dir": str(tmp_path / "data"), "validation_fraction": 0.1}
    train = {**tiny["train"], "max_steps": 3}
    return write_json("raw.json", {**tiny, "data": data, "train": train, "tokenizer": {"vocab_size": 300}})


def test_raw_text_is_built_once_and_trained_on(command, from_text, metrics, tmp_path):
    first = command("--preset", from_text, "--run_dir", tmp_path / "first")
    assert first.code == 0, first.err
    assert "building" in first.out
    second = command("--preset", from_text, "--run_dir", tmp_path / "second")
    assert "building" not in second.out
    losses = [[record["loss"] for record in metrics(tmp_path / name)] for name in ("first", "second")]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_the_resolved_config_of_a_run_from_raw_text_repeats_it(command, from_text, metrics, tmp_path):
    """The text is too short for 300 tokens: the tokenizer has fewer than were asked for."""
    assert command("--preset", from_text, "--run_dir", tmp_path / "first").code == 0
    again = command("--preset", tmp_path / "first" / "config.json", "--run_dir", tmp_path / "second")
    assert again.code == 0, again.err
    losses = [[record["loss"] for record in metrics(tmp_path / name)] for name in ("first", "second")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("limit", "steps"),
    [
        ("train.max_tokens=1000", 4),  # of 256 tokens
        ("train.max_epochs=0.05", 7),  # 0.05 x 1,004 windows / 8
    ],
)
def test_it_stops_by_tokens_and_by_epochs(command, preset, metrics, tmp_path, limit, steps):
    finished = command("--preset", preset, "--run_dir", tmp_path, limit, "schedule.warmup_steps=0")
    assert finished.code == 0, finished.err
    assert [record["step"] for record in metrics(tmp_path)] == list(range(1, steps + 1))
    # The schedule's horizon is the end by tokens or epochs: without it the rate would still be near the peak.
    assert metrics(tmp_path)[-1]["lr"] < 0.006


def test_a_time_limit_saves_resumes_and_leaves_the_schedule_alone(command, preset, metrics, monkeypatch, tmp_path):
    arguments = ["--preset", preset, "train.max_steps=30", "--run_dir"]
    assert command(*arguments, tmp_path / "whole").code == 0
    limited = command(*arguments, tmp_path / "cut", "train.max_seconds=0.01")
    assert limited.code == 0, limited.err
    stop = re.search(r"stopped by time limit at step (\d+) of 30; the same command continues", limited.out)
    assert stop and 1 <= int(stop[1]) < 30
    assert command(*arguments, tmp_path / "cut").code == 0
    keys = ("step", "loss", "grad_norm", "lr")
    whole, cut = ([[r[key] for key in keys] for r in metrics(tmp_path / name)] for name in ("whole", "cut"))
    assert cut == whole


def test_the_best_checkpoint_and_the_last_ones_are_kept(command, preset, monkeypatch, tmp_path):
    losses = iter([3.0, 1.0, 2.0, 2.1, 2.2, 2.3])
    monkeypatch.setattr(loop, "evaluate", lambda *_: Evaluation(MeanLoss(next(losses), 1, None), {}, 0.0))
    many = ["train.max_steps=12", "eval.interval=2", "checkpoint.interval=2", "checkpoint.keep_last=2"]
    finished = command("--preset", preset, "--run_dir", tmp_path, *many)
    assert finished.code == 0, finished.err
    assert sorted(path.name[-2:] for path in (tmp_path / "checkpoints").iterdir()) == ["04", "10", "12"]
    assert re.search(r"best +1.0000 at step 4", finished.out)
