"""The end of a comparison: ``summary.json`` and the table that a person reads."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from flower_ext.tracking import read_metrics

SUMMARY_FILE = "summary.json"


def write_summary(
    results: Path | str,
    names: Iterable[str],
    columns: Mapping[str, str],
    *,
    config: Mapping[str, object] | None = None,
    last: int = 3,
) -> Path:
    """Average the last rounds of several runs and write them side by side.

    Parameters
    ----------
    results : path
        Folder that holds one results folder per run.
    names : iterable of str
        The runs' folders, in the order of the table.
    columns : Mapping[str, str]
        Column of ``metrics.jsonl`` and its title: ``{"central/loss": "loss"}``. Those
        that begin with ``bytes/`` are shown in MB.
    config : Mapping, optional
        Settings to record.
    last : int (default: 3)
        Rounds to average.

    Returns
    -------
    Path
        The file ``summary.json``: ``{"runs": {name: {column: mean}}, ...}``.
    """
    results = Path(results)
    runs: dict[str, dict[str, float]] = {}
    for name in names:
        rows = read_metrics(results / name)[-last:]
        runs[name] = {}
        for column in columns:
            found = [row.get(column) for row in rows]
            numbers = [x for x in found if isinstance(x, int | float)]
            if numbers:
                runs[name][column] = sum(numbers) / len(numbers)
    summary = {
        "runs": runs,
        "columns": dict(columns),
        "rounds-averaged": last,
        "config": dict(config or {}),
    }
    path = results / SUMMARY_FILE
    path.write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    return path


def table(results: Path | str) -> str:
    """Return a written summary as a table for the terminal."""
    summary = json.loads((Path(results) / SUMMARY_FILE).read_text("utf-8"))
    columns: dict[str, str] = summary["columns"]
    rows = [["", *columns.values()]]
    for name, values in summary["runs"].items():
        rows.append([name, *(_cell(column, values.get(column)) for column in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(
        [*lines, f"means over the last {summary['rounds-averaged']} rounds"]
    )


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1e6:.2f} MB" if column.startswith("bytes/") else f"{value:.4f}"
