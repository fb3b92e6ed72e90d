"""What a silo promises to the people in its data, and what it has spent of it."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import cast

from flwr.app import ConfigRecord

from flower_ext.core.errors import open_unit, positive, refuse, whole
from flower_ext.privacy.accounting.calibration import (
    INTERVAL,
    LossDistribution,
    common_grid,
    loss_on_grid,
    noise_multiplier_for,
    sampled_epsilon,
)
from flower_ext.privacy.accounting.gaussian import gaussian_epsilon, gaussian_mu
from flower_ext.privacy.private_evaluation import PrivateEvaluation
from flower_ext.privacy.selection import MOST_EPSILON, choice_noise_multiplier
from flower_ext.privacy.silo_account import ledger_path, load_record, save_record

# Below, epsilon is in the hundreds and the grid of its losses too large for memory.
_LEAST_NOISE = 0.1
# Squares of smaller numbers vanish in float64.
_LEAST_CLIPPING = 1e-100
# Of what is released without sampling: above, epsilon is in the hundreds, and what
# sampling saves in the rest is not sought.
_MOST_MU = 25.0


class SiloBudgetExhausted(RuntimeError):
    """The next round would spend more than the silo's ``max_epsilon``."""


@dataclass(frozen=True, kw_only=True)
class SiloPrivacy:
    r"""What one silo promises to the people in its data.

    Exactly one of ``noise_multiplier`` and ``epsilon`` is given.

    Parameters
    ----------
    clipping_norm : float
        C, the largest l2 norm of one example's gradient over all trained parameters.
        Infinity, no clipping, is allowed without noise only.
    delta : float
        In (0, 1); should be well below 1 / examples.
    noise_multiplier : float, optional
        :math:`\sigma`: the noise on the *sum* of clipped gradients has standard
        deviation :math:`\sigma C`. At least 0.1; 0 is no noise, no privacy and an
        infinite epsilon.
    epsilon : float, optional
        Target after ``num_rounds`` rounds in which the silo trains; the noise
        multiplier is the smallest that meets it. It is sought once, for the batch size
        and steps of the silo's first round, and kept.
    num_rounds : int, optional
        With ``epsilon`` only.
    max_epsilon : float, optional
        A round that would exceed it is refused, and trains nothing. By default it is
        ``epsilon``, where that is given. Without both the server decides how much is
        spent, by the rounds and steps that it asks for.
    max_examples_per_user : int, optional
        G: protect a user with all examples in this silo, of which the first G in the
        order of the data are used, instead of one example. What is clipped is the
        trainer's: the gradient of an example, of a user, or what a user's training
        changes (:mod:`flower_ext.client.user_level`).
    selection_epsilon, loss_cap : float, optional
        Of each choice among several models that a client half makes by their losses on
        the silo's examples, as HypCluster's does: its own epsilon, at most 30 or
        infinity for a choice without noise, and the most that one example's loss counts
        in it. Charged with the steps. Without them no such choice is made. A smaller
        cap needs less noise and tells losses above it apart no more.
    evaluation : PrivateEvaluation, optional
        Means over the silo's test examples, with noise, in its answers to evaluations;
        otherwise these have the number of examples only. ``bounds`` are of one
        example's loss and metrics. Within ``epsilon``: ``share`` is the part of its
        :math:`\mu^2`, for the evaluations of every ``every``-th of ``num_rounds``
        rounds. Those of other rounds are withheld, and one more is refused.
    user : str (default: "user")
        Integer column of the data that says whose example it is.
    ledger : path, optional
        File of the silo's own, absolute or under ``~``, made if missing. Every round is
        charged to it before it trains. Rounds of all runs and processes that name it
        add up, so that ``max_epsilon`` and ``epsilon`` bound all that is ever released
        about these people. One file is for one silo and one unit: in a simulation one
        for each partition. Losing it is losing the account.

        Without a ledger the account is that of the run, and every run starts from 0. A
        silo whose first round is not the run's is then refused, for it may have spent
        something that it does not know of.
    seed : int, optional
        Secret seed >= 0 of batches, noise and dropout, for tests and simulations.
        Without it batches and noise come from the operating system. Whoever knows the
        seed can remove the noise, and small ones are found by trying: a server must
        never see it.
    """

    clipping_norm: float
    delta: float
    noise_multiplier: float | None = None
    epsilon: float | None = None
    num_rounds: int | None = None
    max_epsilon: float | None = None
    max_examples_per_user: int | None = None
    selection_epsilon: float | None = None
    loss_cap: float | None = None
    evaluation: PrivateEvaluation | None = None
    user: str = "user"
    ledger: str | os.PathLike[str] | None = None
    seed: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        positive("clipping_norm", self.clipping_norm, allow_inf=True)
        if self.clipping_norm < _LEAST_CLIPPING:
            refuse("clipping_norm", self.clipping_norm, f">= {_LEAST_CLIPPING}")
        open_unit("delta", self.delta)
        if (self.noise_multiplier is None) == (self.epsilon is None):
            raise ValueError(
                f"noise_multiplier={self.noise_multiplier} with epsilon="
                f"{self.epsilon}: give one of them, the other follows"
            )
        if (self.epsilon is None) != (self.num_rounds is None):
            raise ValueError(
                f"epsilon={self.epsilon} with num_rounds={self.num_rounds}: a target "
                "is for a planned number of rounds"
            )
        if self.epsilon is not None:
            positive("epsilon", self.epsilon)
            whole("num_rounds", self.num_rounds, 1)
        noise = self.noise_multiplier
        if noise != 0 and noise is not None:
            positive("noise_multiplier", noise)
            if noise < _LEAST_NOISE:
                refuse("noise_multiplier", noise, f"0 or >= {_LEAST_NOISE}")
        if math.isinf(self.clipping_norm) and noise != 0:
            refuse(
                "clipping_norm", self.clipping_norm, "finite", "noise scales with it"
            )
        if self.max_epsilon is not None:
            positive("max_epsilon", self.max_epsilon)
            if self.epsilon is not None and self.max_epsilon < self.epsilon:
                refuse("max_epsilon", self.max_epsilon, f">= epsilon={self.epsilon}")
        if self.max_examples_per_user is not None:
            whole("max_examples_per_user", self.max_examples_per_user, 1)
        if (self.selection_epsilon is None) != (self.loss_cap is None):
            raise ValueError(
                f"selection_epsilon={self.selection_epsilon} with loss_cap="
                f"{self.loss_cap}: a choice needs both"
            )
        if self.loss_cap is not None and self.selection_epsilon is not None:
            positive("loss_cap", self.loss_cap)
            positive("selection_epsilon", self.selection_epsilon, allow_inf=True)
            if MOST_EPSILON < self.selection_epsilon < math.inf:
                bound = f"<= {MOST_EPSILON:g}, or infinity"
                refuse("selection_epsilon", self.selection_epsilon, bound)
        if self.evaluation is not None:
            self._fit(self.evaluation)
        if self.ledger is not None:
            ledger_path(self.ledger)
        if self.seed is not None:
            whole("seed", self.seed, 0)

    def _fit(self, evaluation: PrivateEvaluation) -> None:
        """Refuse a plan of evaluations without a budget to share."""
        if not isinstance(evaluation, PrivateEvaluation):
            refuse("evaluation", evaluation, "a PrivateEvaluation, or None")
        if evaluation.num_sampled_clients is not None:
            number = evaluation.num_sampled_clients
            cause = "a silo evaluates on all its test examples"
            refuse("evaluation.num_sampled_clients", number, "left out", cause)
        if self.num_rounds is None:
            cause = "evaluations have a share of epsilon"
            refuse("epsilon", None, "given with evaluation, and num_rounds", cause)
        evaluation.fit(self.num_rounds, 1, 1)

    @property
    def limit(self) -> float | None:
        """The epsilon that is never exceeded."""
        return self.epsilon if self.max_epsilon is None else self.max_epsilon

    @property
    def group_size(self) -> int:
        """Most examples of one privacy unit."""
        return self.max_examples_per_user or 1

    def choice_noise(self, sensitivity: int) -> float:
        """Return the noise multiplier of a step that reveals as much as a choice.

        That of a step by which a unit's shift is ``sensitivity`` times the clipping
        norm.
        """
        assert self.selection_epsilon is not None
        return sensitivity * choice_noise_multiplier(self.selection_epsilon)

    @property
    def evaluations(self) -> tuple[int, float]:
        """The number of evaluations, and the noise multiplier of each.

        The noise over what one example moves the centred sum by, times the most
        examples of a unit.
        """
        if self.evaluation is None or self.epsilon is None or self.num_rounds is None:
            return 0, math.inf
        mu = math.sqrt(self.evaluation.share) * gaussian_mu(self.epsilon, self.delta)
        found = self.evaluation.beside(mu, self.num_rounds)
        return self.num_rounds // found.every, self.group_size * found.noise_multiplier

    @property
    def unit(self) -> str:
        """The column that names the privacy unit; empty where it is one example."""
        return self.user if self.max_examples_per_user else ""


@dataclass(frozen=True)
class StepLedger:
    r"""Noisy steps that a silo has taken, by sampling rate and noise multiplier.

    A private choice counts as a step that reveals as much, see
    :func:`~flower_ext.privacy.selection.choice_noise_multiplier`.

    Parameters
    ----------
    group_size : int (default: 1)
        Of the steps that are added: clipping norms by which a unit moves a sum at most,
        such as the most examples of one user, of which Binomial(G, q) are in a batch.
    steps : dict[tuple[float, float, int], int]
        ``{(sampling probability, noise multiplier, group size): steps}``. All protect
        the same unit, so that they compose whatever their group sizes.
    unit : str (default: "")
        The data's column of users; empty where the unit is one example.

    Examples
    --------
    >>> ledger = StepLedger().add(0.1, 2.0, 30)
    >>> round(ledger.add(0.1, 2.0, 70).epsilon(delta=1e-5), 4)
    2.3375
    """

    group_size: int = 1
    steps: Mapping[tuple[float, float, int], int] = field(default_factory=dict)
    unit: str = ""

    @property
    def total(self) -> int:
        """Number of steps."""
        return sum(self.steps.values())

    def add(
        self, rate: float, noise_multiplier: float, count: int, shift: float = 0.0
    ) -> "StepLedger":
        r"""Return the ledger after ``count`` more steps.

        Parameters
        ----------
        rate : float
            Probability with which an example is in a batch.
        noise_multiplier : float
            :math:`\sigma`, by the clipping norm.
        count : int
            Steps.
        shift : float (default: 0)
            S, by the clipping norm: how far a unit may move a sum even in a step whose
            batch it is not in. Such a step counts as two, one that is sampled and one
            of the shift that is not, between which the variance is split: the sum of
            their releases is the step's.
        """
        if not count:
            return self
        if shift:
            size, variance = self.group_size, noise_multiplier**2
            # Optimal without sampling, and but for little noise with it as well.
            part = rate * size / (rate * size + shift)
            if variance:
                part = max(part, min(0.5, size**2 / variance))
            unsampled = size * math.sqrt((1 - part) * variance) / shift
            return self.add(1.0, unsampled, count).add(
                rate, math.sqrt(part * variance), count
            )
        key = (rate, noise_multiplier, self.group_size)
        return replace(self, steps={**self.steps, key: self.steps.get(key, 0) + count})

    def epsilon(self, delta: float) -> float:
        """Return an upper bound of epsilon, tight up to the grid; 0 without steps."""
        return _spent(tuple(self.steps.items()), delta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "StepLedger":
        """Read a silo's ledger; one that is not there has no steps."""
        record = load_record(ledger_path(path))
        return cls() if record is None else cls.read(record)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a silo's ledger, in place of the one that is there."""
        save_record(ledger_path(path), self.record())

    def record(self) -> ConfigRecord:
        """Return the record that stays in ``context.state``, and in the ledger."""
        return ConfigRecord(
            {
                "unit": self.unit,
                "group-size": self.group_size,
                "rates": [rate for rate, _, _ in self.steps],
                "noise-multipliers": [noise for _, noise, _ in self.steps],
                "group-sizes": [size for _, _, size in self.steps],
                "steps": list(self.steps.values()),
            }
        )

    @classmethod
    def read(
        cls,
        record: ConfigRecord | None,
        privacy: SiloPrivacy | None = None,
        sensitivity: int | None = None,
    ) -> "StepLedger":
        """Read what :meth:`record` wrote; without it no step has been taken.

        Parameters
        ----------
        record : ConfigRecord, optional
            What was written.
        privacy : SiloPrivacy, optional
            What is protected.
        sensitivity : int, optional
            Clipping norms by which a unit moves the sum of a step at most; by default
            the group size of ``privacy``.

        Raises
        ------
        ValueError
            If ``privacy`` protects another unit than the steps were counted for.
        """
        group_size = sensitivity or (privacy.group_size if privacy else 1)
        unit = privacy.unit if privacy else ""
        if record is None:
            return cls(group_size, unit=unit)
        kept = cast(str, record["unit"])
        if privacy and record["steps"] and kept != unit:
            refuse(
                "max_examples_per_user",
                f"{privacy.group_size} of user={unit!r}" if unit else None,
                f"{f'of user={kept!r}' if kept else None} as in the rounds before",
                "what is spent on one unit says nothing about another",
            )
        if privacy is None:
            group_size, unit = cast(int, record["group-size"]), kept
        rates, noises, steps = (
            cast("list[float]", record[key])
            for key in ("rates", "noise-multipliers", "steps")
        )
        # Records of format 1 have one group size for all steps.
        same = [cast(int, record["group-size"])] * len(steps)
        sizes = cast("list[int]", record.get("group-sizes", same))
        keys = zip(rates, noises, sizes, strict=True)
        return cls(group_size, dict(zip(keys, map(int, steps), strict=True)), unit)


# Many virtual silos of one simulation, and the rounds of one silo, ask the same.
@lru_cache(maxsize=1024)
def _spent(
    steps: tuple[tuple[tuple[float, float, int], int], ...], delta: float
) -> float:
    if not steps:
        return 0.0
    if any(noise == 0 for (_, noise, _), _ in steps):  # one such step tells all
        return math.inf
    if len(steps) == 1:
        [((rate, noise, size), count)] = steps
        return sampled_epsilon(count, delta, noise, rate, size, INTERVAL)
    # Gaussian releases without sampling compose exactly: their mu^2 add up.
    squares = [n * (size / noise) ** 2 for (rate, noise, size), n in steps if rate == 1]
    mu = math.sqrt(sum(squares))
    if len(squares) == len(steps):
        return gaussian_epsilon(mu, delta)
    if mu > _MOST_MU:  # a sampled release tells no more than one without sampling
        all_squares = [n * (size / noise) ** 2 for (_, noise, size), n in steps]
        return gaussian_epsilon(math.sqrt(sum(all_squares)), delta)
    # Rates and noises may change from round to round; loss distributions compose.
    kinds = [(z, q, size, n) for (q, z, size), n in steps if q < 1]
    if mu:
        kinds.append((1 / mu, 1.0, 1, 1))
    interval = common_grid([kind[:3] for kind in kinds], INTERVAL)
    composed: LossDistribution | None = None
    for *kind, count in kinds:
        loss = loss_on_grid(*kind, interval).self_compose(count)
        composed = loss if composed is None else composed.compose(loss)
    assert composed is not None
    return float(composed.get_epsilon_for_delta(delta))


@lru_cache(maxsize=256)
def noise_for_steps(
    epsilon: float,
    delta: float,
    steps: int,
    rate: float,
    group_size: int,
    choices: int = 0,
    choice_noise: float = math.inf,
    shift: float = 0.0,
) -> float:
    """Return the least noise multiplier for a target after so many steps.

    Private choices, each as much as a step of ``choice_noise``, are part of the target;
    for ``shift`` see :meth:`StepLedger.add`.
    """
    found = noise_multiplier_for(
        epsilon,
        delta,
        rounds=steps,
        sampling_probability=rate,
        group_size=group_size,
    )
    # The shift alone, which is not sampled, needs as much.
    least = shift * math.sqrt(steps) / gaussian_mu(epsilon, delta)
    found = max(found, _LEAST_NOISE, least)
    if not choices and not shift:
        return found
    others = StepLedger(group_size).add(1.0, choice_noise, choices)
    spent = others.epsilon(delta)
    if not spent < epsilon:
        refuse(
            "selection_epsilon",
            f"{choices} choices of {spent:.6g} together",
            f"less than epsilon={epsilon}",
            "nothing is left for the training",
        )

    def fits(noise: float) -> bool:
        return others.add(rate, noise, steps, shift).epsilon(delta) <= epsilon

    low, high = found, 2 * found
    while not fits(high):
        low, high = high, 2 * high
        if high > 1e9 and spent:
            refuse("selection_epsilon", spent, f"well below epsilon={epsilon} together")
        if high > 1e9:
            refuse("epsilon", epsilon, "one that some noise meets")
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
