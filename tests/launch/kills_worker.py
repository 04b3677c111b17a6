"""Runs tasks in forked children, each of which may SIGKILL itself at a chosen moment.

    kills_worker.py        reads a request per line (JSON) and answers each with the exit code, -9 for a SIGKILL

A request: {"task": "pretrain", "save" or "open", "arguments": [...], "output": file for stdout and stderr,
"kill": see `Kill`, "count": {place: [[end of the file's path, start of a function's name], ...]},
"terminate_at": the step of this process that a SIGTERM meets}.

A moment is "before the n-th line that certain functions execute": it is the same one in every repetition. Everything is
imported once, since that takes longer than a tiny run, and nothing is computed before a fork, which threads of OpenMP
do not survive.
"""

import gc
import itertools
import json
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

# Imported by the first engine, else: a second per child.
import torch._inductor.compile_fx  # noqa: F401
import torch.utils.cpp_extension  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import megaslm.checkpoint.deepspeed_state  # noqa: F401
from megaslm.checkpoint import Piece, Retention, apply_retention, latest_sound, write_checkpoint
from megaslm.config import load_run_config
from megaslm.training import report
from megaslm.training.engine import TrainingEngine
from megaslm.training.metrics import MetricsLog
from megaslm.training.run_dir import open_run_dir
from megaslm.training.saving import Saving

PRETRAIN = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"
NOT_KILLED = 99  # exit code: the moment never came
LAST = -1
CLOCK_STEPS = 6  # a kill by the clock comes within so many steps
COUNT_FROM = 40  # the first step that is counted: enough saves come after it


class Places:
    """Counts the lines that functions execute: {name: [[end of a file's path, start of a function's name], ...]}."""

    def __init__(self, places: dict[str, list[list[str]]]):
        self._places = places
        self._names: dict[object, str | None] = {}
        self.lines = {name: itertools.count(1).__next__ for name in places}
        self.counts = dict.fromkeys(places, 0)

    def trace(self, frame, event, _):
        """For sys.settrace."""
        code = frame.f_code
        if code not in self._names:
            found = (
                name
                for name, functions in self._places.items()
                if any(code.co_filename.endswith(end) and code.co_name.startswith(start) for end, start in functions)
            )
            self._names[code] = next(found, None)
        return self.follow if self._names[code] is not None else None

    def follow(self, frame, event, _):
        if event in ("line", "return"):
            name = self._names[frame.f_code]
            self.counts[name] = self.lines[name]()
        return self.follow


class Kill(Places):
    """The end of this process, before the n-th line ("event") that "places" execute from a certain save on.

    save: the number of the save in this process; 0: from the start of the process; LAST: its last save.
    """

    def __init__(self, places: list[list[str]], event: int, save: int = 0):
        super().__init__({"": places})
        self._event, self._save = event, save
        self._armed = save == 0

    def follow(self, frame, event, _):
        if self._armed and event in ("line", "return") and self.lines[""]() == self._event:
            where = f"{frame.f_code.co_name}:{frame.f_lineno} ({event})"
            kill_myself(f"{where} in {threading.current_thread().name}")
        return self.follow

    def save_begins(self, number: int, last: bool) -> None:
        self._armed |= last if self._save == LAST else number >= self._save

    def missed(self, saves: int) -> bool:
        return LAST < self._save < saves - 3

    @property
    def from_the_start(self) -> bool:
        return self._save == 0


def kill_myself(where: str) -> None:
    os.write(2, f"killed at {where}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)


def trace(function: Callable | None) -> None:
    """In this thread and in those that it starts."""
    threading.settrace(function)
    sys.settrace(function)


class Watched:
    """One run of launch/pretrain.py with a kill, a SIGTERM or a count, told by steps and saves of this process."""

    def __init__(self, kill: dict | None, count: dict | None, terminate_at: int | None):
        self.steps, self.saves = 0, 0
        self.terminate_at = terminate_at
        self.seconds = kill.get("seconds") if kill else None
        self.kill = Kill(**kill) if kill and self.seconds is None else None
        self.places = Places(count) if count else None
        self.counts: list[dict[str, int]] = []  # up to each save, and to the end
        self._train_step, self._write = TrainingEngine.train_step, Saving._write

    def train_step(self, engine, *arguments):
        self.steps += 1
        # Not before: tracing makes a start, or a count of 60 steps, take twice as long.
        if self.tracer is not None and self.steps == (1 if self.kill is not None else COUNT_FROM):
            trace(self.tracer)
        if self.seconds is not None:
            if self.steps == 1:
                threading.Thread(target=self._kill_by_the_clock, daemon=True).start()
            elif self.steps > CLOCK_STEPS:
                kill_myself(f"step {CLOCK_STEPS} of this process")
        if self.kill is not None and self.kill.missed(self.saves):
            os._exit(NOT_KILLED)
        if self.steps == self.terminate_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return self._train_step(engine, *arguments)

    def write(self, saving, snapshot, waited, last=False):
        self.saves += 1
        if self.places is not None:
            self.counts.append(dict(self.places.counts))
        if self.kill is not None:
            self.kill.save_begins(self.saves, last)
        return self._write(saving, snapshot, waited, last)

    def _kill_by_the_clock(self) -> None:
        time.sleep(self.seconds)
        kill_myself("a time")

    def run(self, arguments: list[str]) -> None:
        TrainingEngine.train_step = lambda engine, *rest: self.train_step(engine, *rest)
        Saving._write = lambda saving, *rest: self.write(saving, *rest)
        report.write_curves = lambda run_dir: None  # takes longer than a tiny run
        source = self.kill or self.places
        self.tracer = source.trace if source is not None else None
        if self.kill is not None and self.kill.from_the_start:
            trace(self.tracer)
        sys.argv = [str(PRETRAIN), *arguments]
        try:
            runpy.run_path(str(PRETRAIN), run_name="__main__")
        finally:
            trace(None)
            if self.places is not None:
                print(json.dumps([*self.counts, self.places.counts]))


def save(folder: str, step: str, keep_last: str) -> None:
    """Continue, then save a tiny checkpoint, as a run does."""
    found = latest_sound(folder, report=print)
    print(f"continuing from step {found.step if found else 0}")
    kinds = ("weights", "exp_avg")
    pieces = {kind: [Piece.whole("a", torch.full((2, 3), float(step)))] for kind in kinds}
    optimizer = {"type": "adam", "moments": kinds[1:], "steps": {}, "weight_decay": {}, "loss_scaler": None}
    options = {
        "run_config": {},
        "global_state": {},
        "optimizer": optimizer,
        "tokenizer_files": {"tokenizer.json": "{}"},
    }
    write_checkpoint(folder, pieces, step=int(step), **options)
    apply_retention(folder, Retention(int(keep_last), rolling_names=True))


def open_run(folder: str, preset: str, step: str, command: str) -> None:
    """What a process writes into the run folder before its first step."""
    run = load_run_config(preset)
    open_run_dir(Path(folder), run, {"of": command}, {"command": command}, int(step))
    MetricsLog(Path(folder), run, int(step), print).close()


def work(request: dict) -> None:
    """In the child."""
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    task, arguments, kill = request["task"], request["arguments"], request.get("kill")
    if task == "pretrain":
        Watched(kill, request.get("count"), request.get("terminate_at")).run(arguments)
    else:
        trace(Kill(**kill).trace if kill else None)
        {"save": save, "open": open_run}[task](*arguments)
        trace(None)


def main() -> None:
    # Nobody need collect what all children share: DeepSpeed does so several times at a start, which takes a second.
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work(request)
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                # Not through the exit handlers: those are of the process that was forked.
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
