"""Says how fast and how steadily runs learn: ``python drift/claims.py RESULTS``."""

import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

from flower_ext.runs.report import read_summary
from flower_ext.server.tracking import read_metrics

ACCURACY, LOSS = "central/accuracy", "central/loss"
# FedExP's result is the mean of its last two models.
OF_TWO = {"fedexp": ("central/average-accuracy", "central/average-loss")}
TARGETS = (0.5, 0.6)


def rounds_to(target: float, accuracies: list[float]) -> int:
    """Return the first round with a target accuracy; the one after the last if none."""
    reached = [i for i, x in enumerate(accuracies, 1) if x >= target]
    return reached[0] if reached else len(accuracies) + 1


def swing(accuracies: list[float]) -> float:
    """Return the mean change from one round to the next, in the second half."""
    half = accuracies[(len(accuracies) - 1) // 2 :]
    return mean([abs(y - x) for x, y in pairwise(half)] or [0.0])


def claims(results: Path) -> str:
    """Return a table: mean and standard deviation over the seeds in a folder.

    Loss and accuracy are those of the last three rounds.
    """
    seeds = sorted(results.glob("seed-*")) or [results]
    titles = ["loss", "accuracy, %", *(f"rounds to {x:.0%}" for x in TARGETS), "swing"]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for run in read_summary(seeds[0])["runs"]:
        rows = []
        accuracy, loss_key = OF_TWO.get(run.partition("@")[0], (ACCURACY, LOSS))
        for folder in seeds:
            metrics = read_metrics(folder / run)
            found = [row[accuracy] for row in metrics]
            loss = mean(row[loss_key] for row in metrics[-3:])
            speeds = [float(rounds_to(x, found)) for x in TARGETS]
            rows.append([loss, 100 * mean(found[-3:]), *speeds, 100 * swing(found)])
        cells = [
            f"{mean(x):.{d}f}" + (f" ± {stdev(x):.{d}f}" if len(x) > 1 else "")
            for x, d in zip(zip(*rows, strict=True), (3, 1, 1, 1, 1), strict=True)
        ]
        lines.append(f"| {run} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(claims(Path(sys.argv[1])))
