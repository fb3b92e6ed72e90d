"""Samplers that hear what clients report, and leave some out."""

import math
from collections.abc import Mapping, Sequence
from logging import INFO, WARNING
from typing import cast, get_args

from flower_ext._flower import log
from flower_ext.core.errors import (
    at_least,
    finite,
    one_of,
    refuse,
    whole,
    yes_or_no,
)
from flower_ext.core.participation import gain
from flower_ext.core.sampling.base import (
    Guarantee,
    Purpose,
    Recognising,
    Sampler,
    TooFewClients,
    UniformSampler,
)


class Choosing(Recognising):
    """Leaves out of the cohorts of another sampler those who do not take part."""

    hears = True

    def __init__(self, sampler: Sampler | None, metric: str, purpose: Purpose) -> None:
        if not isinstance(sampler, Sampler | None):
            refuse("sampler", sampler, "a Sampler", "an instance, not the class")
        if sampler is not None and sampler.hears:
            refuse("sampler", type(sampler).__name__, "one that hears no reports")
        self.of = UniformSampler() if sampler is None else sampler
        super().__init__(self.of.seed, same_for_evaluation=self.of.same_for_evaluation)
        self.metric = metric
        self.purpose: Purpose = one_of("purpose", purpose, get_args(Purpose))  # type: ignore[assignment]
        self._warned = False

    def expected_size(self, size: int, population: int) -> float:
        """Return the size of a cohort while everybody takes part."""
        return self.of.expected_size(size, population)

    def guarantee(self) -> Guarantee:
        """Return no limit but those of the other sampler; who is drawn is no secret."""
        of = self.of.guarantee()
        return Guarantee(
            kind="limited",
            min_separation=of.min_separation,
            max_participations=of.max_participations,
        )

    def _read(
        self, reports: Mapping[int, Mapping[str, float]], *names: str
    ) -> dict[int, list[float]]:
        """Return metrics of those who report all of them, by the clients' numbers."""
        found = {
            client: [report[name] for name in names]
            for client, report in reports.items()
            if all(name in report for name in names)
        }
        if reports and not found and not self._warned:
            self._warned = True
            known = sorted(next(iter(reports.values())))
            kind = type(self).__name__
            log(WARNING, "%s: no client reports %s, but %s", kind, names, known)
        numbers = self._registry.number(list(found))
        return {numbers[client]: values for client, values in found.items()}

    def settings(self) -> dict[str, str | int | float]:
        """Add the metric, and the settings of the other sampler."""
        own = {"metric": self.metric, "purpose": self.purpose}
        of = {f"of-{key}": x for key, x in self.of.settings().items()}
        return {**super().settings(), **own, **of}

    def state_dict(self) -> dict[str, object]:
        """Add the state of the other sampler."""
        return {**super().state_dict(), "of": self.of.state_dict()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over the state of both."""
        super().load_state_dict(state)
        self.of.load_state_dict(cast("Mapping[str, object]", state["of"]))


class ConvergedClients(Choosing):
    """Asks those clients no more whose metric has come to rest.

    A client whose last ``window`` reports of a metric lie within ``tolerance`` of each
    other has converged: it is neither asked to train nor to evaluate again, in this
    run, so that it causes no further message. Its place in a cohort stays empty: a
    cohort is that of another sampler, less those who have stopped. Once all have, the
    run ends after the round, and the log says so.

    Parameters
    ----------
    sampler : Sampler, optional
        What draws the cohorts; :class:`UniformSampler` by default.
    metric : str (default: "loss")
        What clients report, a number.
    window : int (default: 5)
        How many reports of a client in a row, at least 2.
    tolerance : float (default: 0.01)
        At least 0: most that the largest of them exceeds the smallest.
    purpose : {"evaluate", "train"} (default: "evaluate")
        Whether the metrics are those of evaluations or of trainings. A client that is
        never asked to evaluate reports none: with a ``fraction_evaluate`` of 0 nobody
        ever stops.

    Notes
    -----
    The defaults are those of FedFitTech (a baseline of early stopping in federated
    activity recognition), where a client compares its validation scores and answers
    without a model; here the server compares them and does not ask. A client that comes
    to rest far from where others would bring it stays there: a wider window, or a
    tighter tolerance, costs messages and waits. Metrics of evaluations are means over
    those who are still asked; an ``evaluate_fn`` of the server is of all.

    **Privacy.** Whom it asks depends on what clients say of their data, and who is
    asked shows it. Under a mechanism it is refused. So are asynchronous runs, whose
    places are filled one by one.

    Examples
    --------
    >>> sampler = ConvergedClients(metric="accuracy", window=2)
    >>> for accuracy in (0.8, 0.805):
    ...     sampler.hear({0: {"accuracy": accuracy}, 1: {"accuracy": 0.1}}, "evaluate")
    >>> sampler.sample(range(3), 3, 1, "train")
    [2]
    """

    def __init__(
        self,
        sampler: Sampler | None = None,
        *,
        metric: str = "loss",
        window: int = 5,
        tolerance: float = 0.01,
        purpose: Purpose = "evaluate",
    ) -> None:
        super().__init__(sampler, metric, purpose)
        self.window = whole("window", window, 2)
        self.tolerance = at_least("tolerance", tolerance, 0)
        self._last: dict[int, list[float]] = {}
        self._stopped: set[int] = set()

    @property
    def num_stopped(self) -> int:
        """How many clients are not asked any more."""
        return len(self._stopped)

    def sample(
        self, clients: Sequence[int], size: int, server_round: int, purpose: Purpose
    ) -> list[int]:
        """Return the other sampler's cohort, less those who have stopped.

        Raises
        ------
        TooFewClients
            If all clients have, which ends the run.
        """
        numbers = self._registry.number(clients)
        if clients and self._stopped >= set(numbers.values()) and purpose == "train":
            raise TooFewClients(
                f"all {len(clients)} clients have converged: the last {self.window} "
                f"values of {self.metric!r} of each are within {self.tolerance:g}"
            )
        cohort = self.of.sample(clients, size, server_round, purpose)
        return [client for client in cohort if numbers[client] not in self._stopped]

    def hear(
        self, reports: Mapping[int, Mapping[str, float]], purpose: Purpose
    ) -> None:
        """See who has come to rest."""
        if purpose != self.purpose:
            return
        most = self.tolerance * (1 + 1e-9)  # 0.81 - 0.80 is more than 0.01
        for number, (value,) in self._read(reports, self.metric).items():
            last = [*self._last.get(number, []), value][-self.window :]
            self._last[number] = last
            if len(last) == self.window and max(last) - min(last) <= most:
                self._stopped.add(number)
                log(INFO, "A client has converged, %s so far", len(self._stopped))

    def guarantee(self) -> Guarantee:
        """Return the limits of the other sampler."""
        return super().guarantee()

    def settings(self) -> dict[str, str | int | float]:
        """Add window and tolerance."""
        own = {"window": self.window, "tolerance": self.tolerance}
        return {**super().settings(), **own}

    def state_dict(self) -> dict[str, object]:
        """Add the last reports of every client, and who has stopped."""
        last = [[number, *values] for number, values in self._last.items()]
        own = {"last": last, "stopped": sorted(self._stopped)}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over who has stopped."""
        super().load_state_dict(state)
        saved = cast("Mapping[str, list[list[float]]]", state)
        self._last = {int(number): values for number, *values in saved["last"]}
        self._stopped = set(cast("list[int]", state["stopped"]))


class ParticipationGame(Choosing):
    r"""Trains those clients only to whom the common model is worth its price.

    After each evaluation a client compares the metric of the common model on its own
    data with what it has alone, less its cost, and opts in or out of training:

    .. math:: \text{inside} \iff a_i - L_i - c_i + p_i \ge 0.

    All are asked to evaluate, so that those outside may come back. A cohort is that of
    another sampler, less those outside. Before its first report a client is inside,
    unless its cost is infinite.

    Parameters
    ----------
    sampler : Sampler, optional
        What draws the cohorts; :class:`UniformSampler` by default.
    local : float, sequence of float or str
        :math:`L_i`: one number for all clients, one for each in their order, or the
        name of a metric that they report with the other, such as ``accuracy`` beside
        ``received-accuracy`` of personal models.
    costs : float or sequence of float (default: 0.0)
        :math:`c_i \ge 0`, in units of the metric; infinity never takes part.
    payments : float or sequence of float (default: 0.0)
        :math:`p_i \ge 0`, what a client is paid for being inside, in the same units:
        see :class:`~flower_ext.core.participation.NetworkGame` for the smallest that
        make an equilibrium.
    metric : str (default: "accuracy")
        :math:`a_i`, which clients report.
    larger_is_better : bool (default: True)
        False for a loss, whose signs are turned.

    Notes
    -----
    If all are outside no messages ask for training, the model stays and the log says
    so; a client comes back if a later evaluation tells it to.

    That clients compare the common model with their own is from the abstract of the
    paper (arXiv 2302.08533). What exactly they compare, and that they answer at once
    after each evaluation, is ours.

    **Privacy.** As :class:`ConvergedClients`: refused under a mechanism, and in
    asynchronous runs.

    Examples
    --------
    >>> game = ParticipationGame(local=0.6, costs=[0.0, 0.2], metric="accuracy")
    >>> game.hear({0: {"accuracy": 0.7}, 1: {"accuracy": 0.7}}, "evaluate")
    >>> game.sample(range(2), 2, 1, "train"), game.sample(range(2), 2, 1, "evaluate")
    ([0], [0, 1])
    """

    def __init__(
        self,
        sampler: Sampler | None = None,
        *,
        local: float | Sequence[float] | str,
        costs: float | Sequence[float] = 0.0,
        payments: float | Sequence[float] = 0.0,
        metric: str = "accuracy",
        larger_is_better: bool = True,
    ) -> None:
        super().__init__(sampler, metric, "evaluate")
        self.local = local if isinstance(local, str) else _numbers("local", local)
        self.costs = _numbers("costs", costs, 0)
        self.payments = _numbers("payments", payments, 0)
        if math.inf in self.payments:
            refuse("payments", payments, "finite")
        yes_or_no("larger_is_better", larger_is_better)
        self.larger_is_better = larger_is_better
        self._outside: set[int] = set()
        self._known: set[int] = set()
        self._is_empty = False

    @property
    def num_outside(self) -> int:
        """How many of the clients that it has seen do not take part."""
        return len(self._outside)

    def sample(
        self, clients: Sequence[int], size: int, server_round: int, purpose: Purpose
    ) -> list[int]:
        """Return the other sampler's cohort, for training less those outside."""
        numbers = self._registry.number(clients)
        for number in set(numbers.values()) - self._known:
            self._known.add(number)
            if _of(self.costs, number, "costs") == math.inf:
                self._outside.add(number)
        cohort = self.of.sample(clients, size, server_round, purpose)
        if purpose == "evaluate":
            return cohort
        was_empty = self._is_empty
        self._is_empty = self._outside >= set(numbers.values())
        if clients and self._is_empty and not was_empty:
            log(WARNING, "Nobody takes part: no client gains by it. The model is kept")
        return [client for client in cohort if numbers[client] not in self._outside]

    def hear(
        self, reports: Mapping[int, Mapping[str, float]], purpose: Purpose
    ) -> None:
        """Let those who report opt in or out."""
        if purpose != self.purpose:
            return
        names = (
            [self.metric, self.local] if isinstance(self.local, str) else [self.metric]
        )
        for number, (common, *told) in self._read(reports, *names).items():
            own_local = told[0] if told else _of(self.local, number, "local")
            gained = gain(
                common,
                own_local,
                _of(self.costs, number, "costs"),
                _of(self.payments, number, "payments"),
                sign=1.0 if self.larger_is_better else -1.0,
            )
            self._known.add(number)
            if gained >= 0:
                self._outside.discard(number)
            else:
                self._outside.add(number)

    def guarantee(self) -> Guarantee:
        """Return the limits of the other sampler."""
        return super().guarantee()

    def settings(self) -> dict[str, str | int | float]:
        """Add what clients compare."""
        own = {
            name: str(getattr(self, name)) for name in ("local", "costs", "payments")
        }
        return {**super().settings(), **own, "larger-is-better": self.larger_is_better}

    def state_dict(self) -> dict[str, object]:
        """Add who is outside."""
        own = {"outside": sorted(self._outside), "known": sorted(self._known)}
        return {**super().state_dict(), **own, "empty": [self._is_empty]}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over who is outside."""
        super().load_state_dict(state)
        self._outside = set(cast("list[int]", state["outside"]))
        self._known = set(cast("list[int]", state["known"]))
        (self._is_empty,) = cast("list[bool]", state["empty"])


def _numbers(
    name: str, value: float | Sequence[float], low: float = -math.inf
) -> tuple[float, ...]:
    """Require a number, or one for each client."""
    many = value if isinstance(value, Sequence) else [value]
    if isinstance(value, str) or not many:
        refuse(name, value, "a number, or one for each client")
    return tuple(
        at_least(name, x, low, allow_inf=True) if low == 0 else finite(name, x)
        for x in many
    )


def _of(values: tuple[float, ...] | str, number: int, name: str) -> float:
    """Return a client's own number, or that of all."""
    assert not isinstance(values, str)
    if len(values) == 1:
        return values[0]
    if number >= len(values):
        refuse(f"len({name})", len(values), f"> {number}: one for each client, or one")
    return values[number]
