"""Callbacks: what watches the rounds of a run, and knows nothing of its strategy.

::

    begin -> (configure -> [train, evaluate] -> round -> saved)* -> end

They work with any strategy, Flower's own too. What they see of a round is what may
leave the server: under a mechanism the released model, released metrics and those of
``evaluate_fn``. What they make of it, a choice of the best round or an earlier end, is
post-processing, which costs no privacy.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from logging import ERROR, WARNING
from pathlib import Path
from typing import Literal, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, ConfigRecordValues
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from flower_ext._flower import log
from flower_ext.core.arrays import Arrays, from_record, to_record
from flower_ext.core.errors import at_least as no_less
from flower_ext.core.errors import finite, one_of, positive, refuse, whole
from flower_ext.server.finished import PHASES, FinishedRound, RunInfo

Mode = Literal["min", "max"]
# What a strategy counts of its replies; no client has measured it.
_COUNTS = {"num-replies", "num-errors", "num-dropped"}
_BEST, _SECOND = "best.safetensors", "best-before.safetensors"


class Callback:
    """Watches the rounds of a run; the base of callbacks of one's own.

    None of the methods has to be overridden. What :meth:`begin` and :meth:`configure`
    raise ends the run. What :meth:`round` raises in the first round of a run, or of its
    continuation, ends it too, once the round is saved: the next would end the same way.
    Later the run goes on without, and the log says it once, with the traceback.

    Examples
    --------
    >>> from flwr.app import MetricRecord
    >>> class Print(Callback):
    ...     def round(self, this):
    ...         print(this.number, dict(this.train or {}))
    >>> Print().round(FinishedRound(1, train=MetricRecord({"loss": 0.5})))
    1 {'loss': 0.5}
    """

    #: Whether :attr:`FinishedRound.clients` is read.
    needs_clients: bool = False
    #: Whether :attr:`FinishedRound.messages` is read.
    needs_messages: bool = False

    @property
    def name(self) -> str:
        """Return what a checkpoint calls its state: of two alike the second has #2."""
        return type(self).__name__

    def begin(self, run: RunInfo) -> str | None:
        """Prepare for a run; return why it has already ended, or None."""
        return None

    def configure(self, server_round: int, config: ConfigRecord) -> None:
        """Change what clients are told, before the round's ``configure_train``."""

    def round(self, this: FinishedRound) -> str | None:
        """See a finished round; return why the run is to end with it, or None."""
        return None

    def end(self, error: BaseException | None) -> None:
        """Clean up after a run, however it has ended."""

    def state_dict(self) -> dict[str, object]:
        """Return what crosses rounds: JSON values and arrays, nested by name."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over a saved state; :meth:`begin` comes after it."""


class Callbacks:
    """The callbacks of one run as one: called in their order, saved by their names."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self._named: dict[str, Callback] = {}
        for callback in callbacks:
            if not isinstance(callback, Callback):
                cause = "an instance, not the class"
                refuse("callbacks", callback, "Callbacks", cause)
            name, number = callback.name, 1
            while name in self._named:
                number += 1
                name = f"{callback.name} #{number}"
            self._named[name] = callback
        self._restored: set[str] = set()
        self._begun: list[tuple[str, Callback]] = []
        self._seen = 0
        self._failed: dict[str, int] = {}
        self._first_error: Exception | None = None

    @property
    def need_clients(self) -> bool:
        """Whether any of them reads what single clients have replied."""
        return any(callback.needs_clients for callback in self._named.values())

    @property
    def need_messages(self) -> bool:
        """Whether any of them reads what single messages took."""
        return any(callback.needs_messages for callback in self._named.values())

    def begin(self, run: RunInfo) -> str | None:
        """Prepare all; return why the run has already ended, or None."""
        reasons = []
        for name, callback in self._named.items():
            # One without a state, such as a tracker, has nothing to be restored.
            restored = name in self._restored
            if run.done and not restored and callback.state_dict():
                log(WARNING, "%s was not part of the saved run: it starts anew", name)
            reasons.append(callback.begin(replace(run, restored=restored)))
            self._begun.append((name, callback))
        return next(filter(None, reasons), None)

    def configure(self, server_round: int, config: ConfigRecord) -> None:
        """Let all change what clients are told."""
        for callback in self._named.values():
            callback.configure(server_round, config)

    def round(self, this: FinishedRound) -> str | None:
        """Show all a finished round; return why the run is to end, or None.

        Whatever one of them raises, the others see the round.
        """
        self._seen += 1  # in this run or continuation: the first one judges mistakes
        reasons = []
        for name, callback in self._named.items():
            try:
                reasons.append(callback.round(this))
            except Exception as error:
                self._note(name, this.number, error)
        return next(filter(None, reasons), None)

    def _note(self, name: str, number: int, error: Exception) -> None:
        if self._seen == 1:
            self._first_error = self._first_error or error
        elif name not in self._failed:
            log(ERROR, "%s failed in round %s", name, number, exc_info=error)
        self._failed[name] = self._failed.get(name, 0) + 1

    def require_sound(self) -> None:
        """Raise what one of them has raised in the first round, which is saved."""
        if self._first_error is not None:
            raise self._first_error

    def end(self, error: BaseException | None) -> None:
        """Let all that have begun clean up; report what fails."""
        for name, callback in self._begun:
            try:
                callback.end(error)
            except Exception as problem:
                log(ERROR, "%s could not end", name, exc_info=problem)
        for name, times in self._failed.items():
            log(WARNING, "%s failed in %s of %s rounds", name, times, self._seen)

    def state_dict(self) -> dict[str, object]:
        """Return the states of all, by name."""
        states = {name: callback.state_dict() for name, callback in self._named.items()}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Give each its saved state; say which there is no callback for."""
        for name, saved in state.items():
            if name in self._named:
                self._named[name].load_state_dict(cast("Mapping[str, object]", saved))
                self._restored.add(name)
            else:
                log(WARNING, "%s was part of the saved run, and is not of this", name)


class _Watch(Callback):
    """Watches one metric, which must be there, and knows the best value so far."""

    def __init__(self, metric: str, mode: Mode | None) -> None:
        if not isinstance(metric, str) or metric.partition("/")[0] not in PHASES:
            cause = "'central/loss', 'evaluate/accuracy', 'train/loss'"
            refuse("metric", metric, "a metric with its phase before it", cause)
        if mode is None:
            mode = _direction(metric)
        self.metric = metric
        self.mode: Mode = cast(Mode, one_of("mode", mode, ("min", "max")))
        self.value: float | None = None
        self._run = RunInfo(0)
        self._known = False

    @property
    def name(self) -> str:
        """Return the class with the metric."""
        return f"{type(self).__name__}({self.metric})"

    def begin(self, run: RunInfo) -> str | None:
        """Prepare for a run, which must be able to have the metric."""
        if self.metric.startswith("central/") and not run.evaluates:
            cause = "the run has no evaluate_fn, which measures centrally"
            refuse("metric", self.metric, "one of train/ or evaluate/", cause)
        names = [f"evaluate/{name}" for name in run.noised]
        if names and self.metric.startswith("evaluate/") and self.metric not in names:
            cause = "the mechanism's PrivateEvaluation has no bounds for others"
            refuse("metric", self.metric, f"one of {names}", cause)
        if not run.restored:
            self.value = None
        # A saved run has had the metric, though the first round of its continuation,
        # which ``evaluate_fn`` may leave out, need not.
        self._run, self._known = run, self.value is not None
        return None

    def measured(self, this: FinishedRound) -> float | None:
        """Return the metric in a round; None where it was not measured.

        Raises
        ------
        ValueError
            If no round can have it, or it is no number.
        """
        row = this.row()
        if self.metric not in row:
            if not self._known and not self._may_come(this):
                self._refuse_unknown(this)
            return None
        found = row[self.metric]
        if not isinstance(found, int | float):
            refuse("metric", self.metric, "one that is a number", f"it is {found}")
        self._known = True
        return float(found)

    def _may_come(self, this: FinishedRound) -> bool:
        """Whether a later round may have what this one has not.

        ``evaluate_fn`` and clients under a mechanism may measure in some rounds only,
        and a round without usable replies has no metrics of clients.
        """
        phase = self.metric.partition("/")[0]
        if phase == "central":
            return not this.central
        if phase == "evaluate" and self._run.noised:
            return not this.evaluate
        if phase == "train" and not self._run.private:
            return this.train is not None and this.train.keys() <= _COUNTS
        return False

    def _refuse_unknown(self, this: FinishedRound) -> None:
        names = sorted(n for n in this.numbers() if n.partition("/")[0] in PHASES)
        near = get_close_matches(self.metric, names, 1)
        cause = f"did you mean {near[0]!r}?" if near else ""
        if self._run.withheld and not self.metric.startswith("central/"):
            cause = (
                "under the mechanism the clients' own metrics are withheld; "
                "evaluate_fn measures at the server, as central/..."
            )
        refuse("metric", self.metric, f"one that the rounds have, of {names}", cause)

    def improves(self, value: float, by: float = 0.0) -> bool:
        """Whether a value is better than the best so far; NaN never is."""
        if self.value is None:
            return not math.isnan(value)
        better = self.value - value if self.mode == "min" else value - self.value
        return better > by

    def state_dict(self) -> dict[str, object]:
        """Return the best value so far."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue with it."""
        self.value = cast("float | None", state["value"])


def _direction(metric: str) -> Mode:
    """Return which values of a metric are good, if its name says it."""
    if metric.endswith("accuracy"):
        return "max"
    if not metric.endswith(("loss", "error", "perplexity")):
        cause = f"{metric!r} does not say which is better"
        refuse("mode", None, "'min' or 'max'", cause)
    return "min"


class KeepBest(_Watch):
    """Keeps the model of the round with the best value of a metric.

    Of equal values the first round counts; NaN is never best. What ``start`` returns
    stays the last round's.

    Parameters
    ----------
    metric : str
        With its phase before it: ``"central/loss"``, ``"evaluate/accuracy"``.
    mode : {"min", "max"}, optional
        Which values are good. By default ``"min"`` for a loss, an error or a
        perplexity, ``"max"`` for an accuracy; others must say.
    folder : path, optional
        Keep it there, as ``best.safetensors``, and not in memory and in the checkpoint.

    Attributes
    ----------
    number : int or None
        The best round; None before the first.
    value : float or None
        Its value of the metric.

    Examples
    --------
    >>> from flwr.app import MetricRecord
    >>> best = KeepBest("central/loss")
    >>> for number, loss in enumerate([0.5, 0.25, 0.75], 1):
    ...     best.round(FinishedRound(number, central=MetricRecord({"loss": loss})))
    >>> best.number, best.value
    (2, 0.25)
    """

    def __init__(
        self, metric: str, mode: Mode | None = None, folder: Path | str | None = None
    ) -> None:
        super().__init__(metric, mode)
        self.number: int | None = None
        self.folder = None if folder is None else Path(folder).expanduser()
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._arrays: ArrayRecord | None = None

    @property
    def arrays(self) -> ArrayRecord:
        """The best round's model.

        Raises
        ------
        ValueError
            If no round was finished yet, or none has had a number.
        """
        if self.number is None:
            raise ValueError(f"no round has had a number for {self.metric} yet")
        if self.folder:
            return to_record(load_file(self.folder / _BEST))
        assert self._arrays is not None
        return self._arrays

    def begin(self, run: RunInfo) -> str | None:
        """Start anew, unless the run is continued."""
        super().begin(run)
        if not run.restored:
            self.number, self._arrays = None, None
        return None

    def round(self, this: FinishedRound) -> str | None:
        """Keep the model if none was better."""
        value = self.measured(this)
        if value is not None and self.improves(value):
            # The file first: where it cannot be written, the best so far stays.
            if self.folder:
                _write_best(self.folder, this.number, from_record(this.arrays))
            else:
                self._arrays = this.arrays
            self.number, self.value = this.number, value
        return None

    def state_dict(self) -> dict[str, object]:
        """Return the best round, with its model unless that is in a folder."""
        state = super().state_dict() | {"number": self.number}
        if self._arrays is not None:
            state["arrays"] = from_record(self._arrays)
        return state

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue with the best round so far."""
        super().load_state_dict(state)
        self.number = cast("int | None", state["number"])
        arrays = cast("Arrays | None", state.get("arrays"))
        if self.folder and arrays is not None:
            _write_best(self.folder, cast(int, self.number), arrays)
        elif self.folder and self.number is not None:
            _recall_best(self.folder, self.number)
        elif self.number is not None and arrays is None:
            raise ValueError(
                f"the best model of {self.metric} is not in the checkpoint: the saved "
                "run kept it in a folder, which this one must name, too"
            )
        else:
            self._arrays = None if arrays is None else to_record(arrays)


def _write_best(folder: Path, number: int, arrays: Arrays) -> None:
    """Write a best model; keep the one before it.

    A run that is killed before the round is saved plays the round again, and the model
    before is the best until then.
    """
    partial = folder / ".best.partial"
    arrays = {k: np.ascontiguousarray(x).reshape(x.shape) for k, x in arrays.items()}
    save_file(arrays, partial, metadata={"round": str(number)})
    if (folder / _BEST).exists():
        (folder / _BEST).replace(folder / _SECOND)
    partial.replace(folder / _BEST)


def _recall_best(folder: Path, number: int) -> None:
    """Make the model of a round the best again."""
    for path in (folder / _BEST, folder / _SECOND):
        if path.exists() and _round_of(path) == number:
            path.replace(folder / _BEST)
            return
    raise ValueError(f"{folder} lacks the best model, that of round {number}")


def _round_of(path: Path) -> int:
    with safe_open(path, "numpy") as file:
        return int((file.metadata() or {}).get("round", 0))


class StopWhen(_Watch):
    """Ends the run after a round: at a threshold, or without improvement.

    The log says why. A run that was ended so stays ended when it is started again with
    the same checkpoint, unless what is asked for has changed.

    Parameters
    ----------
    metric : str
        With its phase before it, such as ``"central/loss"``.
    at_least, at_most : float, optional
        End once the metric is there.
    patience : int, optional
        End after so many rounds in a row without a better value; rounds in which the
        metric was not measured do not count.
    min_change : float (default: 0.0)
        What is better by no more does not count; 0 counts every improvement.
    mode : {"min", "max"}, optional
        Which values are better, see :class:`KeepBest`.

    Examples
    --------
    >>> from flwr.app import MetricRecord
    >>> stop = StopWhen("central/accuracy", at_least=0.9)
    >>> stop.round(FinishedRound(7, central=MetricRecord({"accuracy": 0.925})))
    'central/accuracy is 0.925, at least 0.9'
    """

    def __init__(
        self,
        metric: str,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        patience: int | None = None,
        min_change: float = 0.0,
        mode: Mode | None = None,
    ) -> None:
        if at_least is at_most is patience is None:
            raise ValueError("StopWhen needs at_least, at_most or patience")
        # A threshold says itself which values are good.
        super().__init__(metric, mode if patience is not None else mode or "min")
        self.at_least = None if at_least is None else finite("at_least", at_least)
        self.at_most = None if at_most is None else finite("at_most", at_most)
        self.patience = None if patience is None else whole("patience", patience, 1)
        self.min_change = no_less("min_change", min_change, 0)
        self._last: float | None = None
        self._since = 0  # measured rounds since the best one

    def begin(self, run: RunInfo) -> str | None:
        """Return why a saved run has ended; else start anew."""
        super().begin(run)
        if not run.restored:
            self._last, self._since = None, 0
        return self._reason()

    def round(self, this: FinishedRound) -> str | None:
        """Return why the run is to end, if so."""
        value = self.measured(this)
        if value is None:
            return None
        self._last = value
        self._since += 1  # 0 again, if it is the best
        if self.improves(value, self.min_change):
            self.value, self._since = value, 0
        return self._reason()

    def _reason(self) -> str | None:
        """Return what of the last measured round ends the run."""
        if self._last is None:
            return None
        now = f"{self.metric} is {self._last:.6g}"
        if self.at_least is not None and self._last >= self.at_least:
            return f"{now}, at least {self.at_least:g}"
        if self.at_most is not None and self._last <= self.at_most:
            return f"{now}, at most {self.at_most:g}"
        if self.patience is not None and self._since >= self.patience:
            best = "a number" if self.value is None else f"better than {self.value:.6g}"
            return f"{self.metric} was not {best} for {self._since} rounds"
        return None

    def state_dict(self) -> dict[str, object]:
        """Return the best and the last value, and the rounds between."""
        return super().state_dict() | {"last": self._last, "since": self._since}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue with them."""
        super().load_state_dict(state)
        self._last = cast("float | None", state["last"])
        self._since = cast(int, state["since"])


class StopAfter(Callback):
    """Ends the run after the round in which its time is up.

    Parameters
    ----------
    seconds : float
        Of the whole run, that before an interruption included. Refused where cohorts
        are secret, since the number of rounds would tell how long they took.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = positive("seconds", seconds)
        self._spent = 0.0
        self._clock = 0.0

    def begin(self, run: RunInfo) -> str | None:
        """Start the clock, or go on with that of a saved run."""
        if run.hidden:
            cause = "cohorts are secret, and time tells of them"
            refuse("StopAfter's seconds", self.seconds, "left out", cause)
        self._spent = self._spent if run.restored else 0.0
        self._clock = time.monotonic()
        return self._reason()

    def round(self, this: FinishedRound) -> str | None:
        """Return that time is up, if so."""
        now = time.monotonic()
        self._spent, self._clock = self._spent + now - self._clock, now
        return self._reason()

    def _reason(self) -> str | None:
        if self._spent < self.seconds:
            return None
        return f"it has taken {self._spent:.0f} s, of {self.seconds:g} allowed"

    def state_dict(self) -> dict[str, object]:
        """Return the time that was spent."""
        return {"spent": self._spent}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue with it."""
        self._spent = cast(float, state["spent"])


class Schedule(Callback):
    """Sets one value of ``train_config`` anew in every round.

    It is set before ``configure_train``, also of a run that is continued; one that is
    continued with another schedule of the rounds that are done is refused.

    Parameters
    ----------
    key : str
        Of the value in ``train_config``, such as ``"lr"``; added if missing.
    schedule : callable
        ``round -> value``, from 1: one of :mod:`flower_ext.core.schedules`, or any
        function that depends on nothing else. It is tried for every round before the
        first one.

    Examples
    --------
    >>> from flower_ext.core.schedules import Cosine
    >>> config = ConfigRecord({"lr": 1.0})
    >>> Schedule("lr", Cosine(0.1, rounds=50)).configure(26, config)
    >>> round(config["lr"], 4)
    0.05
    """

    def __init__(self, key: str, schedule: Callable[[int], ConfigRecordValues]) -> None:
        if not isinstance(key, str):
            refuse("key", key, "the name of a value in train_config")
        if not callable(schedule):
            refuse("schedule", schedule, "a function of the round", "Cosine(0.1, 50)")
        self.key = key
        self.schedule = schedule
        self._last: dict[str, object] | None = None  # round and value

    @property
    def name(self) -> str:
        """Return the class with the key."""
        return f"{type(self).__name__}({self.key})"

    def _value(self, server_round: int) -> ConfigRecordValues:
        value = self.schedule(server_round)
        return value.item() if isinstance(value, np.generic) else value

    def begin(self, run: RunInfo) -> str | None:
        """Try the schedule for all rounds to come."""
        for server_round in range(run.done + 1, run.num_rounds + 1):
            value = self._value(server_round)
            try:
                ConfigRecord({self.key: value})
            except (TypeError, ValueError):
                what = f"{self.key!r} of round {server_round}"
                refuse(what, value, "a number, a text, a flag, bytes, or a list of one")
        return None

    def configure(self, server_round: int, config: ConfigRecord) -> None:
        """Set the value of the round."""
        config[self.key] = self._value(server_round)
        self._last = {"round": server_round, "value": repr(config[self.key])}

    def state_dict(self) -> dict[str, object]:
        """Return what the last round's value was."""
        return {"last": self._last}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Compare it with what this schedule gives.

        Raises
        ------
        ValueError
            If that is another value.
        """
        last = cast("dict[str, object] | None", state["last"])
        if last is None:
            return
        server_round = cast(int, last["round"])
        if (now := repr(self._value(server_round))) != last["value"]:
            raise ValueError(
                f"{self.key!r} was {last['value']} in round {server_round}, by this "
                f"schedule it would be {now}"
            )
