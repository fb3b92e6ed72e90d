"""One HTML page of results folders: plots, tables, settings, what was spent.

The page is one file without scripts that refers to no other: it can be mailed, kept
beside a paper, and read on a telephone.
"""

import base64
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

from flower_ext.server.tracking import METRICS_FILE, RUN_FILE, points, read_metrics

SUMMARY_FILE = "summary.json"

Row = dict[str, object]

# Columns worth a plot of their own; the others are in the table of the rounds.
_DRAWN = ("loss", "accuracy", "acc", "epsilon", "gm-appeal", "barrier")
_COLOURS = 8

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
.plots { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; } figcaption { font-weight: 600; }
svg { width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: currentColor; } svg .grid { stroke: var(--line); }
svg polyline { fill: none; stroke: currentColor; stroke-width: 1.8; }
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
    """What one run left in its folder."""

    name: str
    rows: list[Row]
    about: Mapping[str, object]


@dataclass
class Comparison:
    """Runs that lie side by side in one folder, and what their app wrote of them."""

    folder: Path
    runs: list[Run]
    summary: Mapping[str, object]


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
    return [_comparison(folder, runs[folder]) for folder in sorted(runs)]


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
    sections = "\n".join(map(_section, comparisons))
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
{sections}
</body>
</html>
"""


def _section(comparison: Comparison) -> str:
    runs = comparison.runs
    parts = [f"<h2>{escape(comparison.folder.name)}</h2>"]
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
        last = escape(str(summary.get("rounds-averaged", "")))
        yield f"<h3>Means of the last {last} rounds</h3>"
        yield _html_table(
            ["", *map(str, columns.values())],
            [
                [
                    name,
                    *(
                        _cell(column, _table(runs, name).get(column))
                        for column in columns
                    ),
                ]
                for name in runs
            ],
        )


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
    panels = [(column, "round") for column in dict.fromkeys([*asked, *drawn])]
    if panels:  # what a byte buys is the question of half of the strategies
        panels.insert(1, (panels[0][0], "bytes/up"))
    charts = [_chart(runs, column, x) for column, x in panels]
    names = "".join(
        f'<li><svg viewBox="0 0 24 8"><polyline class="{_look(i)}" '
        f'points="0,4 24,4"/></svg> {escape(run.name)}</li>'
        for i, run in enumerate(runs)
    )
    return f'<ul class="legend">{names}</ul><div class="plots">{"".join(charts)}</div>'


def _look(line: int) -> str:
    return f"s{line % _COLOURS}" + (" dashed" if line // _COLOURS % 2 else "")


def _chart(runs: Sequence[Run], column: str, x: str) -> str:
    """Draw a column of all runs; ``""`` if none has a number in it.

    A curve is broken where its number is not finite; a cross at the upper edge says so.
    """
    mega = 1e6 if "bytes/" in x else 1.0
    lines = {
        i: [(a / mega, b) for a, b in points(run.rows, x, column) if math.isfinite(a)]
        for i, run in enumerate(runs)
    }
    every = [point for line in lines.values() for point in line]
    if not every:
        return ""
    finite = [b for _, b in every if math.isfinite(b)] or [0.0, 1.0]
    across = _ticks([a for a, _ in every], least=1.0 if x == "round" else 0.0)
    along = _ticks(finite)
    left, right, top, bottom = 48, 344, 8, 170  # of 360 x 200; the rest is for text

    def place(a: float, b: float) -> tuple[float, float]:
        share_a = (a - across[0]) / (across[-1] - across[0])
        share_b = (b - along[0]) / (along[-1] - along[0])
        return left + share_a * (right - left), bottom - share_b * (bottom - top)

    drawn = []
    for tick in along:
        _, y = place(across[0], tick)
        drawn.append(
            f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{tick:.5g}</text>'
        )
    for tick in across:
        where, _ = place(tick, along[0])
        drawn.append(
            f'<text x="{where:.1f}" y="{bottom + 15}" text-anchor="middle">{tick:.5g}'
            "</text>"
        )
    for i, line in lines.items():
        size = 2 if len(line) <= 40 else 1.2
        for is_finite, group in groupby(line, lambda point: math.isfinite(point[1])):
            part = list(group)
            placed = [place(a, b if is_finite else along[-1]) for a, b in part]
            if is_finite:
                corners = " ".join(f"{a:.1f},{b:.1f}" for a, b in placed)
                drawn.append(f'<polyline class="{_look(i)}" points="{corners}"/>')
            for (a, b), (at_x, at_y) in zip(part, placed, strict=True):
                said = f"<title>{escape(f'{runs[i].name}: {b:.5g} at {a:.5g}')}</title>"
                drawn.append(
                    f'<circle class="{_look(i)}" r="{size}" cx="{at_x:.1f}" '
                    f'cy="{at_y:.1f}">{said}</circle>'
                    if is_finite
                    else f'<path class="{_look(i)}" d="M{at_x - 3:.1f} {at_y - 3:.1f}'
                    f'l6 6m0 -6l-6 6">{said}</path>'
                )
    unit = "MB up" if mega > 1 else x
    title = column + (f" against {unit}" if mega > 1 else "")
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 360 200" role="img" aria-label="{escape(title)}">'
        f'{"".join(drawn)}<text x="200" y="198" text-anchor="middle">{escape(unit)}'
        "</text></svg></figure>"
    )


def _ticks(values: Sequence[float], least: float = 0.0) -> list[float]:
    """Return round numbers from below all values to above, ``least`` or more apart.

    Examples
    --------
    >>> _ticks([1, 10])
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    >>> _ticks([2.5, 2.5])
    [2.0, 2.2, 2.4, 2.6, 2.8, 3.0]
    >>> _ticks([1, 2], least=1.0)
    [1.0, 2.0]
    """
    low, high = min(values), max(values)
    # Of one value some room around it, so that the curve has a height.
    if low == high:
        low, high = low - (abs(low) or 1) / 5, high + (abs(high) or 1) / 5
    rough = (high - low) / 5
    # About five steps, of 1, 2 or 5 times a power of ten. A step that is too small by a
    # rounding error alone is taken.
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    step = max(step, least)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Multiples of the step, since adding it up would show as 0.30000000000000004.
    return [round(i * step, 12) for i in range(first, last + 1)]
