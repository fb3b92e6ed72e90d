"""The end of a comparison: ``summary.json``, a table for the terminal, and a page.

``python -m flower_ext.runs.report results`` makes the page, see
:mod:`~flower_ext.runs.report_page`.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

from flower_ext.core.strict_json import numbers, read, write
from flower_ext.runs import report_page
from flower_ext.server.tracking import read_metrics

SUMMARY_FILE = report_page.SUMMARY_FILE


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
        The file ``summary.json``: ``{"runs": {name: {column: mean}}, ...}``, to be read
        by :func:`read_summary`.

    Notes
    -----
    A round in which a metric was NaN or infinite is not left out: the mean is then NaN
    or infinite as well, so that a run that diverged never looks better than one that
    converged.
    The same holds for a round without a usable reply. Rounds that have no value in a
    column because nothing was evaluated in them are left out of its mean.
    """
    results = Path(results).expanduser()
    runs: dict[str, dict[str, float]] = {}
    for name in names:
        rows = read_metrics(results / name)[-last:]
        runs[name] = {}
        for column in columns:
            found = [_value(row, column) for row in rows]
            values = [float(x) for x in found if isinstance(x, int | float)]
            if values:
                runs[name][column] = sum(values) / len(values)
    summary = {
        "runs": runs,
        "columns": dict(columns),
        "rounds-averaged": last,
        "config": dict(config or {}),
    }
    path = results / SUMMARY_FILE
    path.write_text(write(summary, indent=2) + "\n", "utf-8")
    return path


def _value(row: Mapping[str, object], column: str) -> object:
    """Return what a round measured; NaN if no reply of its phase was usable."""
    phase = column.partition("/")[0]
    return row.get(column, math.nan if row.get(f"{phase}/num-replies") == 0 else None)


def read_summary(results: Path | str) -> dict[str, Any]:
    """Read ``summary.json`` of a results folder; means may be NaN or infinite."""
    summary = read((Path(results).expanduser() / SUMMARY_FILE).read_text("utf-8"))
    return {
        key: numbers(value) if key in ("runs", "spread") else value
        for key, value in summary.items()
    }


def pool(folders: Iterable[Path | str], results: Path | str) -> Path:
    """Summarise the summaries of the same comparison with several seeds.

    Parameters
    ----------
    folders : iterable of path
        Folders with a summary each, of the same runs.
    results : path
        Where the summary goes: means over the folders and, as ``"spread"``, their
        sample standard deviations (none for a single folder). If the run of one seed
        diverged, neither is finite.

    Returns
    -------
    Path
        The file ``summary.json``.
    """
    each = [read_summary(folder) for folder in folders]
    first = each[0]
    runs: dict[str, dict[str, float]] = {}
    spread: dict[str, dict[str, float]] = {}
    for name in first["runs"]:
        runs[name], spread[name] = {}, {}
        for column in first["columns"]:
            values = [s["runs"].get(name, {}).get(column) for s in each]
            # A mean over some of the seeds is not comparable with one over all.
            if any(value is None for value in values):
                continue
            runs[name][column] = sum(values) / len(values)
            if len(values) > 1:
                finite = all(map(math.isfinite, values))
                spread[name][column] = stdev(values) if finite else math.nan
    pooled = {**first, "runs": runs, "spread": spread, "num-seeds": len(each)}
    path = Path(results).expanduser() / SUMMARY_FILE
    path.write_text(write(pooled, indent=2) + "\n", "utf-8")
    return path


def table(results: Path | str) -> str:
    """Return a written summary as a table for the terminal."""
    summary = read_summary(results)
    columns: dict[str, str] = summary["columns"]
    spread: dict[str, dict[str, float]] = summary.get("spread", {})
    rows = [["", *columns.values()]]
    for name, values in summary["runs"].items():
        spreads = spread.get(name, {})
        cells = [_cell(c, values.get(c), spreads.get(c)) for c in columns]
        rows.append([name, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    note = f"means over the last {summary['rounds-averaged']} rounds"
    if "num-seeds" in summary:
        note += f" and {summary['num-seeds']} seeds, ± standard deviation over seeds"
    return "\n".join([*lines, note])


def _cell(column: str, value: float | None, spread: float | None) -> str:
    if value is None:
        return "-"
    if column.startswith("bytes/"):
        return f"{value / 1e6:.2f} MB"
    return f"{value:.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def write_page(folders: Iterable[Path | str], output: Path | str) -> Path:
    """Write one self-contained HTML page of all runs in some results folders.

    Parameters
    ----------
    folders : iterable of path
        Results folders of runs, or folders that hold some, however deep.
    output : path
        The page.

    Raises
    ------
    ValueError
        If no run has left anything there.
    """
    output = Path(output).expanduser()
    page = report_page.render(
        report_page.find(Path(folder).expanduser() for folder in folders)
    )
    output.write_text(page, "utf-8")
    return output


def main(argv: Sequence[str] | None = None) -> int:
    """Make the page from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m flower_ext.runs.report",
        description="Make one HTML page of the runs in results folders.",
    )
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("results")])
    parser.add_argument(
        "-o", "--output", type=Path, help="default: report.html in the first folder"
    )
    args = parser.parse_args(argv)
    output = args.output or args.folders[0] / "report.html"
    try:
        print(write_page(args.folders, output))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
