"""Where a run stands, and what is said and kept of it at its end."""

import json
import math
import statistics
from dataclasses import dataclass

from megaslm.errors import UserError
from megaslm.model import count_parameters
from megaslm.parallel import memory_used
from megaslm.reports import write_json
from megaslm.training import report
from megaslm.training.metrics import read_metrics
from megaslm.training.preparation import Plan


@dataclass
class Progress:
    """Where a run stands. Everything here goes into the checkpoint; samples, counted from data.first_sample on, is the
    whole state of the data."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    interval_loss: float = 0.0
    interval_targets: int = 0
    evaluation_due: bool = False  # a stop came before the evaluation of this step
    weights_from: dict | None = None  # of --resume weights: where the initial weights came from


def conclude(plan: Plan, progress: Progress, reason: str | None) -> None:
    """Say and write the summary, and draw the curves. On rank 0, from metrics.jsonl and `progress` alone.

    Args:
        reason: why the run stops before its end; None at the end.
    """
    run_dir, (train, evaluations) = plan.options.run_dir, _records(plan)
    last = evaluations[-1] if evaluations else {}
    summary = {
        "stopped_by": reason or "end of the run",
        "steps": progress.step,
        "total_steps": plan.steps,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "tokens_per_s": statistics.median(r["tokens_per_s"] for r in train) if train else None,
        "train_loss": train[-1]["loss"] if train else None,
        "validation_loss": last.get("loss"),
        "perplexity": last.get("perplexity"),
        "bits_per_byte": last.get("bits_per_byte"),
        "validation_sets": last.get("sets", {}),
        "best_validation_loss": progress.best_loss,
        "best_step": progress.best_step,
        "ln_vocabulary": math.log(plan.run.model.vocab_size),
        "skipped_steps": progress.skipped_steps,
        "parameters": count_parameters(plan.run.model),
        **memory_used(plan.ranks.device),
    }
    plan.say(report.summary_table(summary))
    try:
        write_json(run_dir / "summary.json", summary)
        if train:
            plan.say(f"curves: {report.write_curves(run_dir)}")
    except (OSError, UserError) as error:
        plan.say(f"warning: summary and curves could not be written: {error}")
    if reason is not None:
        plan.say(f"stopped by {reason} at step {progress.step} of {plan.steps}; the same command continues")


def conclude_late(plan: Plan, progress: Progress) -> None:
    """The same for a run that was killed between its last save and its summary. On rank 0."""
    try:
        summary = json.loads((plan.options.run_dir / "summary.json").read_text())
    except (OSError, json.JSONDecodeError):
        summary = {}
    if summary.get("steps") != progress.step:
        conclude(plan, progress, None)


def _records(plan: Plan) -> tuple[list[dict], list[dict]]:
    """Records of training and of evaluation."""
    records = read_metrics(plan.options.run_dir / "metrics.jsonl")
    return [r for r in records if r["kind"] == "train"], [r for r in records if r["kind"] == "eval"]
