"""What a person reads: the header, one line per logging interval, the summary table and the curves."""

import math
from pathlib import Path

from megaslm.training.metrics import read_metrics


def format_count(number: float) -> str:
    """1234567 -> 1.23M."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def format_bytes(number: float) -> str:
    """Binary units: 1.50 GiB."""
    for limit, suffix in ((2**30, "GiB"), (2**20, "MiB")):
        if number >= limit:
            return f"{number / limit:.2f} {suffix}"
    return f"{number / 2**10:.0f} KiB"


def format_duration(seconds: float) -> str:
    """3:07, 1:02:33 or 4d 01:00."""
    minutes, second = divmod(int(round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


def format_table(title: str, rows: list[tuple[str, str]]) -> str:
    """Two aligned columns under a title."""
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def train_line(record: dict, total_steps: int, eta_seconds: float | None) -> str:
    """The terminal's line for one interval."""
    width = len(str(total_steps))
    parts = [
        f"step {record['step']:>{width}}/{total_steps}",
        f"loss {record['loss']:.4f}",
        f"grad norm {record['grad_norm']:.3f}",
        f"lr {record['lr']:.2e}",
        f"{record['tokens_per_s']:,.0f} tokens/s",
        f"{record['tflops']:.3g} TFLOP/s",
    ]
    if record.get("mfu") is not None:
        parts.append(f"MFU {100 * record['mfu']:.1f}%")
    parts.append(f"mem {format_bytes(record['memory_bytes'])}")
    if record.get("loss_scale") is not None:
        parts.append(f"loss scale {record['loss_scale']:.0f}")
    if record.get("skipped_steps"):
        parts.append(f"skipped {record['skipped_steps']}")
    if eta_seconds is not None:
        parts.append(f"ETA {format_duration(eta_seconds)}")
    return " | ".join(parts)


def eval_line(record: dict) -> str:
    """The terminal's line for one evaluation."""
    bits = f" | {record['bits_per_byte']:.4f} bits/byte" if record.get("bits_per_byte") is not None else ""
    return (
        f"eval {record['step']}: loss {record['loss']:.4f} | perplexity {record['perplexity']:,.2f}{bits} "
        f"| {record['targets']:,} targets in {record['seconds']:.1f} s"
    )


def write_curves(run_dir: Path) -> Path | None:
    """Draw loss, learning rate, gradient norm and tokens/s from metrics.jsonl into curves.png."""
    records = read_metrics(run_dir / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    evals = [r for r in records if r["kind"] == "eval"]
    if not train:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    steps = [r["step"] for r in train]
    panels = (("loss", "loss (nats)"), ("lr", "learning rate"), ("grad_norm", "gradient norm"))
    for axis, (key, label) in zip(axes.flat, (*panels, ("tokens_per_s", "tokens/s")), strict=True):
        values = [r[key] if math.isfinite(r[key]) else math.nan for r in train]
        axis.plot(steps, values, linewidth=1.2, label="train")
        if key == "loss" and evals:
            axis.plot([r["step"] for r in evals], [r["loss"] for r in evals], "o-", label="validation")
            axis.legend()
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    figure.suptitle(run_dir.name)
    path = run_dir / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
