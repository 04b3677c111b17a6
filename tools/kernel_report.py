"""What benchmark_kernels.py makes of its figures: verdicts against the targets, lines of a table, a roofline."""

from collections.abc import Iterable
from pathlib import Path

TARGET_PERCENT = {
    **{op: {"forward": 90, "backward": 80} for op in ("rms_norm", "add_rms_norm", "rotary", "swiglu")},
    "qk_norm_rotary": {"forward": 80, "backward": 80},
}
"""Of the copy bandwidth, from TARGET_WIDTH up."""
TARGET_WIDTH = 1024
PRODUCTS_TARGET = 1.10  # linear_cross_entropy in times of its matrix products, at PRODUCTS_VOCAB
PRODUCTS_VOCAB = 50304
MEMORY_TARGET = 0.25  # of its peak, in that of eager torch
END_TO_END_TOKENS = 16384  # from here up the host's time counts against eager torch
COLOURS = {
    "triton": "#d62728", "torch": "#1f77b4", "compile": "#2ca02c", "liger": "#ff7f0e", "apex": "#9467bd",
    "reference": "#7f7f7f", "torch_fused": "#17becf", "products": "#000000",
}  # fmt: skip
MARKERS = "os^vDP*Xh"


def slower(row: dict, rival: dict, figure: str, allowed: float = 1.0) -> float | None:
    """By which fraction `row` is slower than `rival`, if it exceeds `allowed` times it by more than either's spread."""
    ours, theirs = row[figure], rival[figure]
    noise = max(row[f"{figure}_spread"], allowed * rival[f"{figure}_spread"])
    return ours / theirs - 1 if ours - allowed * theirs > noise else None


def verdict(row: dict, rivals: dict[str, dict]) -> dict:
    """Targets that a row of our kernels misses, and who else is faster.

    rivals: the rows of other implementations that were measured at the same case and direction, by name.
    """
    missed = []
    roof = {"ms": row["roof_ms"], "ms_spread": row["roof_ms_spread"]}
    target = TARGET_PERCENT.get(row["op"], {}).get(row["direction"])
    if target and row["shape"]["width"] >= TARGET_WIDTH and slower(row, roof, "ms", 100 / target):
        missed.append(f"{row['percent_of_roof']:.0f} % of copy, target {target} %")
    eager = rivals.get("torch")
    if eager is not None:
        if loss := slower(row, eager, "ms"):
            missed.append(f"{loss:.0%} slower than torch")
        if row["shape"]["tokens"] >= END_TO_END_TOKENS and (loss := slower(row, eager, "end_to_end_us")):
            missed.append(f"{loss:.0%} slower than torch end to end")
    if row["op"] == "qk_norm_rotary" and "compile" in rivals and (loss := slower(row, rivals["compile"], "ms")):
        missed.append(f"{loss:.0%} slower than compile")
    if row["op"] == "linear_cross_entropy" and row["shape"]["vocab"] == PRODUCTS_VOCAB:
        if loss := slower(row, roof, "ms", PRODUCTS_TARGET):
            missed.append(f"{1 + loss:.2f} x its products, target {PRODUCTS_TARGET:.2f}")
        if eager is not None and row["peak_mb"] is not None and row["peak_mb"] > MEMORY_TARGET * eager["peak_mb"]:
            missed.append(f"{row['peak_mb'] / eager['peak_mb']:.0%} of torch's memory, target {MEMORY_TARGET:.0%}")
    behind = {name: loss for name, rival in rivals.items() if name != "products" and (loss := slower(row, rival, "ms"))}
    return {"missed": missed, "behind": behind}


def judge(rows: list[dict]) -> None:
    """Add its verdict to every row of our kernels. rows: of one case."""
    for row in rows:
        if row["implementation"] == "triton" and row["status"] == "ok":
            rivals = {
                other["implementation"]: other
                for other in rows
                if other["direction"] == row["direction"] and other["status"] == "ok" and other is not row
            }
            row["verdict"] = verdict(row, rivals)


def verdict_text(found: dict) -> str:
    text = "MISSES: " + "; ".join(found["missed"]) if found["missed"] else "meets its targets"
    for name, loss in sorted(found["behind"].items(), key=lambda item: -item[1]):
        if not any(f"slower than {name}" in missed for missed in found["missed"]):
            text += f"; {loss:.0%} slower than {name}"
    return text


def shape_text(row: dict) -> str:
    names = {"tokens": "{:>6}", "width": "w{}", "vocab": "V{}", "head_size": "d{}", "ffn": "F{}"}
    return " ".join(pattern.format(row["shape"][key]) for key, pattern in names.items() if key in row["shape"])


HEADER = (
    f"{'op':<20} {'shape':<21} {'direction':<9} {'by':<11} {'ms':>8} {'+-':>6} {'rate':>12} {'roof':>6} "
    f"{'host us':>8} {'end-to-end us':>13} {'peak MB':>8}"
)


def line(row: dict) -> str:
    """A row of the table; the verdict, if any, ends it."""
    start = f"{row['op']:<20} {shape_text(row):<21} {row['direction']:<9} {row['implementation']:<11}"
    if row["status"] != "ok":
        return f"{start} {row['status']}"
    rate = f"{row['tflop_per_s']:.3g} TFLOP/s" if row["roof"] == "products" else f"{row['gb_per_s']:.4g} GB/s"
    text = f"{start} {row['ms']:>8.4f} {row['ms_spread']:>6.4f} {rate:>12} {row['percent_of_roof']:>5.0f}% "
    text += f"{_optional(row['host_us'], 8)} {row['end_to_end_us']:>13.0f} {_optional(row['peak_mb'], 8)}"
    return f"{text}  {verdict_text(row['verdict'])}" if "verdict" in row else text


def _optional(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.0f}"


def summary(rows: Iterable[dict]) -> list[str]:
    """Per op and direction of our kernels: the range of percentages, and how many shapes met the targets."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if "verdict" in row:
            groups.setdefault((row["op"], row["direction"]), []).append(row)
    lines = []
    for (op, direction), found in groups.items():
        percents = sorted(row["percent_of_roof"] for row in found)
        met = sum(not row["verdict"]["missed"] for row in found)
        lines.append(
            f"{op:<20} {direction:<9} {percents[0]:>4.0f} to {percents[-1]:.0f} % of {found[0]['roof']}; "
            f"targets met at {met} of {len(found)} shapes"
        )
    return lines


def draw_roofline(report: dict, path: Path) -> None:
    """Above: FLOP/s against FLOP per byte, under the roofs of the same run. Below: percent of the roof by op."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in report["rows"] if row["status"] == "ok"]
    if not rows:
        return
    copy, products = report["copy_gb_per_s"] * 1e9, report["products_tflop_per_s"] * 1e12
    figure, (roofline, strips) = plt.subplots(2, 1, figsize=(13, 13), layout="constrained")
    ops = list(dict.fromkeys(row["op"] for row in rows))
    names = [name for name in COLOURS if any(row["implementation"] == name for row in rows)]

    intensities = [row["flop"] / row["bytes"] for row in rows]
    low, high = min(intensities) / 2, max(2 * max(intensities), 4 * products / copy)
    ridge = products / copy
    roofline.plot([low, ridge, high], [low * copy, products, products], color="black", linewidth=1)
    roofline.annotate(f"copy {copy / 1e9:,.0f} GB/s", (low, low * copy), (6, -14), textcoords="offset points")
    roofline.annotate(f"matrix product {products / 1e12:,.1f} TFLOP/s", (ridge, products), (0, 6),
                      textcoords="offset points")  # fmt: skip
    for place, name in enumerate(names):
        shift = 1.04 ** (place - len(names) / 2)  # implementations side by side: their intensities are the same
        for marker, op in zip(MARKERS, ops, strict=False):
            chosen = [row for row in rows if row["op"] == op and row["implementation"] == name]
            roofline.plot(
                [shift * row["flop"] / row["bytes"] for row in chosen],
                [1e12 * row["tflop_per_s"] for row in chosen],
                marker, color=COLOURS[name], markersize=5, alpha=0.6, markeredgewidth=0,
            )  # fmt: skip
    roofline.set(xscale="log", yscale="log", xlabel="FLOP per byte (minimal bytes)", ylabel="FLOP/s")
    for marker, op in zip(MARKERS, ops, strict=False):
        roofline.plot([], [], marker, color="grey", label=op)

    columns = list(dict.fromkeys((row["op"], row["direction"]) for row in rows))
    names = [name for name in names if name != "products"]  # which are 100 %
    for place, name in enumerate(names):
        chosen = [row for row in rows if row["implementation"] == name]
        strips.plot(
            [columns.index((row["op"], row["direction"])) + 0.8 * (place + 0.5) / len(names) - 0.4 for row in chosen],
            [row["percent_of_roof"] for row in chosen],
            "o", color=COLOURS[name], markersize=5, alpha=0.6, markeredgewidth=0, label=name,
        )  # fmt: skip
    strips.set(
        ylabel="percent of the copy's bandwidth (linear_cross_entropy: of its products')",
        ylim=(0, None),
        xlim=(-0.5, len(columns) - 0.5),
    )
    strips.set_xticks(range(len(columns)), [f"{op}\n{direction}" for op, direction in columns], rotation=90)
    for place in range(1, len(columns)):
        strips.axvline(place - 0.5, color="lightgrey", linewidth=0.8)
    for axis in (roofline, strips):
        axis.grid(alpha=0.3, axis="y")
        axis.legend(loc="lower right" if axis is roofline else "upper right", ncols=2)
    figure.suptitle(f"{report['device']}, {report['dtype']}, torch {report['versions']['torch']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
