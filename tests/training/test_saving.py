"""Saves beside the training, what they hold, and which of them stay. One rank, in this process."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from megaslm.checkpoint import HostBuffers, Snapshot, list_checkpoints, open_checkpoint
from megaslm.config import load_run_config
from megaslm.data import TrainingData
from megaslm.errors import UserError
from megaslm.training import loop
from megaslm.training.engine import TrainingEngine

PATIENCE = 30  # seconds, far more than two steps of a tiny model take


class Clock:
    """Counts the steps of the run, and lets a thread wait for them."""

    def __init__(self, monkeypatch):
        self.steps, self.advanced = 0, threading.Condition()
        train_step = TrainingEngine.train_step

        def counted(*arguments):
            result = train_step(*arguments)
            with self.advanced:
                self.steps += 1
                self.advanced.notify_all()
            return result

        monkeypatch.setattr(TrainingEngine, "train_step", counted)

    def wait_for(self, step: int) -> bool:
        with self.advanced:
            return self.advanced.wait_for(lambda: self.steps >= step, PATIENCE)


@pytest.fixture
def steps_of(preset, tmp_path):
    """steps_of(name) -> the steps whose checkpoints a run folder holds."""

    def steps(name: str = "run") -> list[int]:
        return [int(path.name.removeprefix("step_")) for path in list_checkpoints(tmp_path / name / "checkpoints")]

    return steps


@pytest.fixture
def run(command, preset, tmp_path):
    """run(override, ..., name="run") -> Finished, which must have gone well."""

    def run(*overrides, name: str = "run"):
        finished = command("--preset", preset, "--run_dir", tmp_path / name, *overrides)
        assert finished.code == 0, finished.out + finished.err
        return finished

    return run


def state(path: Path) -> dict[tuple[str, str], torch.Tensor]:
    checkpoint = open_checkpoint(path)
    kinds = ("weights", "exp_avg", "exp_avg_sq")
    return {(kind, name): checkpoint.read(name, kind) for kind in kinds for name in checkpoint.shapes}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_training_goes_on_beside_a_save_that_holds_its_own_step(run, steps_of, monkeypatch, tmp_path, stage):
    """Each write begins when two more steps are made: had the run waited for it, or it for the run, this would fail."""
    engine = ["--ds_config", Path(__file__).resolve().parents[2] / "ds_configs" / f"zero{stage}.json"]
    options = [*engine, "train.max_steps=12", "checkpoint.interval=4", "checkpoint.keep_last=9"]
    run(*options, "checkpoint.background=false", name="at once")

    clock, write, met = Clock(monkeypatch), Snapshot.write, []

    def late(snapshot):
        step = snapshot.manifest["step"]
        if step < 12:
            met.append(clock.wait_for(step + 2))
        return write(snapshot)

    monkeypatch.setattr(Snapshot, "write", late)
    finished = run(*options)
    assert met == [True, True]
    assert "training waited" in finished.out
    assert steps_of() == steps_of("at once") == [4, 8, 12]
    for path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        expected, found = state(tmp_path / "at once" / "checkpoints" / path.name), state(path)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert open_checkpoint(path).global_state["progress"]["step"] == open_checkpoint(path).step


def test_the_next_save_waits_for_the_last_one(run, steps_of, monkeypatch):
    running, most, write = [], [], Snapshot.write

    def slow(snapshot):
        running.append(snapshot)
        most.append(len(running))
        time.sleep(0.1)
        path = write(snapshot)
        running.remove(snapshot)
        return path

    monkeypatch.setattr(Snapshot, "write", slow)
    run("train.max_steps=6", "checkpoint.interval=1", "checkpoint.keep_last=9")
    assert most == [1] * 6 and steps_of() == [1, 2, 3, 4, 5, 6]


def test_a_rank_without_room_for_the_copy_saves_while_training_waits(run, steps_of, monkeypatch):
    def no_room(*_):
        raise MemoryError

    monkeypatch.setattr(HostBuffers, "copy", no_room)
    out = run("train.max_steps=6", "checkpoint.interval=3").out
    assert "warning: rank 0 could not copy its state to host memory (MemoryError); training waits" in out
    assert steps_of() == [3, 6] and "training waited" not in out


def test_a_fault_of_ours_in_the_background_ends_the_run(command, preset, monkeypatch, tmp_path):
    """Not a disk: nobody could mend it, and nothing more would ever be saved."""

    def broken(snapshot):
        raise ZeroDivisionError("a fault in the writer")

    monkeypatch.setattr(Snapshot, "write", broken)
    with pytest.raises(ZeroDivisionError, match="a fault in the writer"):
        command("--preset", preset, "--run_dir", tmp_path / "run", "checkpoint.interval=2")


def test_a_run_that_fails_lets_the_save_under_way_end(command, preset, steps_of, monkeypatch, tmp_path):
    clock, write = Clock(monkeypatch), Snapshot.write
    failed = threading.Event()

    def late(snapshot):
        assert failed.wait(PATIENCE)
        return write(snapshot)

    def fail_at_6(*arguments):
        if clock.steps == 6:
            failed.set()
            raise UserError("a token that is none")
        return train_step(*arguments)

    train_step = TrainingEngine.train_step
    monkeypatch.setattr(TrainingEngine, "train_step", fail_at_6)
    monkeypatch.setattr(Snapshot, "write", late)
    message = command("--preset", preset, "--run_dir", tmp_path / "run", "checkpoint.interval=4").message()
    assert "a token that is none" in message
    assert steps_of() == [4]


def test_a_run_that_was_killed_before_its_summary_gets_it(command, run, preset, monkeypatch, tmp_path):
    def killed(*_):
        raise KeyboardInterrupt

    whole = ["train.max_steps=4", "logging.interval=2"]
    run(*whole, name="whole")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "conclude", killed)
        assert command("--preset", preset, "--run_dir", tmp_path / "run", *whole).code == 130
    assert not (tmp_path / "run" / "summary.json").exists()
    assert "is finished: step 4 of 4" in run(*whole).out
    late, expected = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "whole"))
    measured = ("seconds", "tokens_per_s", "memory_bytes")
    assert late.keys() == expected.keys()
    assert {k: v for k, v in late.items() if k not in measured} == {
        k: v for k, v in expected.items() if k not in measured
    }
    assert "parameters" not in run(*whole).out, "once is enough"


def test_retention_of_a_run(run, steps_of, metrics, tmp_path):
    finished = run(
        *("checkpoint.interval=2", "checkpoint.keep_last=3", "checkpoint.keep_every=6"),
        *("checkpoint.rolling_names=true", "eval.interval=5"),
    )
    folder = tmp_path / "run" / "checkpoints"
    manifests = {step: open_checkpoint(folder / f"step_{step:08d}").manifest for step in steps_of()}
    evaluations = {record["step"]: record["loss"] for record in metrics(tmp_path / "run", "eval")}
    best = min(evaluations, key=evaluations.get)
    assert set(steps_of()) == {6, 12, 18} | {16, 18, 20} | {best}
    assert manifests[best]["marks"]["validation_loss"] == evaluations[best]
    links = {link.name: open_checkpoint(link).step for link in folder.glob("lm_*")}
    assert links == {"lm_current": 20, "lm_prev": 18, "lm_prev2": 16}
    assert finished.out.count("step_00000020 (") == 1, "the last step is evaluated, the best, and saved once"


def test_the_end_of_each_epoch_is_kept(run, steps_of, corpus, tmp_path):
    """An epoch of some 30 samples, which the batch of 8 does not divide: a step completes one on its way. The first
    samples were those of another run."""
    length, before = 1024, 20
    finished = run(
        *(f"data.seq_length={length}", f"model.context_length={length}", "model.num_layers=1", "train.max_steps=14"),
        *("checkpoint.every_epoch=true", "checkpoint.keep_last=1", f"data.first_sample={before}"),
    )
    per_epoch = TrainingData([(corpus.prefix, 1.0)], length, seed=0, split="95,5").samples_per_epoch
    ends = {-((before - per_epoch * epoch) // 8): epoch for epoch in range(1, (before + 14 * 8) // per_epoch + 1)}
    assert len(ends) >= 2 and per_epoch % 8 and 14 not in ends
    folder = tmp_path / "run" / "checkpoints"
    marks = {step: open_checkpoint(folder / f"step_{step:08d}").manifest["marks"]["epoch"] for step in steps_of()}
    assert marks == {**ends, 14: None}, finished.out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["checkpoint.interval=100", "checkpoint.keep_every=250"], "keep_every=250 is not a multiple of"),
        (["checkpoint.interval=0", "checkpoint.keep_every=250"], "keep_every=250 is not a multiple of"),
        (["checkpoint.rolling_names=true", "checkpoint.keep_last=2"], "set it to 3 or more"),
    ],
)
def test_policies_that_contradict_themselves_are_refused(preset, override, message):
    with pytest.raises(UserError, match=message):
        load_run_config(preset, override)
