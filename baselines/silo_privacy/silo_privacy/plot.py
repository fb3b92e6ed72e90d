"""Errors against strength, by epsilon: ``python silo_privacy/plot.py RESULTS...``.

Each folder is a run of one epsilon and one seed. Prints a table, and draws it.
"""

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev

from flower_ext.runs.report import read_summary

ERROR = "evaluate/mse"
Errors = dict[float, dict[str, list[float]]]


def errors(folders: Iterable[Path]) -> Errors:
    """Return the errors of the seeds, by epsilon and strategy."""
    found: Errors = {}
    for folder in folders:
        summary = read_summary(folder)
        of_epsilon = found.setdefault(float(summary["config"]["epsilon"]), {})
        for run, values in summary["runs"].items():
            of_epsilon.setdefault(run, []).append(values[ERROR])
    return dict(sorted(found.items(), reverse=True))


def spread(by_run: dict[str, list[float]], run: str) -> float:
    """Return the standard deviation of a strategy's errors over the seeds.

    Without what a seed's held-out pupils add to the errors of all strategies alike.
    """
    common = [fmean(of_seed) for of_seed in zip(*by_run.values(), strict=True)]
    own = [x - c for x, c in zip(by_run[run], common, strict=True)]
    return stdev(own) if len(own) > 1 else 0.0


def table(found: Errors) -> str:
    """Return means and spreads as Markdown."""
    runs = list(next(iter(found.values())))
    lines = [f"| epsilon | {' | '.join(runs)} |", "|---" * (len(runs) + 1) + "|"]
    for epsilon, by_run in found.items():
        cells = [f"{fmean(by_run[r]):.4f} ± {spread(by_run, r):.4f}" for r in runs]
        lines.append(f"| {epsilon:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_strengths(found: Errors, path: Path) -> Path:
    """Draw the error against the strength, local and federated training at the ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    runs = list(next(iter(found.values())))
    middle = sorted((r for r in runs if "@" in r), key=lambda r: float(r.split("@")[1]))
    order = [r for r in ["local", *middle, "fedavg"] if r in runs]
    names = {"local": "local\n(0)", "fedavg": "FedAvg\n(infinite)"}
    for epsilon, by_run in found.items():
        means = [fmean(by_run[run]) for run in order]
        spreads = [spread(by_run, run) for run in order]
        label = "no privacy" if math.isinf(epsilon) else f"epsilon {epsilon:g}"
        line = axes.errorbar(range(len(order)), means, spreads, capsize=3, label=label)
        best = min(range(len(order)), key=means.__getitem__)
        axes.plot(best, means[best], marker="o", color=line[0].get_color())
    axes.set_xticks(
        range(len(order)), [names.get(r, r.partition("@")[2]) for r in order]
    )
    axes.set(xlabel="strength of the pull", ylabel="mean square error, held-out pupils")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    found_errors = errors(map(Path, sys.argv[1:]))
    print(table(found_errors))
    print(plot_strengths(found_errors, Path("strength.png")))
