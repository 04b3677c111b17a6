"""Where a run's numbers go: the terminal, metrics.jsonl, TensorBoard and Weights & Biases. Used by rank 0 alone.

Definitions (the only place that has them):
- loss: mean over the unmasked target tokens of the logging interval, nats
- tokens_per_s: global tokens consumed over the wall time of the interval, evaluation and checkpoints taken off
- tflops: model FLOPs per token (full attention) x tokens/s per device / 1e12; tflops_causal: with causal attention
- mfu: tflops over the dense bf16 peak of the device; absent where that is not known
- grad_norm: global L2 before clipping, of the interval's last step
- memory_bytes: peak allocated on a GPU, peak resident set on a CPU (rank 0)
"""

import json
import os
import time
from pathlib import Path

from megaslm.config import LoggingConfig
from megaslm.errors import UserError


class Stopwatch:
    """Wall time that leaves out what runs inside `with watch.paused():`."""

    def __init__(self):
        self._started = time.perf_counter()
        self._pause = 0.0

    def paused(self):
        return _Pause(self)

    def restart(self) -> float:
        """Seconds since the last restart, pauses taken off; starts anew."""
        now = time.perf_counter()
        seconds = now - self._started - self._pause
        self._started, self._pause = now, 0.0
        return seconds


class _Pause:
    def __init__(self, watch: Stopwatch):
        self._watch = watch

    def __enter__(self):
        self._entered = time.perf_counter()

    def __exit__(self, *_):
        self._watch._pause += time.perf_counter() - self._entered


class MetricsLog:
    """Writes one record a call to every place asked for. Continuing a run cuts back what lies after its step."""

    def __init__(self, run_dir: Path, config: LoggingConfig, run_name: str, resolved: dict, resume_step: int):
        self._path = run_dir / "metrics.jsonl"
        _cut_back(self._path, resume_step)
        self._file = self._path.open("a")
        self._tensorboard = _open_tensorboard(run_dir, resume_step) if config.tensorboard else None
        self._wandb = _open_wandb(run_dir, config, run_name, resolved)

    def write(self, record: dict) -> None:
        """Append `record` (kind, step and numbers; None values are left out)."""
        record = {key: value for key, value in record.items() if value is not None}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        scalars = {f"{record['kind']}/{key}": value for key, value in record.items() if key not in ("kind", "step")}
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log({**scalars, "step": record["step"]})

    def write_text(self, step: int, text: str) -> None:
        """A generated sample: to TensorBoard and Weights & Biases."""
        if self._tensorboard is not None:
            self._tensorboard.add_text("sample", text, step)
        if self._wandb is not None:
            self._wandb.log({"sample": text, "step": step})

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(quiet=True)


def read_metrics(path: Path) -> list[dict]:
    """Records of a metrics.jsonl, without a last line that a killed run left unfinished."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _cut_back(path: Path, step: int) -> None:
    """Drop the records after `step`, which the continued run writes again."""
    records = read_metrics(path)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        for record in records:
            if record["step"] <= step:
                file.write(json.dumps(record) + "\n")
    os.replace(temporary, path)


def _open_tensorboard(run_dir: Path, resume_step: int):
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides what an interrupted run wrote past the checkpoint
    return SummaryWriter(run_dir / "tensorboard", purge_step=resume_step + 1 if resume_step else None)


def _open_wandb(run_dir: Path, config: LoggingConfig, run_name: str, resolved: dict):
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
            name=run_name,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            mode=config.wandb,
            config=resolved,
            settings=wandb.Settings(silent=True),
        )
    except wandb.errors.Error as error:
        raise UserError(f"logging.wandb={config.wandb}: {error}; log in with `wandb login`, or use offline") from error
    run.define_metric("*", step_metric="step")
    return run
