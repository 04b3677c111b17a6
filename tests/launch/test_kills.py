"""SIGKILL at random moments, in saves too: nothing that was saved is lost, and the numbers are those of a run without.

The moments are drawn with fixed seeds, among the lines that the named functions execute (see kills_worker.py).
"""

import contextlib
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

import megaslm.checkpoint.folder as folder_module
from megaslm.checkpoint import DamagedCheckpoint, checkpoint_step, list_checkpoints, open_checkpoint

ROOT = Path(__file__).resolve().parents[2]
ZERO_2 = ROOT / "ds_configs" / "zero2.json"
WORKER = Path(__file__).with_name("kills_worker.py")
STEPS, STOP = 60, 30
LAST = -1  # see kills_worker.py

# Moments: {name: [(end of the file's path, start of the function's name), ...]}.
PLACES = {
    "train step": [("training/engine.py", "train_step")],
    "metrics": [("training/metrics.py", "write")],
    "host copy": [("checkpoint/deepspeed_state.py", "pieces"), ("checkpoint/buffers.py", "copy")],
    "tensor file": [("checkpoint/safetensors_file.py", "write_safetensors")],
    "fsync": [("megaslm/files.py", "flush_to_disk"), ("megaslm/files.py", "sync_folder")],
    "manifest": [("checkpoint/format.py", "write_manifest")],
    "renames": [("checkpoint/folder.py", "_publish")],
    "retention": [("checkpoint/folder.py", name) for name in ("_set_rolling_names", "_delete")],
    "deletion": [("shutil.py", "_rmtree")],
    "run folder": [("training/run_dir.py", "open_run_dir"), ("training/metrics.py", "_cut_back")],
}
SAVING = ("tensor file", "fsync", "manifest", "renames", "retention", "deletion")


@dataclass(frozen=True)
class Case:
    zero: int
    overrides: tuple[str, ...]
    interval: int  # of logging
    seed: int


ROLLING = ("checkpoint.keep_every=15", "checkpoint.keep_last=3", "checkpoint.rolling_names=true")
# Both evaluate at the step of the interruption. 7 does not divide it: the interruption cuts a logging interval in two.
CASES = {
    "bf16 zero1": Case(1, ("train.precision=bf16", "eval.interval=5", "checkpoint.keep_last=2"), 1, seed=2),
    "fp32 zero2, long intervals": Case(2, ("train.precision=fp32", "eval.interval=6", *ROLLING), 7, seed=8),
}


class Children:
    """Tasks in children of one worker, see kills_worker.py."""

    def __init__(self, environment: dict, folder: Path):
        self._output = folder / "output"
        self._worker = subprocess.Popen(
            [sys.executable, WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, task: str, *arguments, **options) -> tuple[int, str]:
        """(exit code, what was printed)"""
        request = {"task": task, "arguments": list(map(str, arguments)), "output": str(self._output), **options}
        self._worker.stdin.write(json.dumps(request) + "\n")
        self._worker.stdin.flush()
        return int(self._worker.stdout.readline()), self._output.read_text()

    def close(self) -> None:
        self._worker.stdin.close()
        self._worker.wait(timeout=30)


@pytest.fixture(scope="module")
def children(environment, tmp_path_factory):
    children = Children(environment, tmp_path_factory.mktemp("children"))
    yield children
    children.close()


@dataclass(frozen=True)
class Attempt:
    """One start of the run. kill: see kills_worker.Kill; None: a SIGTERM at step STOP."""

    name: str
    kill: dict | None
    damage: bool = False  # a byte of the newest checkpoint, before the start: its step will be saved again


def draw(events: dict[str, int], last_events: dict[str, int], seed: int) -> list[Attempt]:
    """At random: the order of the places, the line in each, and how far each process comes (one or two saves).

    No process makes more than some six steps, so that five come before step STOP, and the others after it.
    """
    rng = random.Random(seed)

    def at(name: str, save: int, **options) -> Attempt:
        lines = last_events[name] if save == LAST else events[name]
        kill = {"places": PLACES[name], "save": save, "event": rng.randint(1, lines)}
        return Attempt(name + ", last save" * (save == LAST), kill, **options)

    names = ["train step", "metrics", "host copy", "tensor file", "fsync", "manifest", "renames"]
    saves = rng.sample([1] * 4 + [2] * 3, 7)
    attempts = [at(name, save) for name, save in zip(names, saves, strict=True)]
    attempts.append(Attempt("time", {"seconds": rng.uniform(0, 0.3)}))
    rng.shuffle(attempts)
    attempts.insert(rng.randint(1, 4), at("run folder", 0))
    attempts.insert(5, Attempt("interruption", None))
    # From the second save on: the first one is then complete, and the one to damage has another before it.
    return [*attempts, at("retention", 2), at("renames", 1, damage=True), at(rng.choice(SAVING), LAST)]


def flip_a_byte(checkpoint: Path) -> None:
    path = checkpoint / "weights_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def unsound(folder: Path) -> list[Path]:
    """Of the checkpoints that can be seen."""
    found = []
    for path in list_checkpoints(folder):
        try:
            open_checkpoint(path)
        except DamagedCheckpoint:
            found.append(path)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def tensors(folder: Path) -> dict[str, dict]:
    """Hashes of the tensors of each checkpoint."""
    return {path.name: open_checkpoint(path).manifest["files"] for path in list_checkpoints(folder)}


def links(folder: Path) -> dict[str, Path]:
    """The names lm_current, lm_prev and lm_prev2, and what they mean."""
    return {link.name: link.readlink() for link in folder.glob("lm_*")}


@dataclass(frozen=True)
class Killed:
    case: Case
    whole: Path
    cut: Path
    log: str  # what killed each start, for a person


@pytest.fixture(scope="module", params=CASES)
def killed(request, children, preset, tmp_path_factory) -> Killed:
    """A run that was not interrupted, and one that all attempts of `draw` hit in turn."""
    case = CASES[request.param]
    base = tmp_path_factory.mktemp("kills")
    whole, cut = base / "whole", base / "cut"
    arguments = [
        *("--preset", preset, "--ds_config", ROOT / "ds_configs" / f"zero{case.zero}.json"),
        *(f"train.max_steps={STEPS}", "checkpoint.interval=3", f"logging.interval={case.interval}", *case.overrides),
        "--run_dir",
    ]
    code, out = children.run("pretrain", *arguments, whole, count=PLACES)
    assert code == 0, out
    counts = json.loads(out.splitlines()[-1])
    between = [{name: after[name] - before[name] for name in PLACES} for before, after in itertools.pairwise(counts)]
    events = {name: max(part[name] for part in between) for name in PLACES}
    events["run folder"] = 20  # which is not in the counts; at a start that continues

    log, damaged, content = [], None, {}
    for attempt in draw(events, between[-1], case.seed):
        there = [path for path in list_checkpoints(cut / "checkpoints") if path != damaged]
        if attempt.damage:
            damaged = there.pop()
            flip_a_byte(damaged)
            content = files(damaged)
        step = checkpoint_step(there[-1]) if there else 0
        if attempt.kill is None:
            code, out = children.run("pretrain", *arguments, cut, terminate_at=STOP - step)
            assert code == 0 and f"stopped by SIGTERM at step {STOP} of {STEPS}" in out, log + [out]
        else:
            code, out = children.run("pretrain", *arguments, cut, kill=attempt.kill)
            assert code == -signal.SIGKILL, f"{attempt} did not come, after {log}: {out}"
        log.append(f"{attempt.name} from step {step}: {out.splitlines()[-1]}")
        assert not there or f"continuing from {there[-1]} at step {step}" in out, (log, out)
        bad = unsound(cut / "checkpoints")
        assert all(files(path) == content for path in bad), f"{bad} can be seen, and are not complete: {log}"
        damaged = damaged if bad else None
    code, out = children.run("pretrain", *arguments, cut)
    assert code == 0, (log, out)
    return Killed(case, whole, cut, "\n".join(log))


def test_ten_kills_and_an_interruption_change_no_number(killed, numbers):
    assert killed.log.count("killed at") >= 10
    assert numbers(killed.cut) == numbers(killed.whole), killed.log


def test_every_interval_stands_once_in_the_metrics(killed, metrics):
    interval = killed.case.interval
    expected = sorted({*range(interval, STEPS + 1, interval), STEPS})
    assert [record["step"] for record in metrics(killed.cut)] == expected, killed.log


def test_the_checkpoints_are_those_of_a_run_without_kills(killed):
    whole, cut = tensors(killed.whole / "checkpoints"), tensors(killed.cut / "checkpoints")
    # A kill after the last save may leave some that it was about to delete.
    assert {name: cut.get(name) for name in whole} == whole, killed.log
    names = links(killed.cut / "checkpoints")
    assert names.keys() == links(killed.whole / "checkpoints").keys(), killed.log
    assert {str(path) for path in names.values()} <= cut.keys(), killed.log
    assert hidden(killed.cut / "checkpoints") == [], killed.log


# --- every moment of what is short ---------------------------------------------------------------------------------


# What changes the disk.
FOLDER = (
    "_prepare",
    "_publish",
    "apply_retention",
    "_set_rolling_names",
    "_delete",
    "_remove",
    "_undo",
    "_write_texts",
)
SAVE = [("checkpoint/folder.py", name) for name in FOLDER]
SAVE += [("checkpoint/format.py", "write_"), ("checkpoint/safetensors_file.py", "write_")]
SAVE += [("megaslm/files.py", "sync_folder"), ("shutil.py", "_rmtree")]
OPEN = [("training/run_dir.py", ""), ("training/metrics.py", "")]


def kills_at_every_line(children: Children, task: str, template: Path, folder: Path, arguments: list, places: list):
    """For each line that the task executes: a copy of `template` and a kill before the line. Yields where it was."""
    for event in itertools.count(1):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder, symlinks=True)
        code, out = children.run(task, folder, *arguments, kill={"places": places, "event": event})
        if code == 0:
            return
        assert code == -signal.SIGKILL, out
        yield out.splitlines()[-1]


def test_a_kill_at_any_line_of_a_save_costs_no_checkpoint(children, tmp_path):
    """Of a save that replaces the newest checkpoint, moves the names and deletes the oldest."""
    template, folder = tmp_path / "template", tmp_path / "checkpoints"
    for step in (3, 6, 9, 12):
        assert children.run("save", template, step, 4)[0] == 0
    moments = 0
    for where in kills_at_every_line(children, "save", template, folder, [12, 3], SAVE):
        moments += 1
        assert unsound(folder) == [] and {6, 9} <= {checkpoint_step(path) for path in list_checkpoints(folder)}, where
        replacing = (folder / ".step_00000012.old").exists()
        names = links(folder)
        assert len(names) == 3 and (replacing or all((folder / path).exists() for path in names.values())), where

        code, out = children.run("save", folder, 12, 3)
        assert code == 0 and "continuing from step 12" in out, (where, out)
        assert [checkpoint_step(path) for path in list_checkpoints(folder)] == [6, 9, 12], where
        assert unsound(folder) == [] and hidden(folder) == [], where
        expected = zip(("lm_current", "lm_prev", "lm_prev2"), (12, 9, 6), strict=True)
        assert links(folder) == {name: Path(f"step_{step:08d}") for name, step in expected}, where
    assert moments > 100


def test_a_kill_at_any_line_of_a_start_keeps_the_history_of_the_run(children, preset, tmp_path):
    template, folder = tmp_path / "template", tmp_path / "run"
    template.mkdir()
    assert children.run("open", template, preset, 0, "first")[0] == 0
    records = [{"kind": "train", "step": step, "loss": 1 / step} for step in range(1, 7)]
    (template / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind": "tr')
    moments = 0
    for where in kills_at_every_line(children, "open", template, folder, [preset, 3, "second"], OPEN):
        moments += 1
        code, out = children.run("open", folder, preset, 3, "third")
        assert code == 0, (where, out)
        for kept, command in ((folder / "before_step_00000003", "first"), (folder, "third")):
            assert json.loads((kept / "environment.json").read_text()) == {"command": command}, where
            assert json.loads((kept / "engine.json").read_text()) == {"of": command}, where
            assert json.loads((kept / "config.json").read_text())["name"] == "tiny", where
        assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == records[:3], where
    assert moments > 30


def test_a_kill_leaves_no_hole_in_tensorboard(children, preset, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = ["--preset", preset, "--run_dir", tmp_path, "train.max_steps=12", "checkpoint.interval=3"]
    run += ["logging.tensorboard=true", "eval.interval=4"]
    # The files sort by the second they were begun in.
    kill = {"places": PLACES["train step"], "save": 2, "event": 30}
    assert children.run("pretrain", *run, kill=kill)[0] == -signal.SIGKILL
    code, out = children.run("pretrain", *run)
    assert code == 0 and "continuing from" in out, out
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))
    assert [event.step for event in events.Scalars("eval/loss")] == [4, 8, 12]


# --- two ranks, real processes ---------------------------------------------------------------------------------------


# (launcher, who is killed); the launcher first: the ranks see it within a second, and are far from the end by then.
VICTIMS = [("deepspeed", "launcher"), ("torchrun", "a rank"), ("torchrun", "all")]


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Those with the run folder in their command: ranks, launcher and front end."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(run_dir) in process.cmdline():
                found.append(process)
    return found


def ranks_of(run_dir: Path) -> list[psutil.Process]:
    found = {}
    for process in reversed(processes_of(run_dir)):  # the first of a rank is itself, a later one its child
        with contextlib.suppress(psutil.Error, KeyError):
            found[int(process.environ()["RANK"])] = process
    return [found[rank] for rank in sorted(found)]


def find_victims(run_dir: Path, who: str, rng: random.Random) -> list[psutil.Process]:
    everybody, ranks = processes_of(run_dir), ranks_of(run_dir)
    assert len(ranks) == 2 < len(everybody)
    return {"a rank": [rng.choice(ranks)], "launcher": [ranks[0].parent()], "all": everybody}[who]


def run_and_kill(process: subprocess.Popen, run_dir: Path, who: str, rng: random.Random) -> str:
    """The launcher while the ranks start, others some steps later; returns what was printed until all were gone."""
    steps, lines = rng.randint(4, 10), []
    if who == "launcher":
        while sum("libtorch" in Path(f"/proc/{one.pid}/maps").read_text() for one in ranks_of(run_dir)) < 2:
            assert process.poll() is None
            time.sleep(0.05)
    else:
        for line in process.stdout:
            lines.append(line)
            steps -= line.startswith("step ")
            if steps == 0:
                break
        assert steps == 0, "".join(lines) + process.stderr.read()
    time.sleep(rng.uniform(0, 0.1))
    for victim in find_victims(run_dir, who, rng):
        with contextlib.suppress(psutil.NoSuchProcess):  # a front end goes with its launcher
            victim.kill()
    # The end of the output is the end of all who could print: those who were not killed leave by themselves.
    out, err = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(processes_of(run_dir), timeout=30)
    assert alive == []
    return "".join(lines) + out + err


@pytest.fixture(scope="module")
def two_ranks(preset) -> list:
    """bf16 under ZeRO 2. The batch makes a step last long enough for a kill in it."""
    config = ["train.precision=bf16", "train.global_batch_size=32", "checkpoint.interval=3", "eval.interval=20"]
    return ["--preset", preset, "--ds_config", ZERO_2, f"train.max_steps={STEPS}", *config, "--run_dir"]


@pytest.fixture(scope="module")
def two_ranks_whole(two_ranks, pretrain_in_turn, tmp_path_factory) -> Path:
    """Folder of that run, not interrupted."""
    folder = tmp_path_factory.mktemp("two_ranks") / "whole"
    pretrain_in_turn([{"arguments": [*two_ranks, folder]}], 2)
    return folder


def test_two_ranks_killed_in_part_or_together_continue_bit_for_bit(
    two_ranks, two_ranks_whole, start, pretrain_in_turn, numbers, tmp_path
):
    rng = random.Random(0)
    folder, log = tmp_path / "run", []
    for launcher, who in VICTIMS:
        there = list_checkpoints(folder / "checkpoints")
        out = run_and_kill(start(*two_ranks, folder, ranks=2, launcher=launcher), folder, who, rng)
        log.append(f"--- {who} of {launcher}\n{out}")
        assert not there or f"continuing from {there[-1]}" in out, "\n".join(log)
        assert ("stopped by launcher gone at step" in out) == (who == "launcher"), "\n".join(log)
        assert f"step {STEPS}/" not in out, "\n".join(log)
        assert unsound(folder / "checkpoints") == [], "\n".join(log)
    assert "continuing from" in pretrain_in_turn([{"arguments": [*two_ranks, folder]}], 2).out
    assert numbers(folder) == numbers(two_ranks_whole), "\n".join(log)
    whole, cut = (tensors(path / "checkpoints") for path in (two_ranks_whole, folder))
    assert cut[f"step_{STEPS:08d}"] == whole[f"step_{STEPS:08d}"]
    assert hidden(folder / "checkpoints") == []


# --- saves that fail --------------------------------------------------------------------------------------------------


def test_a_save_that_fails_on_the_way_is_said_and_changes_nothing_else(command, preset, numbers, monkeypatch, tmp_path):
    run = ["--preset", preset, "train.max_steps=12", "checkpoint.interval=3", "eval.interval=4", "--run_dir"]
    assert command(*run, tmp_path / "whole").code == 0
    write_safetensors = folder_module.write_safetensors

    def full(path, tensors):
        if path.parent.name.startswith(".step_00000006.") and path.name.startswith("exp_avg_sq"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_safetensors(path, tensors)

    monkeypatch.setattr(folder_module, "write_safetensors", full)
    finished = command(*run, tmp_path / "full")
    assert finished.code == 0, finished.err
    assert finished.out.count("warning: ") == 1
    (warning,) = [line for line in finished.out.splitlines() if line.startswith("warning: ")]
    assert warning.startswith("warning: could not save the checkpoint of step 6 in ")
    assert "No space left on device" in warning and "the last sound checkpoint is step_00000004" in warning
    assert warning.endswith(". The run goes on")
    steps = [checkpoint_step(path) for path in list_checkpoints(tmp_path / "full" / "checkpoints")]
    assert steps == [3, 4, 8, 9, 12]
    assert unsound(tmp_path / "full" / "checkpoints") == [] and hidden(tmp_path / "full" / "checkpoints") == []
    assert numbers(tmp_path / "full") == numbers(tmp_path / "whole")


def test_one_rank_of_two_that_cannot_save(two_ranks, two_ranks_whole, fork_ranks, numbers, tmp_path):
    """On the way the run goes on; at its end it says so, once, and leaves with an exit code."""
    steps = ["train.max_steps=9", f"schedule.horizon_steps={STEPS}"]  # the first nine of the other run
    worker = WORKER.with_name("full_disk_worker.py")
    finished = fork_ranks(worker, ["1,6,9", *two_ranks, tmp_path / "run", *steps], 2)
    message = finished.message()
    assert "could not save the checkpoint of step 9 in" in message and "on rank 1" in message
    assert "the last sound checkpoint is step_00000003" in message and "run the same command again" in message
    (warning,) = [line for line in finished.out.splitlines() if line.startswith("warning: could not save")]
    assert "the checkpoint of step 6 in" in warning and "on rank 1" in warning and warning.endswith("The run goes on")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step_00000003"]
    assert unsound(checkpoints) == [] and hidden(checkpoints) == []
    records = [record for record in numbers(tmp_path / "run") if record["kind"] == "train"]
    assert len(records) == 9 and records == numbers(two_ranks_whole)[:9]
