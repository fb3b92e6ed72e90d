"""What is shown of the comparison."""

from collections.abc import Iterable
from pathlib import Path

from flower_ext.server.tracking import read_metrics

WAYS = ("down", "up")
COLUMNS = {
    "central/loss": "loss",
    "central/accuracy": "accuracy",
    "bytes/down": "down a round",
    "bytes/up": "up a round",
}


def totals(results: Path, names: Iterable[str]) -> str:
    """Return the bytes of all rounds of each run, as text."""
    lines = []
    for name in names:
        rows = read_metrics(results / name)
        ways = [sum(float(str(x[f"bytes/{way}"])) for x in rows) for way in WAYS]
        down, up = (f"{size / 1e6:.2f} MB" for size in ways)
        lines.append(f"{name}: {down} down and {up} up in all rounds")
    return "\n".join(lines)


def plot_bytes(results: Path, names: Iterable[str], path: Path) -> None:
    """Draw the loss against rounds, and against the bytes sent so far, both ways."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for name in names:
        points, total = [], 0.0
        for row in read_metrics(results / name):
            total += sum(float(str(row[f"bytes/{way}"])) for way in WAYS)
            if (loss := row.get("central/loss")) is not None:
                points.append((int(str(row["round"])), total / 1e6, float(str(loss))))
        rounds, megabytes, losses = zip(*points, strict=True)
        panels[0].plot(rounds, losses, marker=".", label=name)
        panels[1].plot(megabytes, losses, marker=".")
    panels[0].set(xlabel="round", ylabel="loss")
    panels[1].set(xlabel="MB down and up", ylabel="loss", xscale="log")
    for panel in panels:
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
