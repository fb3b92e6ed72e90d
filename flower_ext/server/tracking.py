"""Metrics of every round: JSONL, a line of progress, TensorBoard, and plots."""

import json
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from logging import ERROR, INFO
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import MetricRecord

from flower_ext._flower import log
from flower_ext.core.errors import refuse
from flower_ext.core.strict_json import numbers, write
from flower_ext.wire.traffic import Traffic

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
RUN_FILE = "run.json"
# Whose versions decide what a run computes.
_PACKAGES = ("flower-ext", "flwr", "ray", "torch", "numpy", "transformers", "peft")
# Columns of what is spent in a round, which a plot adds up over the rounds.
_SPENT = ("bytes/", "encoded-bytes/", "parameters/", "messages/", "seconds/")


@dataclass
class Round:
    """What happened in one round.

    Attributes
    ----------
    server_round : int
        From 1.
    train, evaluate, central : MetricRecord or None
        Metrics of the clients' training, of their evaluation, of ``evaluate_fn``.
    seconds_train, seconds_evaluate : float or None
        From the first message sent to the last reply received.
    down, up : Traffic or None
        What was sent to and received from all clients, both phases. Seconds and
        traffic are None where they are withheld, since they tell a secret cohort.
    """

    server_round: int
    train: MetricRecord | None = None
    evaluate: MetricRecord | None = None
    central: MetricRecord | None = None
    seconds_train: float | None = 0.0
    seconds_evaluate: float | None = 0.0
    down: Traffic | None = Traffic()
    up: Traffic | None = Traffic()

    def row(self) -> dict[str, object]:
        """Return the round as one flat table, ``train/loss`` and the like."""
        row: dict[str, object] = {"round": self.server_round}
        for phase in ("train", "evaluate", "central"):
            for key, value in (getattr(self, phase) or {}).items():
                row[f"{phase}/{key}"] = value
        for phase in ("train", "evaluate"):
            if (seconds := getattr(self, f"seconds_{phase}")) is not None:
                row[f"seconds/{phase}"] = round(seconds, 4)
        for way, traffic in (("down", self.down), ("up", self.up)):
            if traffic is None:
                continue
            row |= {
                f"bytes/{way}": traffic.serialized,
                f"encoded-bytes/{way}": traffic.encoded,
                f"parameters/{way}": traffic.parameters,
                f"messages/{way}": traffic.messages,
            }
        return row


class Tracker:
    """Writes every round to ``metrics.jsonl`` and logs one line of progress.

    Each line is strict JSON; a metric that is not finite is there by its name, such as
    ``"nan"`` or ``"-inf"``, of which :func:`read_metrics` makes a number again.

    Parameters
    ----------
    folder : path
        Results folder of one run; made if missing. A run that is continued keeps the
        rounds before; a new run starts the file anew, and the curves of TensorBoard.
    tensorboard : bool, optional
        Write TensorBoard events too; by default if the package is installed.
    """

    def __init__(self, folder: Path | str, tensorboard: bool | None = None) -> None:
        self.folder = Path(folder).expanduser()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / METRICS_FILE
        installed = find_spec("tensorboard") is not None
        if tensorboard and not installed:
            refuse("tensorboard", True, "False", "the package is not installed")
        self._tensorboard = installed if tensorboard is None else tensorboard
        self._events: SummaryWriter | None = None
        self._num_rounds = 0
        self._done = 0
        self._begun = 0.0

    def begin(
        self, num_rounds: int, done: int, about: Mapping[str, object] | None = None
    ) -> None:
        """Start a run of ``num_rounds`` of which ``done`` were done before.

        What is known ``about`` it, such as strategy and settings, is written to
        ``run.json``, with the time and the versions of the packages.
        """
        described = {
            "started": datetime.now().astimezone().isoformat(" ", "seconds"),
            **(about or {}),
            "versions": _versions(),
        }
        text = write(described, indent=2, default=str)
        (self.folder / RUN_FILE).write_text(text + "\n", "utf-8")
        kept = [r for r in read_metrics(self.path) if int(str(r["round"])) <= done]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(write(row) + "\n" for row in kept), "utf-8")
        partial.replace(self.path)
        self._num_rounds, self._done = num_rounds, done
        self._begun = time.monotonic()
        if self._tensorboard:
            self._open_events(done + 1)

    def round(self, this: Round) -> None:
        """Record one round; a disk that does not take it is reported, not fatal."""
        row = this.row()
        try:
            self._append(write(row) + "\n")
        except OSError as error:
            log(ERROR, "round %s is not in %s: %s", row["round"], self.path, error)
        if self._tensorboard:
            try:
                self._write_events(row)
            except OSError as error:
                self._events = None  # its thread has ended; the next round has another
                log(ERROR, "round %s is not in TensorBoard: %s", row["round"], error)
        log(INFO, "%s", self._progress(row))

    def _append(self, line: str) -> None:
        """Append a line, or nothing: half a line would spoil the next one."""
        end = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, end)
            raise

    def _progress(self, row: Mapping[str, object]) -> str:
        number = int(str(row["round"]))
        spent = time.monotonic() - self._begun
        left = spent / max(number - self._done, 1) * (self._num_rounds - number)
        times = [f"{spent:.0f} s, {left:.0f} s left"] if "seconds/train" in row else []
        shown = [
            f"{key} {value:.4g}"
            for key, value in row.items()
            if isinstance(value, float) and key.endswith(("loss", "accuracy"))
        ]
        return " | ".join(
            [
                f"{self.folder.name}: round {number}/{self._num_rounds}",
                *shown[:4],
                *times,
            ]
        )

    def _write_events(self, row: Mapping[str, object]) -> None:
        number = int(str(row["round"]))
        if self._events is None:
            self._open_events(number)
        assert self._events is not None
        for key, value in row.items():
            if isinstance(value, int | float) and key != "round":
                self._events.add_scalar(key, value, number)
        self._events.flush()

    def _open_events(self, number: int) -> None:
        """Begin a file of events; those of the round and later are void."""
        from torch.utils.tensorboard import SummaryWriter

        # Files are read in the order of their names, which tell no more than seconds.
        while any(self.folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
            time.sleep(0.05)
        self._events = SummaryWriter(str(self.folder), purge_step=number)
        self._events.flush()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def read_metrics(path: Path | str) -> list[dict[str, object]]:
    """Read ``metrics.jsonl``, or that file in a results folder; [] if missing.

    Metrics that are not finite are numbers again, NaN and infinities.
    A last line that was cut off by an interruption is left out.
    """
    path = Path(path).expanduser()
    path = path / METRICS_FILE if path.is_dir() else path
    if not path.exists():
        return []
    return list(_rows(path.read_text("utf-8").splitlines()))


def _rows(lines: Iterable[str]) -> Iterator[dict[str, object]]:
    for line in lines:
        try:
            yield numbers(json.loads(line))
        except json.JSONDecodeError:
            return


def plot(
    runs: Mapping[str, Path | str],
    metrics: Iterable[str],
    output: Path | str,
    *,
    x: str = "round",
    title: str = "",
) -> Path:
    """Draw metrics of any number of runs, one panel a metric, and save the picture.

    Parameters
    ----------
    runs : Mapping[str, path]
        Label and results folder (or ``metrics.jsonl``) of each run.
    metrics : iterable of str
        Columns such as ``"evaluate/loss"``; a run without one is left out of it. A
        curve is broken where its metric is not finite; a cross at the upper edge shows
        the place.
    output : path
        Where to save; the suffix says the format (png, svg, pdf).
    x : str (default: "round")
        Column of the horizontal axis; ``"bytes/up"`` and other columns of bytes,
        parameters, messages and seconds are added up over the rounds.
    title : str
        Above the picture.

    Raises
    ------
    ValueError
        If no run has any of the metrics, or the column ``x``.
    """
    from matplotlib.figure import Figure

    metrics = list(metrics)
    rows = {label: read_metrics(path) for label, path in runs.items()}
    columns = {column for found in rows.values() for row in found for column in row}
    if not columns.intersection(metrics):
        raise ValueError(
            f"metrics={metrics} must be in at least one of the runs {list(runs)}: "
            "the runs have written nothing, or the names differ"
        )
    if x not in columns:
        refuse("x", x, f"one of {sorted(columns)}")
    figure = Figure(figsize=(5 * len(metrics), 3.6))
    panels = figure.subplots(1, len(metrics), squeeze=False)
    for panel, metric in zip(panels[0], metrics, strict=True):
        for label, found in rows.items():
            line = list(points(found, x, metric))
            if line:
                [curve] = panel.plot(*zip(*line, strict=True), marker=".", label=label)
                if lost := [at for at, value in line if not math.isfinite(value)]:
                    panel.plot(
                        lost,
                        [0.97] * len(lost),
                        transform=panel.get_xaxis_transform(),
                        color=curve.get_color(),
                        linestyle="",
                        marker="x",
                    )
        panel.set(xlabel=x, ylabel=metric)
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend()
    figure.suptitle(title)
    figure.tight_layout()
    output = Path(output).expanduser()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
    return output


def points(
    rows: list[dict[str, object]], x: str, metric: str
) -> Iterator[tuple[float, float]]:
    """Yield a metric against ``x``, which is added up if it is something spent."""
    position = 0.0
    for row in rows:
        if isinstance(value := row.get(x), int | float):
            position = position + value if x.startswith(_SPENT) else value
        if isinstance(value := row.get(metric), int | float):
            yield position, value
