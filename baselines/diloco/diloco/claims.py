"""Says what tokens and bytes bought: ``python diloco/claims.py RESULTS [LOSS]``."""

import sys
from pathlib import Path
from statistics import mean, stdev

from flower_ext.runs.report import read_summary
from flower_ext.server.tracking import read_metrics

LOSS, TOKENS = "central/loss", "central/tokens"


def measured(rows: list[dict[str, float]]) -> list[tuple[float, float]]:
    """Return tokens and loss wherever the server has measured."""
    return [(row[TOKENS], row[LOSS]) for row in rows if row.get(TOKENS)]


def tokens_to(target: float, points: list[tuple[float, float]]) -> float:
    """Return the tokens at which a loss is reached, between two points by a line.

    It is infinite where the loss is not reached.

    Examples
    --------
    >>> tokens_to(2.5, [(100.0, 3.0), (200.0, 2.0)])
    150.0
    """
    before = (0.0, float("inf"))
    for tokens, loss in points:
        if loss <= target:
            if before[1] == float("inf"):
                return tokens
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (tokens - before[0])
        before = tokens, loss
    return float("inf")


def _spread(values: list[float], digits: int) -> str:
    around = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{around}"


def claims(results: Path, target: float = 2.55) -> str:
    """Return a table over the seeds in a folder.

    Loss is the last one, with its difference to that of ``sync`` in each seed; tokens
    are thousands of all workers, rounds those of the whole run, megabytes those of a
    worker in it, kilobytes those of a worker in the last round, up and down.
    """
    seeds = sorted(results.glob("seed-*")) or [results]
    clients = int(read_summary(seeds[0])["config"]["num-clients"])
    titles = [
        "loss",
        "against sync, by seed",
        f"thousand tokens to {target:g}",
        "rounds",
        "MB up",
        "MB down",
        "kB a round, up and down",
    ]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for name in read_summary(seeds[0])["runs"]:
        # A method need not have been run with all seeds.
        folders = [folder for folder in seeds if (folder / name).is_dir()]
        found = [read_metrics(folder / name) for folder in folders]
        ends = [measured(rows)[-1][1] for rows in found]
        apart = [
            end - measured(read_metrics(folder / "sync"))[-1][1]
            for folder, end in zip(folders, ends, strict=True)
            if name != "sync" and (folder / "sync").is_dir()
        ]
        speeds = [tokens_to(target, measured(rows)) / 1000 for rows in found]
        up, down = (
            mean(sum(row[key] for row in rows) for rows in found) / clients / 1e6
            for key in ("bytes/up", "bytes/down")
        )
        last = [
            found[0][-1][key] / clients / 1000 for key in ("bytes/up", "bytes/down")
        ]
        cells = [
            _spread(ends, 3),
            ", ".join(f"{x:+.3f}" for x in apart),
            _spread(speeds, 0) if max(speeds) < float("inf") else "not reached",
            str(len(found[0])),
            f"{up:.2f}",
            f"{down:.2f}",
            ", ".join(f"{x:.0f}" for x in last),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(claims(Path(sys.argv[1]), *map(float, sys.argv[2:])))
