"""A picture of a benchmark's results: for each preset the speed of every case, and where the time of its step goes."""

from collections.abc import Sequence
from pathlib import Path

from megaslm.errors import UserError
from megaslm.planning import Result
from megaslm.throughput.results import by_preset, case_name

CASE_COLOURS = {"megaslm": "#d62728", "hf": "#1f77b4", "ddp": "#7f7f7f"}
PHASE_COLOURS = {"data": "#9467bd", "forward": "#4c9be8", "backward": "#1f5fa8", "optimizer": "#2ca02c"}
OTHER_COLOUR = "#cccccc"  # a gap of the GPU, the rest on a processor
BAR_INCHES, TITLE_INCHES = 0.32, 0.85
CAPTION = "transformers' forward and backward: to be compared as a sum; our fused loss computes its gradient in forward"


def draw_results(results: Sequence[Result], title: str, path: str | Path) -> None:
    """Write a PNG. One row for each preset: on the left tokens/s of one device, on the right ms of a step by phase.

    Raises UserError where it can't be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = by_preset(results)
    heights = [BAR_INCHES * len(group) + TITLE_INCHES for group in groups]
    figure, axes = plt.subplots(
        len(groups), 2, figsize=(13, sum(heights) + 0.6), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for group, (speed, time) in zip(groups, axes, strict=True):
        places = range(len(group))
        colours = [CASE_COLOURS.get(result.case, OTHER_COLOUR) for result in group]
        rates = [result.tokens_per_s_per_device for result in group]
        bars = speed.barh(places, rates, color=colours, alpha=0.85)
        speed.bar_label(bars, [f" {rate:,.0f}" for rate in rates])
        speed.set_yticks(places, [case_name(result) for result in group])
        speed.set(title=group[0].preset, xlim=(0, 1.25 * max(rates)))
        _stack(time, group)
        for axis in (speed, time):
            axis.invert_yaxis()
            axis.grid(alpha=0.3, axis="x")
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.locator_params(axis="x", nbins=6)
            axis.set_axisbelow(True)
    axes[-1][0].set_xlabel("tokens/s of one device")
    axes[-1][1].set_xlabel("ms of a step")
    handles = {
        label: handle for axis in axes[:, 1] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower right", ncols=len(handles), frameon=False)
    figure.suptitle(title)
    if any(result.case == "hf" for result in results):
        figure.text(0.01, 0.005, CAPTION, fontsize="small", color="#555555")
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        plt.close(figure)


def _stack(axis, group: Sequence[Result]) -> None:
    """A bar for each case, of its phases one after the other, and the whole in figures."""
    ends = [0.0] * len(group)
    for phase in dict.fromkeys(phase for result in group for phase in result.phases_ms):
        widths = [result.phases_ms.get(phase) or 0.0 for result in group]  # not there, or not known
        axis.barh(range(len(group)), widths, left=ends, color=PHASE_COLOURS.get(phase, OTHER_COLOUR), label=phase)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for place, (result, end) in enumerate(zip(group, ends, strict=True)):
        axis.text(end, place, f"  {result.ms_per_step:,.1f}", va="center")
    axis.set_yticks(range(len(group)), [""] * len(group))
    axis.set_xlim(0, 1.25 * max(ends))
