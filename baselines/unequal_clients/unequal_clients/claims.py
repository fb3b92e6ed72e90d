"""Says what each width reaches and costs: ``python unequal_clients/claims.py RESULTS``.

Run it from the folder of the baseline, or with that on the path of Python.
"""

import sys
from pathlib import Path
from statistics import mean, stdev

from flower_ext.runs.report import read_summary
from flower_ext.server.tracking import read_metrics

WIDTHS = ("1", "0.5", "0.25")


def cell(values: list[float], digits: int = 1) -> str:
    """Return mean and standard deviation over the seeds."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def claims(results: Path) -> str:
    """Return a table over the seeds in a folder: accuracy by width, and bytes.

    Accuracy is the mean of the last five rounds, in per cent; kilobytes are those of
    all clients in a round.
    """
    seeds = sorted(results.glob("seed-*")) or [results]
    titles = [*(f"width {x}, %" for x in WIDTHS), "down, kB", "up, kB"]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for run in read_summary(seeds[0])["runs"]:
        found = [read_metrics(folder / run) for folder in seeds]
        cells = []
        for width in WIDTHS:
            key = f"evaluate/accuracy-width-{width}"
            known = key in found[0][-1]
            last = [100 * mean(r[key] for r in rows[-5:]) for rows in found if known]
            cells.append(cell(last) if last else "")
        for way in ("down", "up"):
            cells.append(
                f"{mean(rows[-1][f'bytes/{way}'] for rows in found) / 1e3:.0f}"
            )
        lines.append(f"| {run} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(claims(Path(sys.argv[1])))
