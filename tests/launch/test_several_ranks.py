"""What one rank alone meets: all ranks end, one message says why."""

import json
import shutil
from pathlib import Path

import numpy as np
import psutil

PRETRAIN = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"


def test_an_id_over_the_vocabulary_in_one_ranks_samples(fork_ranks, preset, corpus, tmp_path):
    """Without a manifest, ids are checked batch by batch: the id may turn up on either rank."""
    tokens = np.fromfile(f"{corpus.prefix}.bin", np.uint16)
    tokens[::301] = 60_000  # some windows of every step have one, others have none
    tokens.tofile(tmp_path / "bad.bin")
    shutil.copy(f"{corpus.prefix}.idx", tmp_path / "bad.idx")
    run = ["--preset", preset, "--run_dir", tmp_path / "run", f"data.train={tmp_path / 'bad'}", "data.split=98,2"]
    finished = fork_ranks(PRETRAIN, [*run, "train.micro_batch_size=4", "eval.max_sequences=1"], 2)
    assert finished.code == 2
    assert "Traceback" not in finished.err
    assert "error: " in finished.err and "60000" in finished.err and "bad" in finished.err


def test_a_lost_rank_is_said_in_a_line(start, preset, tmp_path):
    process = start("--preset", preset, "--run_dir", tmp_path / "run", "train.max_steps=100000", ranks=2)
    _lines_until(process, "step ")
    for rank in psutil.Process(process.pid).children(recursive=True):
        if "--local_rank=1" in rank.cmdline():
            rank.kill()
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "lost its connection to another rank" in err, out + err
    assert "Traceback" not in err, err


def test_a_run_folder_in_use_is_refused(start, command, preset, tmp_path):
    first = start("--preset", preset, "--run_dir", tmp_path / "run", "train.max_steps=100000")
    _lines_until(first, "step ")
    message = command("--preset", preset, "--run_dir", tmp_path / "run").message()
    assert "in use by another run" in message and str(first.pid) in message
    first.terminate()
    out, err = first.communicate(timeout=60)
    assert first.returncode == 0, out + err
    assert "the same command continues" in out


def test_new_weights_of_a_blend_start_a_segment_and_other_data_is_refused(command, preset, corpus, tmp_path):
    for name in ("a", "b"):
        for ending in ("bin", "idx", "json"):
            shutil.copy(f"{corpus.prefix}.{ending}", tmp_path / f"{name}.{ending}")
    run = ["--preset", preset, "--run_dir", tmp_path / "run", "checkpoint.interval=4"]

    def blend(a, b):
        return "data.train=" + json.dumps(
            [{"prefix": str(tmp_path / "a"), "weight": a}, {"prefix": str(tmp_path / "b"), "weight": b}]
        )

    first = command(*run, blend(1.0, 1.0), "train.max_steps=4")
    assert first.code == 0 and "0.5000, 0.5000 of the samples" in first.out
    second = command(*run, blend(3.0, 1.0), "train.max_steps=8")
    assert second.code == 0 and "0.7500, 0.2500 of the samples" in second.out
    manifest = json.loads(Path(tmp_path, "run/checkpoints/step_00000008/manifest.json").read_text())
    segments = manifest["global_state"]["data"]["segments"]
    assert [segment["start_sample"] for segment in segments] == [0, 4 * 8]
    assert sum(segments[1]["delivered"]) == 4 * 8


def _lines_until(process, word: str) -> list[str]:
    lines = []
    for line in process.stdout:
        lines.append(line)
        if word in line:
            return lines
    raise AssertionError(f"{word!r} never came: {lines} {process.stderr.read()}")
