"""A bridge: an accountant for Flower's own differential privacy wrappers."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, cast

from flower_ext.core.errors import open_unit, positive, refuse, whole
from flower_ext.privacy.accounting.gaussian import gaussian_delta, gaussian_epsilon

if TYPE_CHECKING:
    from flwr.serverapp import GaussianPrivacyEvent, PrivacyConfig, PrivacySpent

_SCHEMA = 1


class EventAccountant:
    r"""Flower's ``PrivacyAccountant``, exact where Flower's own is a bound.

    For the wrappers that Flower has: ``DifferentialPrivacyServerSideFixedClipping(...,
    accountant=EventAccountant(config))``. Releases with noise multipliers :math:`z_i`
    are together one Gaussian release with :math:`\mu^2 = \sum_i 1 / z_i^2`, and epsilon
    is exact. Flower's ``RdpAccountant`` converts from Renyi divergences, a bound.

    Parameters
    ----------
    config : flwr.serverapp.PrivacyConfig
        With sampling method ``no-amplification``, the only one that Flower's wrappers
        take. For amplification, ``Mechanism(amplified=True)`` of a strategy here.

    Notes
    -----
    It believes its events: whether a wrapper adds the noise that it reports is not
    checked. Strategies of this package count by themselves what they release.

    References
    ----------
    Dong, Roth and Su 2022, "Gaussian differential privacy", arXiv 1905.02383 (Gaussian
    releases compose exactly, Corollary 3.3); Balle and Wang 2018, arXiv 1805.06530.

    Examples
    --------
    >>> from flwr.serverapp import GaussianPrivacyEvent, PrivacyConfig
    >>> from flwr.serverapp import NeighboringRelation, SamplingMethod
    >>> config = PrivacyConfig(1e-5, 1000, NeighboringRelation.ADD_OR_REMOVE_ONE,
    ...                        SamplingMethod.NO_AMPLIFICATION)
    >>> accountant = EventAccountant(config)
    >>> accountant.compose(GaussianPrivacyEvent(10.0, 100, 1000), count=50)
    >>> round(accountant.get_epsilon(1e-5), 4)
    2.9432
    """

    def __init__(self, config: PrivacyConfig) -> None:
        if config.sampling_method.value != "no-amplification":
            refuse(
                "config.sampling_method",
                config.sampling_method.value,
                "'no-amplification'",
                "what sampling amplifies depends on how cohorts are drawn and kept "
                "secret, which an event does not say",
            )
        self._config = config
        self._events: Counter[float] = Counter()

    @property
    def config(self) -> PrivacyConfig:
        """The privacy configuration."""
        return self._config

    @property
    def num_releases(self) -> int:
        """Releases so far."""
        return self._events.total()

    def compose(self, event: GaussianPrivacyEvent, count: int = 1) -> None:
        """Count releases."""
        self._events[self._noise(event)] += whole("count", count, 1)

    def get_epsilon(self, delta: float) -> float:
        """Return epsilon of all releases so far."""
        return gaussian_epsilon(_mu(self._events), open_unit("delta", delta))

    def get_delta(self, epsilon: float) -> float:
        """Return delta of all releases so far."""
        return gaussian_delta(_mu(self._events), positive("epsilon", epsilon))

    def get_privacy_spent(self, delta: float | None = None) -> PrivacySpent:
        """Return what is spent so far, at the target delta unless another is given."""
        from flwr.serverapp import PrivacySpent

        delta = self._config.target_delta if delta is None else delta
        return PrivacySpent(
            epsilon=self.get_epsilon(delta),
            delta=delta,
            num_releases=self.num_releases,
            accounting_method="gaussian-exact",
        )

    def would_exceed(
        self,
        event: GaussianPrivacyEvent,
        max_epsilon: float | None = None,
        count: int = 1,
    ) -> bool:
        """Return whether further releases would exceed a limit; nothing is counted."""
        limit = self._config.max_epsilon if max_epsilon is None else max_epsilon
        if limit is None:
            refuse("max_epsilon", None, "given here or in PrivacyConfig")
        after = self._events + Counter({self._noise(event): whole("count", count, 1)})
        # Not "epsilon > limit": NaN must count as exceeding.
        return not gaussian_epsilon(_mu(after), self._config.target_delta) <= limit

    def state_dict(self) -> dict[str, object]:
        """Return the JSON-serializable state."""
        events = [[noise, count] for noise, count in self._events.items()]
        return {"schema": _SCHEMA, "plan": self._plan(), "events": events}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue counting.

        Raises
        ------
        ValueError
            If the state is that of another configuration.
        """
        for key, value in (("schema", _SCHEMA), ("plan", self._plan())):
            if state.get(key) != value:
                refuse(f"state[{key!r}]", state.get(key), repr(value))
        events = cast("list[tuple[float, int]]", state["events"])
        self._events = Counter({noise: int(count) for noise, count in events})

    def _plan(self) -> list[object]:
        return [self._config.target_delta, self._config.population_size]

    def _noise(self, event: GaussianPrivacyEvent) -> float:
        if event.population_size != self._config.population_size:
            refuse(
                "event.population_size",
                event.population_size,
                f"{self._config.population_size} as in the configuration",
            )
        return event.noise_multiplier


def _mu(events: Counter[float]) -> float:
    """Return mu of releases that nothing amplifies."""
    return math.sqrt(sum(count / noise**2 for noise, count in events.items()))
