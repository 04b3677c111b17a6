"""Where a run's numbers go: the terminal, metrics.jsonl, TensorBoard and Weights & Biases. Used by rank 0 alone.

Definitions (the only place that has them):
- loss: mean over the unmasked target tokens of the logging interval (or of all validation sets, or of one), nats
- tokens_per_s: global tokens consumed over the wall time of the interval, evaluation and checkpoints taken off
- tflops: model FLOPs per token (full attention over the window, also where documents are kept apart) x tokens/s per
  device / 1e12; tflops_causal: with causal attention
- mfu: tflops over the dense bf16 peak of the device; absent where that is not known
- grad_norm: global L2 before clipping, of the interval's last step
- memory_bytes: peak allocated on a GPU, peak resident set on a CPU (rank 0)
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megaslm.config import LoggingConfig, RunConfig
from megaslm.errors import UserError


class Stopwatch:
    """Wall time that leaves out what runs inside `with watch.paused():`."""

    def __init__(self, device: torch.device):
        self._device = device
        self._started, self._pause = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def paused(self):
        # What the device still has to do belongs to the time before.
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        entered = time.perf_counter()
        try:
            yield
        finally:
            self._pause += time.perf_counter() - entered

    def restart(self) -> float:
        """Seconds since the last restart, pauses taken off; starts anew."""
        now = time.perf_counter()
        seconds = now - self._started - self._pause
        self._started, self._pause = now, 0.0
        return seconds


class MetricsLog:
    """Writes one record a call to every place asked for. Continuing a run cuts back what lies after its step.

    without_evaluation: cut back the evaluation of that step too.

    A disk that is full costs the record, with a warning, and not the run: the next checkpoint says what to do.
    """

    def __init__(
        self,
        run_dir: Path,
        run: RunConfig,
        resume_step: int,
        say: Callable[[str], None],
        without_evaluation: bool = False,
    ):
        self._path, self._say, self._warned = run_dir / "metrics.jsonl", say, False
        try:
            _cut_back(self._path, resume_step, without_evaluation)
            self._file = self._path.open("a")
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}; choose another --run_dir") from error
        config = run.logging
        self._tensorboard = _open_tensorboard(run_dir, resume_step) if config.tensorboard else None
        self._wandb = _open_wandb(run_dir, config, run)

    def write(self, record: dict) -> None:
        """Append `record` (kind, step and numbers); what is None is left out, what is not finite becomes null."""
        record = _without_none(record)
        scalars = dict(_scalars(record["kind"], {key: record[key] for key in record if key not in ("kind", "step")}))
        with self._surviving():
            self._file.write(json.dumps(_finite(record)) + "\n")
            self._file.flush()
            if self._tensorboard is not None:
                for name, value in scalars.items():
                    self._tensorboard.add_scalar(name, value, record["step"])
            if self._wandb is not None:
                self._wandb.log({**scalars, "step": record["step"]})

    def write_text(self, step: int, text: str) -> None:
        """A generated sample: to TensorBoard and Weights & Biases."""
        with self._surviving():
            if self._tensorboard is not None:
                self._tensorboard.add_text("sample", text, step)
            if self._wandb is not None:
                self._wandb.log({"sample": text, "step": step})

    def flush(self) -> None:
        """Hand everything over to the system: what a checkpoint has behind it must outlive a kill after it."""
        with self._surviving():
            if self._tensorboard is not None:  # which else waits for up to two minutes
                self._tensorboard.flush()

    def close(self) -> None:
        with self._surviving():
            self._file.close()
        with self._surviving():
            if self._tensorboard is not None:
                self._tensorboard.close()
        with self._surviving():
            if self._wandb is not None:
                self._wandb.finish()

    @contextlib.contextmanager
    def _surviving(self):
        try:
            yield
        except OSError as error:
            if not self._warned:
                self._say(f"warning: metrics can't be written to {self._path.parent} ({error.strerror}); going on")
                self._warned = True


def _without_none(value: object) -> object:
    if not isinstance(value, dict):
        return value
    return {key: _without_none(item) for key, item in value.items() if item is not None}


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity (the norm of a skipped step): null, so that every reader can read the line."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(name: str, value: object) -> Iterator[tuple[str, object]]:
    """The numbers of a record by names such as eval/loss and eval/sets/wiki/loss."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _scalars(f"{name}/{key}", item)
    else:
        yield name, value


def read_metrics(path: Path) -> list[dict]:
    """Records of a metrics.jsonl, without a last line that a killed run left unfinished."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _cut_back(path: Path, step: int, without_evaluation: bool) -> None:
    """Drop the records after `step`, which the continued run writes again."""
    records = read_metrics(path)
    if without_evaluation:
        records = [record for record in records if (record["kind"], record["step"]) != ("eval", step)]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        for record in records:
            if record["step"] <= step:
                file.write(json.dumps(record) + "\n")
    os.replace(temporary, path)


def _open_tensorboard(run_dir: Path, resume_step: int):
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides what an interrupted run wrote past the checkpoint
    return SummaryWriter(run_dir / "tensorboard", purge_step=resume_step + 1)


def _open_wandb(run_dir: Path, config: LoggingConfig, run_config: RunConfig):
    if config.wandb == "off":
        return None
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"logging.wandb={config.wandb} needs the wandb package, which is not installed: pip install wandb"
        ) from None
    # One id per run folder, so that a continued run goes on in the same place.
    run_id = "".join(c if c.isalnum() else "-" for c in str(run_dir.resolve()))[-60:]
    try:
        run = wandb.init(
            project=config.wandb_project,
            name=run_config.name,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            mode=config.wandb,
            config=run_config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True),
        )
    except wandb.errors.Error as error:
        raise UserError(f"logging.wandb={config.wandb}: {error}; log in with `wandb login`, or use offline") from error
    run.define_metric("*", step_metric="step")
    return run
