r"""MaxFL: a global model that as many clients as possible want.

A client wants the global model if its loss there is no more than what it requires,
:math:`F_k(\theta) \le \rho_k`, for instance the loss of a model of its own. MaxFL
minimises a smooth count of the clients that do not,
:math:`\frac{1}{M}\sum_k \sigma(T(F_k(\theta) - \rho_k))`, whose gradient weighs
clients by

.. math:: q_k = s_k (1 - s_k), \quad s_k = \sigma(T(F_k(\theta) - \rho_k)),

most for those that are nearly convinced, or nearly lost (Cho, Jhunjhunwala, Li, Smith
and Joshi 2024, "Maximizing Global Model Appeal in Federated Learning", TMLR,
arXiv:2205.14840).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Unpack

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from flower_ext.additive import AdditiveStrategy, Config
from flower_ext.arrays import Arrays, scale, zeros_like
from flower_ext.client import (
    ClientHalf,
    Local,
    Metrics,
    evaluate,
    random_seed,
    seed_torch,
    train,
)
from flower_ext.contribution import DELTA, Contribution, Total
from flower_ext.drop_in import DropIn
from flower_ext.errors import at_least, positive, refuse, whole
from flower_ext.options import AdditiveOptions
from flower_ext.replies import MalformedReply, read_scalar

WEIGHT = "appeal-weight"
APPEALED = "appealed"
TEMPERATURE_KEY = "maxfl-temperature"
WARMUP_KEY = "maxfl-warmup-steps"
REQUIREMENT_KEY = "maxfl-requirement"
_STATE = "maxfl"
_OWN = "own-"


def appeal_weight(gap: float, temperature: float = 1.0) -> float:
    r"""Return :math:`q = s(1 - s)` with :math:`s = \sigma(T \cdot gap)`.

    Parameters
    ----------
    gap : float
        :math:`F_k(\theta) - \rho_k`; its sign does not matter.
    temperature : float
        :math:`T`, multiplies the gap; larger looks at fewer, closer clients.

    Examples
    --------
    >>> [round(appeal_weight(gap), 6) for gap in (0, 1, -1, 4)]
    [0.25, 0.196612, 0.196612, 0.017663]
    """
    small = math.exp(-abs(temperature * gap))
    return small / (1 + small) ** 2


def appeal(
    loss: float, requirement: float, temperature: float = 1.0
) -> dict[str, float]:
    """Return the metrics that MaxFL's server reads, for a training loop of one's own.

    Parameters
    ----------
    loss : float
        Of the received model on the client's training data, before training.
    requirement : float
        What the client requires of that loss; same data, same reduction.
    temperature : float
        As the server's; it is in the message's configuration too, under
        ``"maxfl-temperature"``.
    """
    for name, value in (("loss", loss), ("requirement", requirement)):
        if not math.isfinite(value):
            refuse(name, value, "finite", "a model that diverged?")
    return {
        WEIGHT: appeal_weight(loss - requirement, temperature),
        APPEALED: float(loss <= requirement),
    }


class MaxFLClient(ClientHalf):
    """Compares the received model with what the client requires of it.

    The requirement is, in this order: what the half was given; what the strategy
    gives to all; the training loss of a model of the client's own, trained once from a
    fresh start for ``warmup_steps`` steps. One of the client's own is fixed from then
    on and stays in ``context.state``. The fresh start depends on the seed only and the
    training on seed, client and settings, so that a client that lost its state finds
    the same requirement. For this the settings belong in the run config, where
    training and evaluation both find them; a client may be asked for either first.

    Parameters
    ----------
    requirement : callable, optional
        ``Local -> float``, the client's own; asked once.
    """

    name = "maxfl"

    def __init__(self, requirement: Callable[[Local], float] | None = None) -> None:
        self._requirement = requirement
        self._metrics: Metrics = {}

    def begin(self, local: Local) -> None:
        """Measure the received model before the first step."""
        temperature = local.number(TEMPERATURE_KEY, 1.0)
        required = float(self._required(local)["requirement"])  # type: ignore[arg-type]
        loss = local.mean_loss(local.train)
        if math.isfinite(loss):
            self._metrics = {**appeal(loss, required, temperature)}
        else:
            # A model that diverged is wanted by nobody and moved by nobody.
            self._metrics = {WEIGHT: 0.0, APPEALED: 0.0}

    def records(self, local: Local) -> tuple[Mapping[str, ArrayRecord], Metrics]:
        """Return weight and appeal."""
        return {}, self._metrics

    def evaluate(self, local: Local) -> Metrics:
        """Return the appeal, and the metrics of the model that the client prefers."""
        required = self._required(local)
        loss = local.mean_loss(local.train)
        appealed = loss <= float(required["requirement"])  # type: ignore[arg-type]
        metrics: Metrics = {APPEALED: float(appealed)}
        own = {
            k.removeprefix(_OWN): v for k, v in required.items() if k.startswith(_OWN)
        }
        if own:
            chosen = evaluate(local.task, local.model, local.test) if appealed else own
            metrics |= {f"preferred-{k}": chosen[k] for k in own}
        return metrics

    def _required(self, local: Local) -> MetricRecord:
        """Return the requirement and the own model's test metrics, kept or new."""
        if self._requirement is None and REQUIREMENT_KEY in local.config:
            return MetricRecord({"requirement": local.number(REQUIREMENT_KEY, 0)})
        kept = local.context.state.metric_records.get(_STATE)
        if kept is None:
            if self._requirement is None:
                kept = _warm_up(local)
            else:
                own = float(self._requirement(local))
                if not math.isfinite(own):
                    refuse("requirement", own, "finite")
                kept = MetricRecord({"requirement": own})
            local.context.state[_STATE] = kept
        return kept


def _warm_up(local: Local) -> MetricRecord:
    """Train a model of the client's own; return its training loss and test metrics."""
    steps = int(local.number(WARMUP_KEY, 100))
    with torch.random.fork_rng(devices=[]):
        seed_torch(random_seed(local.settings.seed, 0, 0, stream=3))
        model = local.task.model(local.context.run_config).to(local.device)
    own = replace(
        local,
        model=model,
        settings=replace(local.settings, local_steps=steps),
        config=ConfigRecord({"server-round": 0}),
    )
    train(own, ClientHalf())
    found: Metrics = {"requirement": own.mean_loss(own.train)}
    for name, value in evaluate(own.task, own.model, own.test).items():
        found[_OWN + name] = value
    return MetricRecord(found)


class MaxFL(AdditiveStrategy):
    r"""Federated averaging that weighs clients by how close they are to being won.

    Against FedAvg, the weight of a client is not its number of examples but
    :math:`q_k`, and the direction is :math:`\sum q_k\Delta_k / (\sum q_k + \epsilon)`.
    If all gaps are equal, and :math:`\epsilon = 0`, it is FedAvg with equal weights.
    Works with the client half :class:`MaxFLClient`, or with :func:`appeal` in a loop
    of one's own.

    Parameters
    ----------
    temperature : float (default: 1.0)
        :math:`T > 0` in :math:`\sigma(T(F_k - \rho_k))`. Losses much larger than 1
        saturate the sigmoid: choose ``1 / typical gap``.
    epsilon : float (default: 1e-5)
        :math:`\epsilon \ge 0`; keeps the direction finite when no client is near its
        requirement. Where it exceeds the weights' sum, the model stands still.
    warmup_steps : int (default: 100)
        Local steps of the model of its own from whose loss a client takes its
        requirement, see :class:`MaxFLClient`.
    requirement : float, optional
        The same requirement for all clients, instead of their own.
    **options
        Server optimizer, sampler, mechanism and Flower's own options, see
        :class:`~flower_ext.options.AdditiveOptions`;
        the paper's global learning rate is the server optimizer's.

    Notes
    -----
    Metrics: ``gm-appeal``, the share of the clients with a usable reply that want the
    model they were sent; at evaluation also ``gm-appeal-seen`` and
    ``gm-appeal-unseen``, of clients that have and have not been asked to train so far,
    and ``preferred-...``, the metrics when each client uses the better of global and
    own model, by its training loss.

    The objective is not convex: from a start near an outlier the outlier alone is
    satisfied. The weights :math:`q_k` reveal how far a client is from being satisfied.
    Temperature, epsilon and warm-up are not known from the paper (in the parts
    available to us); the defaults are ours.

    Examples
    --------
    >>> strategy = MaxFL(fraction_train=0.1, warmup_steps=50)
    """

    client_half = MaxFLClient
    drop_in = DropIn(
        imports="from flower_ext.strategies.maxfl import appeal",
        before="wants = appeal(loss, requirement)",
        metrics={"**": "wants"},
        fill_in="loss: of the received model on the client's training data\n"
        "requirement: the loss there that the client would settle for",
    )
    consumed_metrics = (WEIGHT, APPEALED)

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        epsilon: float = 1e-5,
        warmup_steps: int = 100,
        requirement: float | None = None,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(**options)
        positive("temperature", temperature)
        at_least("epsilon", epsilon, 0)
        whole("warmup_steps", warmup_steps, 1)
        if requirement is not None and not (
            isinstance(requirement, int | float) and math.isfinite(requirement)
        ):
            refuse("requirement", requirement, "a finite number, or None")
        self.temperature = temperature
        self.epsilon = epsilon
        self.warmup_steps = warmup_steps
        self.requirement = requirement
        self._seen: set[int] = set()

    def client_config(self) -> Config:
        """Tell clients the temperature and where their requirement comes from."""
        told = {TEMPERATURE_KEY: self.temperature, WARMUP_KEY: self.warmup_steps}
        if self.requirement is not None:
            told[REQUIREMENT_KEY] = float(self.requirement)
        return told

    def contribution(self, reply: RecordDict, sent: Arrays) -> Contribution:
        r"""Return :math:`q_k \Delta_k` and :math:`q_k`."""
        weight = read_scalar(reply, WEIGHT)
        if weight > 0.25:
            raise MalformedReply(f"metric {WEIGHT!r}={weight} must be <= 0.25: s(1-s)")
        appealed = min(read_scalar(reply, APPEALED), 1.0)
        delta = {k: scale(x, weight) for k, x in self.delta(reply, sent).items()}
        return Contribution(
            {DELTA: delta}, scalars={WEIGHT: weight, APPEALED: appealed}
        )

    def zero(self, sent: Arrays) -> Contribution:
        """Return the term of a client that is far from being won."""
        return Contribution(
            {DELTA: zeros_like(sent)}, scalars={WEIGHT: 0.0, APPEALED: 0.0}
        )

    def divisor(self, total: Total) -> float:
        r"""Return :math:`\sum q`."""
        return float(total.scalars[WEIGHT])

    def update(self, total: Total) -> Arrays:
        r"""Return :math:`\sum q\Delta / (\sum q + \epsilon)`.

        Under a mechanism the sum of weights counts as no less than the standard
        deviation of its noise.
        """
        total.weight = max(self.divisor(total), total.noise.get(WEIGHT, 0.0))
        total.weight += self.epsilon
        return total.mean()

    def report(self, total: Total) -> Metrics:
        """Return the cohort's appeal and the sum of its weights."""
        return {
            "gm-appeal": float(total.scalars[APPEALED]) / total.count,
            "appeal-weight-sum": self.divisor(total),
        }

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the cohort, and remember who has been asked."""
        messages = super().configure_train(server_round, arrays, config, grid)
        self._seen.update(self._cohort.values())
        return messages

    def report_evaluate(self, replies: list[Message]) -> Metrics:
        """Return the appeal, and all metrics by whether a client was asked to train.

        ``-seen`` and ``-unseen`` are means in which every client counts once.
        """
        values: dict[str, list[float]] = {}
        for reply in replies:
            seen = self._clients.get(reply.metadata.src_node_id) in self._seen
            for name, value in _scalars(reply.content).items():
                if name == APPEALED:
                    name, value = "gm-appeal", min(max(value, 0.0), 1.0)
                    values.setdefault(name, []).append(value)
                elif name in (self.weighted_by_key, WEIGHT):
                    continue
                who = "seen" if seen else "unseen"
                values.setdefault(f"{name}-{who}", []).append(value)
        return {name: sum(found) / len(found) for name, found in values.items()}

    def state_dict(self) -> dict[str, object]:
        """Add the clients that were asked to train."""
        return {**super().state_dict(), "seen": sorted(self._seen)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over the clients that were asked to train."""
        super().load_state_dict(state)
        self._seen = set(state["seen"])  # type: ignore[call-overload]

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        own = f"own model after {self.warmup_steps} steps"
        return {
            "Temperature": self.temperature,
            "Epsilon": self.epsilon,
            "Requirement": own if self.requirement is None else self.requirement,
            **super().settings(),
        }


def _scalars(content: RecordDict) -> dict[str, float]:
    """Return the finite numbers of a reply's metrics."""
    return {
        name: float(value)
        for record in content.metric_records.values()
        for name, value in record.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
