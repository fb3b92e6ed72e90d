"""The comparison: a table, ``summary.json`` and a plot."""

import json
from collections.abc import Mapping
from pathlib import Path

from flower_ext.tracking import plot, read_metrics

SUMMARY_FILE = "summary.json"
PLOT_FILE = "comparison.png"
COLUMNS = {
    "central/loss": "loss",
    "central/accuracy": "accuracy",
    "evaluate/client-server-barrier": "barrier",
    "bytes/up": "MB up a round",
}


def write_report(results: Path, names: list[str], config: Mapping[str, object]) -> None:
    """Write summary and plot of the strategies' runs.

    The summary holds, per strategy, the means over the last three rounds.
    """
    runs = {}
    for name in names:
        last = read_metrics(results / name)[-3:]
        runs[name] = {
            column: sum(float(str(row[column])) for row in last if column in row)
            / max(sum(column in row for row in last), 1)
            for column in COLUMNS
            if any(column in row for row in last)
        }
    plot(
        {name: results / name for name in names},
        ["central/loss", "central/accuracy"],
        results / PLOT_FILE,
        title=f"Shakespeare by speaker, {config['local-epochs']} local epochs",
    )
    summary = {"runs": runs, "config": dict(config)}
    (results / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", "utf-8")


def table(results: Path) -> str:
    """Return the summary as a table for the terminal."""
    summary = json.loads((results / SUMMARY_FILE).read_text("utf-8"))
    lines = ["".join(f"{title:>14}" for title in ("strategy", *COLUMNS.values()))]
    for name, values in summary["runs"].items():
        cells = [name]
        for column in COLUMNS:
            value = values.get(column)
            if value is not None and column.startswith("bytes"):
                value /= 1e6
            cells.append("-" if value is None else f"{value:.4f}")
        lines.append("".join(f"{cell:>14}" for cell in cells))
    return "\n".join([*lines, "means over the last three rounds"])
