"""What is shown of the comparison."""

from collections.abc import Iterable
from pathlib import Path

from flower_ext.server.tracking import read_metrics

COLUMNS = {
    "central/loss": "loss",
    "central/accuracy": "accuracy",
    "bytes/down": "down a round",
    "bytes/up": "up a round",
}


def plot_bytes(results: Path, names: Iterable[str], path: Path) -> None:
    """Draw accuracy and loss against the bytes sent so far, down and up together."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for name in names:
        rows = read_metrics(results / name)
        for panel, metric in zip(panels, ("accuracy", "loss"), strict=True):
            points, total = [], 0.0
            for row in rows:
                total += sum(float(str(row[f"bytes/{way}"])) for way in ("down", "up"))
                if (value := row.get(f"central/{metric}")) is not None:
                    points.append((total / 1e6, float(str(value))))
            panel.plot(*zip(*points, strict=True), marker=".", label=name)
            panel.set(xlabel="MB down and up", ylabel=metric, xscale="log")
            panel.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
