"""Metrics of every round: JSONL, a line of progress, TensorBoard, and plots."""

import json
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from logging import ERROR, INFO
from pathlib import Path
from typing import TYPE_CHECKING

from flower_ext._flower import log
from flower_ext.core.errors import refuse
from flower_ext.core.strict_json import numbers, write
from flower_ext.server.callbacks import Callback
from flower_ext.server.finished import FinishedRound, RunInfo

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
CLIENTS_FILE = "clients.jsonl"
RUN_FILE = "run.json"
# Packages whose versions decide what a run computes.
_PACKAGES = ("flower-ext", "flwr", "ray", "torch", "numpy", "transformers", "peft")
# Columns of what is spent in a round, which a plot adds up over the rounds.
_SPENT = ("bytes/", "encoded-bytes/", "parameters/", "messages/", "seconds/")


class Tracker(Callback):
    """Writes every round to ``metrics.jsonl`` and logs one line of progress.

    Each line is strict JSON. A metric that is not finite is written by its name, such
    as ``"nan"`` or ``"-inf"``, which :func:`read_metrics` turns back into a number.

    Parameters
    ----------
    folder : path
        Results folder of one run; made if missing. A run that is continued keeps the
        earlier rounds; a new run starts the file and TensorBoard's curves anew.
    tensorboard : bool, optional
        Write TensorBoard events too; by default if the package is installed.
    per_client : bool (default: False)
        Also write the replies of single clients to ``clients.jsonl``: one line for each
        client and phase, with its metrics and bytes. Refused under a mechanism, whose
        epsilon does not cover the metrics of a single client.
    """

    def __init__(
        self,
        folder: Path | str,
        tensorboard: bool | None = None,
        *,
        per_client: bool = False,
    ) -> None:
        self.folder = Path(folder).expanduser()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / METRICS_FILE
        self.needs_clients = per_client
        installed = find_spec("tensorboard") is not None
        if tensorboard and not installed:
            refuse("tensorboard", True, "False", "the package is not installed")
        self._tensorboard = installed if tensorboard is None else tensorboard
        self._events: SummaryWriter | None = None
        self._num_rounds = 0
        self._done = 0
        self._begun = 0.0

    @property
    def name(self) -> str:
        """Return the class with the folder's name."""
        return f"{type(self).__name__}({self.folder.name})"

    def begin(self, run: RunInfo) -> str | None:
        """Describe the run in ``run.json``, and keep the rounds that were done."""
        if self.needs_clients and run.private:
            refuse(
                "per_client",
                True,
                "False under a mechanism",
                "what a single client has measured is not covered by epsilon",
            )
        described = {
            "started": datetime.now().astimezone().isoformat(" ", "seconds"),
            "strategy": run.strategy,
            "settings": run.settings,
            "versions": _versions(),
        }
        text = write(described, indent=2, default=str)
        (self.folder / RUN_FILE).write_text(text + "\n", "utf-8")
        _keep(self.path, run.done)
        if self.needs_clients or (self.folder / CLIENTS_FILE).exists():
            _keep(self.folder / CLIENTS_FILE, run.done)
        self._num_rounds, self._done = run.num_rounds, run.done
        self._begun = time.monotonic()
        self._events = None
        if self._tensorboard:
            self._open_events(run.done + 1)
        return None

    def round(self, this: FinishedRound) -> str | None:
        """Record one round; a disk that fails is logged and ends nothing."""
        row = this.row()
        self._append(METRICS_FILE, this.number, [row])
        if self.needs_clients:
            rows = [reply.row(this.number) for reply in this.clients]
            self._append(CLIENTS_FILE, this.number, rows)
        if self._tensorboard:
            try:
                self._write_events(this)
            except OSError as error:
                self._events = None  # its thread has ended; the next round has another
                log(ERROR, "round %s is not in TensorBoard: %s", this.number, error)
        log(INFO, "%s", self._progress(row))
        return None

    def _append(self, name: str, number: int, rows: list[dict[str, object]]) -> None:
        """Append a round's lines, or none: half a line would spoil the next one."""
        path = self.folder / name
        end = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(write(row) + "\n" for row in rows))
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, end)
            log(ERROR, "round %s is not in %s: %s", number, path, error)

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

    def _write_events(self, this: FinishedRound) -> None:
        if self._events is None:
            self._open_events(this.number)
        assert self._events is not None
        for key, value in this.numbers().items():
            self._events.add_scalar(key, value, this.number)
        self._events.flush()

    def _open_events(self, number: int) -> None:
        """Begin a file of events; those of the round and later are void."""
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard reads files in the order of their names, which hold whole seconds:
        # a second file in the same second could be read first.
        while any(self.folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
            time.sleep(0.05)
        self._events = SummaryWriter(str(self.folder), purge_step=number)
        self._events.flush()


def _keep(path: Path, done: int) -> None:
    """Keep the rows of the rounds that were done; the others will be written anew."""
    # By a rename, so that an interruption loses no row.
    kept = [row for row in _read(path) if int(str(row["round"])) <= done]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(write(row) + "\n" for row in kept), "utf-8")
    partial.replace(path)


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
    return _read(path / METRICS_FILE if path.is_dir() else path)


def read_clients(path: Path | str) -> list[dict[str, object]]:
    """Read ``clients.jsonl``, or that file in a results folder; [] if missing.

    Each row has ``round``, ``phase``, ``client`` (its place among the nodes, the same
    in every run) and ``bytes/up``, and either the client's metrics, such as
    ``train/num-examples``, or ``error``, the reason of its failure.
    """
    path = Path(path).expanduser()
    return _read(path / CLIENTS_FILE if path.is_dir() else path)


def _read(path: Path) -> list[dict[str, object]]:
    if not path.exists():
        return []
    return list(_rows(path.read_text("utf-8").splitlines()))


def _rows(lines: Iterable[str]) -> Iterator[dict[str, object]]:
    for line in lines:
        try:
            yield numbers(json.loads(line))
        except json.JSONDecodeError:  # cut off by an interruption
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
