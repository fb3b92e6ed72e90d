"""Says what sparsity costs and saves: ``python pruning/claims.py RESULTS``."""

import sys
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from flower_ext.runs.report import read_summary
from flower_ext.server.tracking import read_metrics

Rows = Sequence[Mapping[str, float]]
ACCURACY, LOSS = "central/accuracy", "central/loss"
WAYS = ("bytes/down", "bytes/up")


def both_ways(rows: Rows) -> float:
    """Return the bytes of all rounds, down and up."""
    return sum(row[way] for row in rows for way in WAYS)


def accuracy_at(rows: Rows, spent: float) -> float:
    """Return the accuracy of a run when so many bytes were spent.

    Between two evaluations it is taken to grow evenly.
    """
    bytes_ = list(accumulate(sum(row[way] for way in WAYS) for row in rows))
    known = [i for i, row in enumerate(rows) if ACCURACY in row]
    found = [rows[i][ACCURACY] for i in known]
    return float(np.interp(spent, [bytes_[i] for i in known], found))


def claims(results: Path) -> str:
    """Return a table: means over the seeds in a folder, and single differences.

    The first run is the one that the others are compared with.
    """
    seeds = sorted(results.glob("seed-*")) or [results]
    runs = read_summary(seeds[0])["runs"]
    tables = [{run: read_metrics(folder / run) for run in runs} for folder in seeds]
    first = next(iter(runs))
    titles = ["left", "last round down, up", "run, MB", "accuracy, %", "against none"]
    titles += ["none at these bytes", "loss"]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for run in runs:
        rows = [table[run] for table in tables]
        plain = [table[first] for table in tables]
        spent = [both_ways(x) for x in rows]
        accuracy = [100 * x[-1][ACCURACY] for x in rows]
        alike = [100 * accuracy_at(p, s) for p, s in zip(plain, spent, strict=True)]
        ends = [100 * p[-1][ACCURACY] for p in plain]
        less = [f"{a - b:+.1f}" for a, b in zip(accuracy, ends, strict=True)]
        pairs = [(p[-1], x[-1]) for p, x in zip(plain, rows, strict=True)]
        left = mean(x["parameters/down"] / p["parameters/down"] for p, x in pairs)
        saved = [mean(p[way] / x[way] for p, x in pairs) for way in WAYS]
        last = ", ".join(f"1/{times:.1f}" for times in saved)
        spread = f" ± {stdev(accuracy):.1f}" if len(seeds) > 1 else ""
        cells = [
            f"{left:.2f}",
            last,
            f"{mean(spent) / 1e6:.0f}",
            f"{mean(accuracy):.1f}{spread}",
            "" if run == first else ", ".join(less),
            "" if run == first else f"{mean(alike):.1f}",
            f"{mean(x[-1][LOSS] for x in rows):.3f}",
        ]
        lines.append(f"| `{run}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(claims(Path(sys.argv[1])))
