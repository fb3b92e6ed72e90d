"""Cohorts in which nobody is too often, or too soon again."""

from collections.abc import Mapping, Sequence
from logging import WARNING
from typing import cast, get_args

from flower_ext._flower import log
from flower_ext.core.errors import (
    one_of,
    refuse,
    whole,
)
from flower_ext.core.sampling.base import (
    Guarantee,
    Purpose,
    Recognising,
    TooFewClients,
    WhenShort,
)


class MinSeparationSampler(Recognising):
    """Uniform, but no client too often, and none too soon again.

    A client that took part in round t is not drawn again before round
    t + ``min_separation``, and never more than ``max_participations`` times. This is
    what correlated noise is calibrated for. Being drawn counts, whether or not the
    client replies.

    Parameters
    ----------
    min_separation : int
        Least difference of the numbers of two rounds with the same client; 1 allows
        every round. At most population / cohort, or rounds run short of clients, which
        a mechanism refuses.
    max_participations : int, optional
        Most rounds of one client; by default what the separation allows. Where it is
        hardly more than rounds x cohort / population, the last rounds may be short.
    seed, same_for_evaluation
        See :class:`Sampler`.
    when_short : str (default: "smaller")
        With fewer eligible clients than asked for: ``smaller`` takes all of them, or
        nobody if there are none; ``wait`` waits until others connect; ``stop`` ends the
        run.

    Notes
    -----
    Clients are nodes, recognised by their id, or in a simulation by their partition:
    see :class:`~flower_ext.core.nodes.NodeRegistry`. That several nodes belong to one
    person cannot be seen, and a node that comes back under a new id counts as a new
    client.
    """

    def __init__(
        self,
        min_separation: int,
        max_participations: int | None = None,
        seed: int | None = None,
        *,
        when_short: WhenShort = "smaller",
        same_for_evaluation: bool = False,
    ) -> None:
        super().__init__(seed, same_for_evaluation=same_for_evaluation)
        self.min_separation = whole("min_separation", min_separation, 1)
        if max_participations is not None:
            whole("max_participations", max_participations, 1)
        self.max_participations = max_participations
        one_of("when_short", when_short, get_args(WhenShort))
        self.when_short = when_short
        self._warned = False
        self._last: dict[int, int] = {}
        self._times: dict[int, int] = {}

    def sample(
        self, clients: Sequence[int], size: int, server_round: int, purpose: Purpose
    ) -> list[int]:
        """Draw ``size`` of the eligible clients, and remember them.

        Raises
        ------
        TooFewClients
            If there are fewer and ``when_short`` is not ``smaller``.
        """
        if purpose == "evaluate":
            eligible = list(clients)
        else:
            # Rounds that go backwards are those of a second run: the limits would be
            # counted across both.
            latest = max(self._last.values(), default=0)
            if server_round < latest:
                refuse(
                    "server_round",
                    server_round,
                    f">= {latest}, for which clients were drawn before",
                    "a sampler that limits participation is for one run: make another",
                )
            numbers = self._registry.number(clients)
            eligible = [c for c in clients if self._may(numbers[c], server_round)]
            if len(eligible) < size and self.when_short != "smaller":
                raise TooFewClients(
                    f"round {server_round} needs {size} clients, {len(eligible)} of "
                    f"the {len(clients)} connected may take part: the others did so "
                    f"less than min_separation={self.min_separation} rounds ago, or "
                    f"max_participations={self.max_participations} times"
                )
            if size and clients and not eligible and not self._warned:
                self._warned = True
                log(
                    WARNING,
                    "Round %s asks nobody, and further rounds may not either: each of "
                    "the %s connected clients has taken part less than "
                    "min_separation=%s rounds ago, or as often as it may. Fewer "
                    "clients a round, or a lower min_separation, leave some for each",
                    server_round,
                    len(clients),
                    self.min_separation,
                )
        drawn = self.generator(server_round, purpose).choice(
            len(eligible), min(size, len(eligible)), replace=False
        )
        cohort = [eligible[i] for i in sorted(drawn.tolist())]
        # Being drawn counts: whether a client replies may depend on its data.
        if purpose == "train":
            for client in cohort:
                number = numbers[client]
                self._last[number] = server_round
                self._times[number] = self._times.get(number, 0) + 1
        return cohort

    def guarantee(self) -> Guarantee:
        """Return the limits."""
        return Guarantee(
            kind="limited",
            min_separation=self.min_separation,
            max_participations=self.max_participations,
        )

    def _may(self, number: int, server_round: int) -> bool:
        last = self._last.get(number)
        rested = last is None or server_round - last >= self.min_separation
        most = self.max_participations
        return rested and (most is None or self._times.get(number, 0) < most)

    def settings(self) -> dict[str, str | int | float]:
        """Add the limits."""
        return {
            **super().settings(),
            "min-separation": self.min_separation,
            "max-participations": self.max_participations or "any",
        }

    def state_dict(self) -> dict[str, object]:
        """Add who took part, when last and how often."""
        return {
            **super().state_dict(),
            "last": [[k, v] for k, v in self._last.items()],
            "times": [[k, v] for k, v in self._times.items()],
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over who took part."""
        super().load_state_dict(state)
        pairs = cast("Mapping[str, list[tuple[int, int]]]", state)
        self._last = dict(pairs["last"])
        self._times = dict(pairs["times"])
