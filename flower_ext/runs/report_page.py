"""One HTML page of results folders: plots, tables, settings, what was spent.

The page is one file without scripts that refers to no other: it can be mailed, kept
beside a paper, and read on a telephone.
"""

import base64
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean, stdev

from flower_ext.runs.report_chart import Curve, chart, look
from flower_ext.server.tracking import METRICS_FILE, RUN_FILE, points, read_metrics

SUMMARY_FILE = "summary.json"

Row = dict[str, object]

# Columns worth a plot of their own; the others are in the table of the rounds.
_DRAWN = ("loss", "accuracy", "acc", "epsilon", "gm-appeal", "barrier")
# Quantiles over clients, of metrics that have them.
_MEDIAN, _TENTHS = "-p50", ("-p10", "-p90")

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem;
  max-width: 70rem; overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.2; } h2 { border-top: 1px solid var(--line);
  padding-top: 1rem; margin-top: 2rem; }
.wide { overflow-x: auto; overflow-wrap: normal; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap; }
th:first-child, td:first-child, table.words td { text-align: left; }
table.words td { white-space: normal; }
thead th { background: var(--soft); }
/* Names stay where they are while the rest of a wide table is moved. */
.numbers td:first-child { position: sticky; left: 0; background: Canvas; }
.plots { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; } figcaption { font-weight: 600; }
svg { width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: currentColor; } svg .grid { stroke: var(--line); }
svg polyline { fill: none; stroke: currentColor; stroke-width: 1.8; }
svg polygon { fill: currentColor; stroke: none; opacity: .15; }
svg circle { fill: currentColor; } svg path { stroke: currentColor; }
ul.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none;
  padding: 0; } ul.legend svg { width: 1.5em; vertical-align: middle; }
summary { cursor: pointer; margin: .6rem 0; font-weight: 600; }
img { max-width: 100%; background: #fff; }
.s0 { color: #3b82f6; } .s1 { color: #e8710a; } .s2 { color: #16a34a; }
.s3 { color: #dc2626; } .s4 { color: #9b5de5; } .s5 { color: #a9744f; }
.s6 { color: #db2777; } .s7 { color: #0d9488; }
polyline.dashed { stroke-dasharray: 5 3; }
"""


@dataclass
class Run:
    """What one run left in its folder, or the mean of its seeds.

    Attributes
    ----------
    name : str
        Its folder's.
    rows : list of dict
        Of ``metrics.jsonl``, or means of these.
    about : Mapping
        Of ``run.json``; of a mean nothing.
    bands : dict
        Of a mean, by column: round, and the mean minus and plus the standard deviation.
    """

    name: str
    rows: list[Row]
    about: Mapping[str, object]
    bands: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)


@dataclass
class Comparison:
    """Runs that lie side by side in one folder, and what their app wrote of them.

    Attributes
    ----------
    folder : Path
        What they share.
    runs : list of Run
        In the app's own order.
    summary : Mapping
        Of ``summary.json``.
    title : str
        The folder as the page names it.
    """

    folder: Path
    runs: list[Run]
    summary: Mapping[str, object]
    title: str = ""


def find(folders: Iterable[Path]) -> list[Comparison]:
    """Return all runs at or below the folders, by the folder that they share.

    Raises
    ------
    ValueError
        If there is no run at all.
    """
    folders = [folder.resolve() for folder in folders]
    runs: dict[Path, set[Path]] = {}
    for folder in folders:
        for file in folder.rglob(METRICS_FILE):
            # A run that is named itself has no siblings to be compared with.
            alone = file.parent == folder
            runs.setdefault(folder if alone else file.parent.parent, set()).add(
                file.parent
            )
    if not runs:
        raise ValueError(
            f"no {METRICS_FILE} in {', '.join(map(str, folders))}: "
            "has a run with Tracker(folder) finished a round?"
        )
    found = [_comparison(folder, runs[folder]) for folder in sorted(runs)]
    found = [*_over_seeds(found), *found]
    for comparison in found:
        comparison.title = _title(comparison.folder, folders)
    return found


def _title(folder: Path, asked: Iterable[Path]) -> str:
    """Return its place below what was asked for, where several share a name."""
    for parent in asked:
        if parent in folder.parents:
            return folder.relative_to(parent).as_posix()
    return folder.name


def _over_seeds(found: Sequence[Comparison]) -> Iterator[Comparison]:
    """Return the means of comparisons that were run with several seeds."""
    seeds: dict[Path, list[Comparison]] = {}
    for comparison in found:
        seeds.setdefault(comparison.folder.parent, []).append(comparison)
    for folder, each in seeds.items():
        summary = _read(folder / SUMMARY_FILE)
        if len(each) < 2 or summary.get("num-seeds") != len(each):
            continue
        runs = [
            _mean(
                [
                    run
                    for comparison in each
                    for run in comparison.runs
                    if run.name == name
                ]
            )
            for name in _table(summary, "runs")
        ]
        config = {k: x for k, x in _table(summary, "config").items() if k != "seed"}
        shown = [run for run in runs if run.rows]
        yield Comparison(folder, shown, {**summary, "config": config})


def _mean(runs: Sequence[Run]) -> Run:
    """Return the mean of a run's seeds, in the rounds and columns that all have."""
    if not runs:
        return Run("", [], {})
    rows: list[Row] = []
    bands: dict[str, list[tuple[float, float, float]]] = {}
    for each in zip(*(run.rows for run in runs), strict=False):
        row: Row = {"round": each[0].get("round")}
        for column in each[0]:
            values = [
                x for one in each if isinstance(x := one.get(column), int | float)
            ]
            if column == "round" or len(values) < len(each):
                continue
            row[column] = mean = fmean(values)
            if len(values) > 1 and math.isfinite(mean):
                spread = stdev(values)
                corner = (float(str(row["round"])), mean - spread, mean + spread)
                bands.setdefault(column, []).append(corner)
        rows.append(row)
    return Run(runs[0].name, rows, {}, bands)


def _comparison(folder: Path, runs: Iterable[Path]) -> Comparison:
    summary = _read(folder / SUMMARY_FILE)
    # In the app's own order where it wrote a summary; other runs follow by name.
    order = list(_table(summary, "runs"))

    def place(run: Path) -> tuple[int, str]:
        return order.index(run.name) if run.name in order else len(order), run.name

    return Comparison(
        folder,
        [
            Run(run.name, read_metrics(run), _read(run / RUN_FILE))
            for run in sorted(runs, key=place)
        ],
        summary,
    )


def _read(path: Path) -> Mapping[str, object]:
    """Return a JSON object; {} if it is missing or was cut off."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _table(parent: Mapping[str, object], key: str) -> Mapping[str, object]:
    found = parent.get(key)
    return found if isinstance(found, dict) else {}


def render(comparisons: Sequence[Comparison]) -> str:
    """Return the page."""
    sections = "\n".join(_section(*each) for each in enumerate(comparisons))
    contents = "".join(
        f'<li><a href="#s{number}">{escape(each.title)}</a></li>'
        for number, each in enumerate(comparisons)
    )
    contents = f"<nav><ul>{contents}</ul></nav>" if len(comparisons) > 1 else ""
    # Names and settings of runs are text of others: they are escaped, and the policy
    # in the head keeps the page from loading or running anything.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Results</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Results</h1>
{contents}
{sections}
</body>
</html>
"""


def _section(number: int, comparison: Comparison) -> str:
    runs = comparison.runs
    parts = [f'<h2 id="s{number}">{escape(comparison.title)}</h2>']
    parts += _means(comparison.summary)
    parts += ["<h3>Spent</h3>", _spent(runs), _plots(comparison), _settings(comparison)]
    for run in runs:
        parts.append(_details(f"Rounds of {run.name}", _rounds(run)))
    if pictures := sorted(comparison.folder.glob("*.png")):
        drawn = "".join(_picture(path) for path in pictures)
        parts.append(_details("Pictures that the app drew", drawn))
    return "\n".join(parts)


# Tables ---------------------------------------------------------------------------


def _means(summary: Mapping[str, object]) -> Iterator[str]:
    columns, runs = _table(summary, "columns"), _table(summary, "runs")
    if columns and runs:
        last = str(summary.get("rounds-averaged", ""))
        title = f"Means of the last {last} rounds"
        if "num-seeds" in summary:
            title += f" and {summary['num-seeds']} seeds, ± standard deviation"
        yield f"<h3>{escape(title)}</h3>"
        yield _html_table(
            ["", *map(str, columns.values())],
            [
                [
                    name,
                    *(_with_spread(summary, name, column) for column in columns),
                ]
                for name in runs
            ],
        )


def _with_spread(summary: Mapping[str, object], name: str, column: str) -> str:
    value = _cell(column, _table(_table(summary, "runs"), name).get(column))
    spread = _table(_table(summary, "spread"), name).get(column)
    if spread is None:
        return value
    if isinstance(spread, float) and "bytes/" not in column:
        return f"{value} ± {spread:.2g}"
    return f"{value} ± {_cell(column, spread)}"


def _spent(runs: Sequence[Run]) -> str:
    """Return what the runs took: time, traffic, privacy, and replies that were lost."""
    titles = {
        "seconds/train": "seconds of training",
        "seconds/evaluate": "seconds of evaluation",
        "bytes/down": "down",
        "bytes/up": "up",
        "parameters/up": "parameters up",
        "train/num-errors": "errors",
        "train/num-dropped": "dropped replies",
    }
    rows = [["rounds", *(str(len(run.rows)) for run in runs)]]
    for column, title in titles.items():
        rows.append([title, *(_cell(column, _sum(run.rows, column)) for run in runs)])
    for column in _columns(runs):
        if column.startswith("train/") and column.endswith(("epsilon", "delta")):
            title = column.removeprefix("train/")
            rows.append([title, *(_number(_last(run.rows, column)) for run in runs)])
    return _html_table(["", *(run.name for run in runs)], rows)


def _rounds(run: Run) -> str:
    columns = _columns([run])
    return _html_table(
        columns, [[_cell(c, row.get(c)) for c in columns] for row in run.rows]
    )


def _settings(comparison: Comparison) -> str:
    """Return settings and versions, as they were written when the run began."""
    found: dict[str, list[str]] = {}

    def note(setting: str, value: object) -> None:
        values = found.setdefault(setting, [])
        if str(value) not in values:
            values.append(str(value))

    for key, value in _table(comparison.summary, "config").items():
        if key != "results":  # a folder of the machine that ran it
            note(key, value)
    for run in comparison.runs:
        for key in ("started", "strategy"):
            if key in run.about:
                note(f"{run.name}: {key}", run.about[key])
        for key, value in _table(run.about, "settings").items():
            note(f"{run.name}: {key}", value)
        for key, value in _table(run.about, "versions").items():
            note(f"version of {key}", value)
    rows = [[key, ", ".join(values)] for key, values in found.items()]
    return _details(
        "Settings and versions", _html_table(["setting", "value"], rows, "words")
    )


def _html_table(
    head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "numbers"
) -> str:
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{titles}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _columns(runs: Iterable[Run]) -> list[str]:
    return list(dict.fromkeys(c for run in runs for row in run.rows for c in row))


def _sum(rows: Iterable[Row], column: str) -> float | None:
    found = [x for row in rows if isinstance(x := row.get(column), int | float)]
    return sum(found) if found else None


def _last(rows: Sequence[Row], column: str) -> object:
    return next((row[column] for row in reversed(rows) if column in row), None)


def _cell(column: str, value: object) -> str:
    """Write a value: traffic in MB, counts whole, the rest to four digits."""
    if "bytes/" in column and isinstance(value, int | float):
        return f"{value / 1e6:.2f} MB"
    return _number(value)


def _number(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:,.0f}" if value == round(value) else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}"></p>'


# Plots ----------------------------------------------------------------------------


def _plots(comparison: Comparison) -> str:
    runs = comparison.runs
    asked = [c for c in _table(comparison.summary, "columns") if "bytes/" not in c]
    drawn = [c for c in _columns(runs) if c.rpartition("/")[2].endswith(_DRAWN)]
    spread = [c for c in _columns(runs) if c.endswith(_MEDIAN)]
    private = [c for c in drawn if c.endswith("epsilon")]
    first = [(c, "round") for c in dict.fromkeys([*(asked or drawn), *private])]
    if first:  # what a byte buys is the question of half of the strategies
        first.insert(1, (first[0][0], "bytes/up"))
    seen = {column for column, _ in first}
    more = [(c, "round") for c in dict.fromkeys([*drawn, *spread]) if c not in seen]
    names = "".join(
        f'<li><svg viewBox="0 0 24 8"><polyline class="{look(i)}" '
        f'points="0,4 24,4"/></svg> {escape(run.name)}</li>'
        for i, run in enumerate(runs)
    )
    legend = f'<ul class="legend">{names}</ul>'
    shown = legend + _charts(runs, first)
    if more:
        shown += _details("More curves", legend + _charts(runs, more))
    return shown


def _charts(runs: Sequence[Run], panels: Iterable[tuple[str, str]]) -> str:
    drawn = "".join(_chart(runs, column, x) for column, x in panels)
    return f'<div class="plots">{drawn}</div>'


def _chart(runs: Sequence[Run], column: str, x: str) -> str:
    """Draw a column of all runs, with its band; ``""`` if none has a number in it."""
    mega = 1e6 if "bytes/" in x else 1.0
    curves = []
    for run in runs:
        found = [(a / mega, b) for a, b in points(run.rows, x, column)]
        line = [point for point in found if math.isfinite(point[0])]
        curves.append(Curve(run.name, line, _band(run, column) if mega == 1 else []))
    unit = "MB up" if mega > 1 else x
    title = column + (f" against {unit}" if mega > 1 else "")
    if column.endswith(_MEDIAN):
        title = f"{column.removesuffix(_MEDIAN)}: clients, median, p10 to p90"
    return chart(curves, title, unit, least=1.0 if x == "round" else 0.0)


def _band(run: Run, column: str) -> list[tuple[float, float, float]]:
    """Return the spread over clients of a median, that over seeds of all else."""
    if not column.endswith(_MEDIAN):
        return run.bands.get(column, [])
    whole = column.removesuffix(_MEDIAN)
    ends = [dict(points(run.rows, "round", whole + end)) for end in _TENTHS]
    both = sorted(ends[0].keys() & ends[1].keys())
    found = [(x, ends[0][x], ends[1][x]) for x in both]
    return [corner for corner in found if all(map(math.isfinite, corner))]
