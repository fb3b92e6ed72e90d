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
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from logging import WARNING
from typing import Unpack

from flwr.app import ArrayRecord

from flower_ext._flower import log
from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.task import Batch, evaluate, num_examples
from flower_ext.core.arrays import Arrays
from flower_ext.core.contribution import DELTA, Contribution, Total
from flower_ext.core.errors import at_least, finite, positive, whole
from flower_ext.core.protocol import Config, Metrics, Reply, Round, means_by_kind
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.drop_in import DropIn
from flower_ext.server.options import AdditiveOptions

WEIGHT = "appeal-weight"
APPEALED = "appealed"
OPTED_OUT = "opted-out"
VOTES = "votes"
TEMPERATURE_KEY = "maxfl-temperature"
WARMUP_KEY = "maxfl-warmup-steps"
REQUIREMENT_KEY = "maxfl-requirement"
OPT_OUT_KEY = "maxfl-opt-out-from"
# What a client keeps: what it requires, and how its own model does on its test data.
REQUIREMENT = "maxfl-requirement"
OWN = "maxfl-own"


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
    # s(1 - s) is even in the gap, and exp of a negative number cannot overflow.
    small = math.exp(-abs(temperature * gap))
    # Rounded up, an honest weight would be more than the server takes.
    return min(0.25, small / (1 + small) ** 2)


def appeal(
    loss: float, requirement: float, temperature: float = 1.0
) -> dict[str, float]:
    """Return the metrics that MaxFL's server reads, for a training loop of one's own.

    Parameters
    ----------
    loss : float
        Of the received model on the client's training data, before training. A model
        that diverged, whose loss is not finite, is wanted by nobody and moved by
        nobody.
    requirement : float
        What the client requires of that loss; same data, same reduction. Where it is
        NaN or infinite the client has no model of its own to go back to, and any model
        of finite loss appeals to it.
    temperature : float
        As the server's; it is in the message's configuration too, under
        ``"maxfl-temperature"``.

    Examples
    --------
    >>> appeal(1.0, requirement=1.0)
    {'appeal-weight': 0.25, 'appealed': 1.0}
    >>> appeal(1.0, requirement=math.nan)
    {'appeal-weight': 0.0, 'appealed': 1.0}
    """
    if not math.isfinite(loss):
        return {WEIGHT: 0.0, APPEALED: 0.0}
    if not math.isfinite(requirement):
        requirement = math.inf
    return {
        WEIGHT: appeal_weight(loss - requirement, temperature),
        APPEALED: float(loss <= requirement),
    }


class MaxFLClient(ClientHalf):
    """Compares the received model with what the client requires of it.

    The requirement is, in this order: what the half was given; what the strategy
    gives to all, which messages carry as ``"maxfl-requirement"``; the training loss of
    a model of the client's own, trained once from a fresh start for ``warmup_steps``
    steps. A model that training made no better, as where it diverged, is dropped for
    its fresh start. What is the client's own is fixed from then on and stays in
    its personal state. The fresh start depends on the seed only and the training on
    seed, client and settings, so that a client that lost its state finds the same
    requirement. For this the settings belong in the run config, where training and
    evaluation both find them; a client may be asked for either first.

    A client without training examples has no requirement and no say: it counts neither
    for the model nor against it.

    Parameters
    ----------
    requirement : callable, optional
        ``Local -> float``, the client's own; asked once. See :func:`appeal` for NaN.
    """

    name = "maxfl"
    # Its weight depends on what it required in the first round that it was in.
    sends_kept = True

    def __init__(self, requirement: Callable[[Local], float] | None = None) -> None:
        self._requirement = requirement
        self._metrics: Metrics = {}

    def begin(self, local: Local) -> None:
        """Measure the received model before the first step."""
        # q_k is that of the received model: it is a weight in the gradient there.
        temperature = local.number(TEMPERATURE_KEY, 1.0)
        loss = local.mean_loss(local.train)
        self._metrics = {**appeal(loss, self._requires(local), temperature)}
        first = local.number(OPT_OUT_KEY, 0)
        may_leave = 0 < first <= local.server_round and num_examples(local.train)
        if may_leave and not self._metrics[APPEALED]:
            # Trained on no example: no weight in any average.
            self._metrics |= {WEIGHT: 0.0, OPTED_OUT: 1.0, "num-examples": 0}

    def batches(self, local: Local) -> Iterator[Batch]:
        """Return no batch if the client leaves."""
        return iter(()) if OPTED_OUT in self._metrics else super().batches(local)

    def records(self, local: Local) -> tuple[Mapping[str, ArrayRecord], Metrics]:
        """Return weight and appeal."""
        return {}, self._metrics

    def evaluate(self, local: Local) -> Metrics:
        """Return the appeal, and the metrics of the model that the client prefers."""
        found = appeal(local.mean_loss(local.train), self._requires(local))
        votes = num_examples(local.train) > 0
        metrics: Metrics = {APPEALED: found[APPEALED]} if votes else {}
        if own := local.personal.numbers(OWN):
            if found[APPEALED] or not votes:
                own = evaluate(local.task, local.model, local.test)
            metrics |= {f"preferred-{name}": value for name, value in own.items()}
        return metrics

    def _requires(self, local: Local) -> float:
        """Return the requirement, found in the first round of the client's."""
        if self._requirement is None and REQUIREMENT_KEY in local.config:
            return local.number(REQUIREMENT_KEY, 0)
        if not local.personal.numbers(REQUIREMENT):
            if self._requirement is None:
                found, own = _warm_up(local)
                local.personal.save(**{OWN: own})
            else:
                found = float(self._requirement(local))
            local.personal.save(**{REQUIREMENT: {"loss": found}})
            if num_examples(local.train) and not math.isfinite(found):
                problem = (
                    "client %s requires a loss of %s: any finite one appeals to it"
                )
                log(WARNING, problem, local.client, found)
        return local.personal.numbers(REQUIREMENT)["loss"]


def _warm_up(local: Local) -> tuple[float, dict[str, float]]:
    """Train a model of the client's own; return its training loss and test metrics."""
    own = local.alone(int(local.number(WARMUP_KEY, 100)))
    start = deepcopy(own.model)
    own.fit()
    loss, before = (own.mean_loss(own.train, model) for model in (own.model, start))
    if not loss <= before:  # training diverged
        loss, own.model = before, start
    return loss, evaluate(own.task, own.model, own.test)


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
    warmup_rounds : int (default: 0)
        :math:`\ge 0`, first rounds in which all clients weigh the same: FedAvg with
        equal weights, until the model is near enough for the gaps to tell clients
        apart. 0 is none; as many as there are rounds is FedAvg with equal weights.
    opt_out_from : int (default: 0)
        :math:`\ge 0`, first round in which a client that does not want the model it
        receives leaves: it does not train it, and has no weight. It is asked again in
        later rounds, and comes back once a model appeals. 0 lets nobody leave; where
        all leave, the direction is 0. Its reply is the received model: it costs as many
        bytes.
    *flowers, **options
        Server optimizer, sampler, mechanism and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`;
        the paper's global learning rate is the server optimizer's.

    Notes
    -----
    Metrics: ``gm-appeal``, the share of the clients with a usable reply that want the
    model they were sent, ``num-opted-out`` of them left; at evaluation also
    ``gm-appeal-seen`` and ``gm-appeal-unseen``, of clients that have and have not been
    asked to train so far, and ``preferred-...``, the metrics when each client uses the
    better of global and own model, by its training loss. Clients without training
    examples are in none of these shares. Under a mechanism, who has examples and who
    leaves is not told: ``gm-appeal`` is then the noisy share of the planned cohort.

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
    consumed_metrics = (WEIGHT, APPEALED, OPTED_OUT)
    declares_weight = True
    scalars = {APPEALED: ()}

    def __init__(
        self,
        *flowers: object,
        temperature: float = 1.0,
        epsilon: float = 1e-5,
        warmup_steps: int = 100,
        requirement: float | None = None,
        warmup_rounds: int = 0,
        opt_out_from: int = 0,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(*flowers, **options)
        self.temperature = positive("temperature", temperature)
        self.epsilon = at_least("epsilon", epsilon, 0)
        self.warmup_steps = whole("warmup_steps", warmup_steps, 1)
        self.requirement = requirement
        if requirement is not None:
            finite("requirement", requirement, "None lets clients find their own")
        self.warmup_rounds = whole("warmup_rounds", warmup_rounds, 0)
        self.opt_out_from = whole("opt_out_from", opt_out_from, 0)

    def tell(self, round: Round) -> Config:
        """Tell clients temperature, source of their requirement, if they may leave."""
        rho = self.requirement
        return {
            TEMPERATURE_KEY: self.temperature,
            WARMUP_KEY: self.warmup_steps,
            OPT_OUT_KEY: self.opt_out_from,
            **({} if rho is None else {REQUIREMENT_KEY: float(rho)}),
        }

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        r"""Return :math:`\Delta_k` of weight :math:`q_k`; of 0 without examples."""
        weight, appealed = reply.share(WEIGHT, 0.25), reply.share(APPEALED)
        trained = reply.num_examples > 0
        left = not trained and reply.has(OPTED_OUT) and reply.number(OPTED_OUT) == 1
        if not trained:
            weight = appealed = 0.0
        elif self._all_alike(round):
            weight = 0.25  # the largest q, of a client exactly at its requirement
        scalars = {APPEALED: appealed}
        # Under a mechanism nobody may learn who has examples or leaves; and each
        # further scalar would take a part of the clipping norm.
        if not round.private:
            scalars |= {VOTES: float(trained or left), OPTED_OUT: float(left)}
        return Contribution({DELTA: reply.delta(round)}, weight, scalars)

    def update(self, total: Total, round: Round) -> Arrays:
        r"""Return :math:`\sum q\Delta / (\sum q + \epsilon)`."""
        return total.mean(plus=0.0 if self._all_alike(round) else self.epsilon)

    def report(self, total: Total, round: Round) -> Metrics:
        """Return the cohort's appeal and the sum of its weights."""
        metrics: Metrics = {"appeal-weight-sum": total.weight}
        # Under a mechanism the share is of the planned cohort, which is the count
        # there.
        if votes := float(total.scalars.get(VOTES, total.count)):
            metrics["gm-appeal"] = float(total.scalars[APPEALED]) / votes
        if self.opt_out_from and OPTED_OUT in total.scalars:
            metrics["num-opted-out"] = int(total.scalars[OPTED_OUT])
        return metrics

    def report_evaluate(self, replies: Sequence[Reply], round: Round) -> Metrics:
        """Return the appeal, and all metrics by whether a client was asked to train.

        ``-seen`` and ``-unseen`` are means in which every client counts once.
        """
        rows, appeals, weights = [], [], (self.weighted_by_key, WEIGHT)
        for reply in replies:
            metrics = reply.numbers()
            appealed = metrics.pop(APPEALED, None)
            if appealed is not None and 0 <= appealed <= 1:
                metrics["gm-appeal"] = appealed
                appeals.append(appealed)
            elif appealed is not None:
                problem = "metric %r=%s left out, it must be from 0 to 1"
                log(WARNING, problem, APPEALED, appealed)
            own = {k: x for k, x in metrics.items() if k not in weights}
            rows.append(("seen" if reply.client in round.trained else "unseen", own))
        overall = {"gm-appeal": sum(appeals) / len(appeals)} if appeals else {}
        return {**overall, **means_by_kind(rows)}

    def _all_alike(self, round: Round) -> bool:
        """Whether all clients weigh the same in a round."""
        return round.number <= self.warmup_rounds

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        own = f"own model after {self.warmup_steps} steps"
        return {
            "Temperature": self.temperature,
            "Epsilon": self.epsilon,
            "Requirement": own if self.requirement is None else self.requirement,
            "Rounds of equal weights": self.warmup_rounds,
            "Clients may leave from round": self.opt_out_from or "never",
            **super().settings(),
        }
