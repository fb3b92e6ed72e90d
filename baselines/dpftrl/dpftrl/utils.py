"""What is shown of the comparison."""

from collections.abc import Mapping
from pathlib import Path

from flower_ext.runs.report import read_summary

COLUMNS = {
    "central/accuracy": "accuracy",
    "central/loss": "loss",
    "train/noise-std": "noise",
    "train/signal-to-noise": "signal/noise",
}
PANELS = ["central/accuracy", "train/epsilon"]


def plot_epsilons(
    results: Path, runs: Mapping[str, tuple[str, float | None]], path: Path
) -> None:
    """Draw the final accuracy of every mechanism against epsilon."""
    from matplotlib.figure import Figure

    summary = read_summary(results)["runs"]
    lines: dict[str, list[tuple[float, float]]] = {}
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for run, (name, epsilon) in runs.items():
        accuracy = summary[run]["central/accuracy"]
        if epsilon is None:
            axes.axhline(accuracy, color="grey", linestyle=":", label="no noise")
        else:
            lines.setdefault(name, []).append((epsilon, accuracy))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(xlabel="epsilon", ylabel="accuracy", xscale="log")
    ticks = sorted({epsilon for _, epsilon in runs.values() if epsilon})
    axes.set_xticks(ticks, [f"{epsilon:g}" for epsilon in ticks])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path)
