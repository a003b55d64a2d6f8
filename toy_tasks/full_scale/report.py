"""What is left of a run to read: `report.json` and a figure."""

from pathlib import Path

from .. import plotting
from ..records import write_json
from .log import read_log
from .training import REPORT, Outcome

FIGURE = "figure.svg"


def write_report(out: Path, outcome: Outcome) -> None:
    """Write the figure, then `report.json`, whose presence says that the run is finished."""
    lines = [line for line in read_log(out) if "loss" in line]
    figure, axes = plotting.make_figure(2, f"{outcome.run['method']}: what did it learn, and what did it forget?")
    curve, bars = axes
    curve.plot([line["step"] for line in lines], [line["loss"] for line in lines], markevery=(0.05, 0.125), **plotting.line_style(0))
    curve.set(xlabel="step", ylabel="training loss", title="training")
    groups = {"held out, new domain": (outcome.loss_before, outcome.loss_after)}
    if outcome.old_loss_before is not None and outcome.old_loss_after is not None:
        groups["held out, old domain"] = (outcome.old_loss_before, outcome.old_loss_after)
    for i, name in enumerate(("before", "after")):
        at = [group + (i - 0.5) * 0.4 for group in range(len(groups))]
        heights = [pair[i] for pair in groups.values()]
        drawn = bars.bar(at, heights, 0.4, label=name, color=plotting.BAR_COLOURS[i], hatch=plotting.HATCHES[i], edgecolor="black")
        bars.bar_label(drawn, fmt="%.2f")
    bars.set_xticks(range(len(groups)), list(groups))
    bars.set(ylabel="mean loss per token", title="evaluation")
    bars.legend()
    plotting.save(figure, out / FIGURE)
    write_json(out / REPORT, outcome)
