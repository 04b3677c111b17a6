"""Real signals to real commands: each run saves, says so, and the same command continues it to the same numbers."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from megaslm.checkpoint import open_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megaslm"
STEPS, SEEN = 80, 20
KEYS = ("step", "loss", "grad_norm", "lr")


def stop_when_seen(process: subprocess.Popen, stop) -> tuple[int, str, str]:
    """Read what the run prints, call stop(out) once step SEEN is there, and wait. (stopped step, out, err)"""
    out, err = [], []
    reader = threading.Thread(target=lambda: err.extend(process.stderr))
    reader.start()
    for line in process.stdout:
        out.append(line)
        if line.startswith(f"step {SEEN:>2}/{STEPS}"):
            stop("".join(out))
    process.wait(timeout=60)
    reader.join()
    text = "".join(out)
    found = re.search(rf"stopped by SIG\w+ at step (\d+) of {STEPS}; the same command continues", text)
    assert found, text + "".join(err)
    assert SEEN <= int(found[1]) < STEPS
    # deepspeed's front end has a traceback of its own for Ctrl-C.
    assert str(PACKAGE) not in "".join(err), "a traceback of ours"
    return int(found[1]), text, "".join(err)


def terminate_the_printed_pid(out: str) -> None:
    os.kill(int(re.search(r"to stop +kill -TERM (\d+)", out)[1]), signal.SIGTERM)


def numbers(metrics, folder: Path) -> list[list[float]]:
    return [[record[key] for key in KEYS] for record in metrics(folder)]


@pytest.fixture(scope="module")
def arguments(preset):
    return ["--preset", preset, f"train.max_steps={STEPS}", "--run_dir"]


@pytest.fixture(scope="module")
def two_ranks(arguments, start, pretrain_in_turn, tmp_path_factory):
    """Folders of the same run on two ranks (ZeRO 2): not stopped; under `deepspeed` terminated, and interrupted."""
    base = tmp_path_factory.mktemp("stopping")
    whole, terminated, interrupted = (base / name for name in ("whole", "terminated", "interrupted"))
    command = ["--ds_config", ROOT / "ds_configs" / "zero2.json", *arguments]

    process = start(*command, terminated, ranks=2)
    stops = {terminated: stop_when_seen(process, terminate_the_printed_pid)}
    assert process.returncode == 0

    process = start(*command, interrupted, ranks=2)
    # Ctrl-C reaches the whole process group: the front end, the launcher and the ranks.
    stops[interrupted] = stop_when_seen(process, lambda _: os.killpg(process.pid, signal.SIGINT))

    folders = (terminated, interrupted, whole)
    pretrain_in_turn([{"arguments": [*command, folder]} for folder in folders], 2)
    return whole, stops


@pytest.mark.parametrize("index", [0, 1], ids=["SIGTERM to the printed pid", "Ctrl-C"])
def test_two_ranks_stopped_by_a_signal_continue_bit_for_bit(two_ranks, metrics, index):
    whole, stops = two_ranks
    folder, (step, out, _) = list(stops.items())[index]
    assert out.count("saving after this step, then leaving") == 1
    assert f"saved {folder}/checkpoints/step_{step:08d}" in out
    assert numbers(metrics, folder) == numbers(metrics, whole)
    assert len(numbers(metrics, folder)) == STEPS


def test_one_rank_without_a_launcher_continues_bit_for_bit(arguments, start, command, metrics, tmp_path):
    """bf16 under ZeRO 1, the default engine config."""
    bf16 = [*arguments, tmp_path / "cut", "train.precision=bf16"]
    process = start(*bf16)
    step, out, err = stop_when_seen(process, terminate_the_printed_pid)
    assert process.returncode == 0 and err == ""
    assert "SIGTERM: saving after this step, then leaving" in out
    again = command(*bf16)
    assert again.code == 0, again.err
    assert f"continuing from {tmp_path}/cut/checkpoints/step_{step:08d} at step {step}" in again.out
    assert command(*arguments, tmp_path / "whole", "train.precision=bf16").code == 0
    assert numbers(metrics, tmp_path / "cut") == numbers(metrics, tmp_path / "whole")


def test_a_run_in_the_background_outlives_its_shell(arguments, environment, tmp_path):
    """nohup, then the terminal is closed: no launcher is gone, and nothing is stopped."""
    command = [sys.executable, ROOT / "launch" / "pretrain.py", *arguments, tmp_path / "run"]
    line = " ".join(f"'{part}'" for part in command)
    # The shell ends as soon as the run has begun to step; the run keeps the pipe until its own end.
    seen = f"grep -q '\"step\": 3,' '{tmp_path}/run/metrics.jsonl' 2>/dev/null"
    wait = f"while kill -0 $! && ! {seen}; do sleep 0.02; done"
    out = subprocess.run(["sh", "-c", f"{line} & {wait}"], env=environment, capture_output=True, text=True, timeout=120)
    assert f"{STEPS} of {STEPS} (end of the run)" in out.stdout


def find(process: subprocess.Popen, part: str) -> int:
    """Process id of the front end (what was started) or of the launcher under it."""
    if part == "front end":
        return process.pid
    below = psutil.Process(process.pid).children(recursive=True)
    (pid,) = [one.pid for one in below if "deepspeed.launcher.launch" in one.cmdline()]
    return pid


# Every case is a start of `deepspeed`, 15 s of a core: one for each way in which the ranks can come to hear of it. A
# SIGINT is none of its own: the launcher has one handler for both, and the front end, on one machine, ends by either.
# Signals to one rank alone are in the test of the printed pid above, and in tests/training/test_resume.py.
@pytest.mark.parametrize(
    ("part", "number"),
    [
        ("front end", signal.SIGTERM),  # ends it alone, and leaves its launcher and the ranks to nobody
        ("launcher", signal.SIGTERM),  # which it passes on to the ranks, before it kills them
        ("launcher", signal.SIGKILL),  # of which they hear nothing: they see that it is gone
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_whoever_is_told_to_stop_all_ranks_save_and_leave(arguments, start, tmp_path, part, number):
    """Under `deepspeed`: one checkpoint of one step by both ranks, and no process of the run is left."""
    process = start(*arguments, tmp_path / "run", "train.max_steps=5000", ranks=2)
    out, family = [], []
    for line in process.stdout:  # until every rank has closed its end
        out.append(line)
        if line.startswith(f"step {SEEN:>4}/5000"):
            family = psutil.Process(process.pid).children(recursive=True)
            os.kill(find(process, part), number)
    gone, left = psutil.wait_procs(family, timeout=40)
    assert left == [] and len(gone) >= 3, "a launcher and two ranks"
    text = "".join(out)
    stopped = re.search(r"stopped by [\w ]+ at step (\d+) of 5000; the same command continues", text)
    assert stopped, text + process.stderr.read()
    step = int(stopped[1])
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert open_checkpoint(checkpoint).step == step >= SEEN
