"""Draws a summary against local epochs: ``python fedfish/plot.py RESULTS``."""

import sys
from pathlib import Path

from flower_ext.runs.report import read_summary

PANELS = {
    "central/accuracy": "accuracy",
    "evaluate/client-server-barrier": "Client-Server Barrier",
    "central/accuracy-shifted": "accuracy, held out",
}


def plot_epochs(results: Path) -> Path:
    """Draw runs named ``strategy@epochs``: means, and spreads where there are seeds."""
    from matplotlib.figure import Figure

    summary = read_summary(results)
    spread = summary.get("spread", {})
    points: dict[str, list[tuple[int, str]]] = {}
    for run in summary["runs"]:
        strategy, _, epochs = run.partition("@")
        points.setdefault(strategy, []).append((int(epochs), run))
    panels = {key: x for key, x in PANELS.items() if key in summary["columns"]}
    figure = Figure(figsize=(3.6 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for strategy, runs in points.items():
            found = sorted(x for x in runs if key in summary["runs"][x[1]])
            axis.errorbar(
                [epochs for epochs, _ in found],
                [summary["runs"][run][key] for _, run in found],
                [spread.get(run, {}).get(key, 0.0) for _, run in found],
                marker="o",
                capsize=3,
                label=strategy,
            )
        axis.set(xlabel="local epochs", ylabel=title, xscale="log")
        ticks = sorted({epochs for runs in points.values() for epochs, _ in runs})
        axis.set_xticks(ticks, [str(epochs) for epochs in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(results / "epochs.png", dpi=150)
    return results / "epochs.png"


if __name__ == "__main__":
    print(plot_epochs(Path(sys.argv[1])))
