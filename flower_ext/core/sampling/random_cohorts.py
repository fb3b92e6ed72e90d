"""Cohorts whose chances are stated: what amplification counts on."""

import hashlib
from collections.abc import Sequence

from flower_ext.core.errors import (
    whole,
)
from flower_ext.core.sampling.base import (
    Guarantee,
    Purpose,
    Recognising,
    Sampler,
    require_probability,
)


class PoissonSampler(Sampler):
    """Every client on its own with the same probability.

    The cohort varies in size and may be empty; without privacy, a round of nobody
    keeps the model. This is the sampling that privacy amplification by Poisson
    sampling assumes: then give the probability, and no seed.

    Parameters
    ----------
    seed, same_for_evaluation
        See :class:`Sampler`.
    probability : float, optional
        In (0, 1], whatever the number of clients that are connected; by default
        ``size / len(clients)``.
    """

    def __init__(
        self,
        seed: int | None = None,
        *,
        probability: float | None = None,
        same_for_evaluation: bool = False,
    ) -> None:
        super().__init__(seed, same_for_evaluation=same_for_evaluation)
        if probability is not None:
            require_probability(probability)
        self.probability = probability

    def sample(
        self, clients: Sequence[int], size: int, server_round: int, purpose: Purpose
    ) -> list[int]:
        """Toss one coin per client."""
        # The probability is promised for training. Evaluation asks for a number of
        # clients, which is size / len(clients) without dividing by zero.
        draws = self.generator(server_round, purpose).random(len(clients))
        if self.probability is None or purpose == "evaluate":
            chosen = draws * len(clients) < size
        else:
            chosen = draws < self.probability
        return [client for client, take in zip(clients, chosen, strict=True) if take]

    def guarantee(self) -> Guarantee:
        """Return the probability, if it is given."""
        return Guarantee(
            kind="poisson", probability=self.probability, can_be_secret=True
        )

    def settings(self) -> dict[str, str | int | float]:
        """Add the probability."""
        return {**super().settings(), "probability": self.probability or "size"}

    def expected_size(self, size: int, population: int) -> float:
        """Return probability times population."""
        return size if self.probability is None else self.probability * population


class CyclicPoissonSampler(Recognising):
    """Clients take turns in groups; in its turn each is sampled on its own.

    A client belongs to one of ``cycle`` groups for the whole run, by the order in
    which clients were first seen; round t samples from group t mod ``cycle``, each
    client with the same probability (Choquette-Choo et al. 2023, arXiv 2306.08153).

    Parameters
    ----------
    probability : float
        In (0, 1], of a client in its turn.
    cycle : int
        Number of groups; at least the number of bands of the mechanism.
    seed, same_for_evaluation
        See :class:`Sampler`.
    """

    def __init__(
        self,
        probability: float,
        cycle: int,
        seed: int | None = None,
        *,
        same_for_evaluation: bool = False,
    ) -> None:
        super().__init__(seed, same_for_evaluation=same_for_evaluation)
        require_probability(probability)
        self.probability = probability
        self.cycle = whole("cycle", cycle, 1)

    def sample(
        self, clients: Sequence[int], size: int, server_round: int, purpose: Purpose
    ) -> list[int]:
        """Toss one coin for each client whose turn it is."""
        # Groups by the numbers in which clients were first seen: who connects or leaves
        # in between does not move others to another group.
        numbers = self._registry.number(clients)
        draws = self.generator(server_round, purpose).random(len(clients))
        if purpose == "evaluate":
            chosen = [d * len(clients) < size for d in draws]
        else:
            turn = server_round % self.cycle
            chosen = [
                numbers[client] % self.cycle == turn and d < self.probability
                for client, d in zip(clients, draws, strict=True)
            ]
        return [client for client, take in zip(clients, chosen, strict=True) if take]

    def guarantee(self) -> Guarantee:
        """Return the probability of a client in its turn, and how rare turns are."""
        return Guarantee(
            kind="cyclic-poisson",
            probability=self.probability,
            min_separation=self.cycle,
            can_be_secret=True,
        )

    def expected_size(self, size: int, population: int) -> float:
        """Return the probability times a group of the population."""
        return self.probability * population / self.cycle

    def settings(self) -> dict[str, str | int | float]:
        """Add probability and cycle."""
        return {
            **super().settings(),
            "probability": self.probability,
            "cycle": self.cycle,
        }


class BallsInBinsSampler(Recognising):
    """Each client is put into a bin once and for all; the bins take turns.

    A client's bin is one of ``num_bins``, uniformly at random and whatever those of
    others are; round t trains all clients of bin t mod ``num_bins``. A client waits
    exactly ``num_bins`` rounds, as noise that is correlated over rounds likes it, and
    its bin is secret, which amplifies (Choquette-Choo et al. 2024, arXiv 2410.06266,
    "balls-in-bins batching"; Chua et al. 2024, arXiv 2412.16802).

    Parameters
    ----------
    num_bins : int
        At least 1, which trains everybody in every round. A round has population /
        ``num_bins`` clients on average, whatever number is asked for.
    seed, same_for_evaluation
        See :class:`Sampler`; evaluation draws from all clients unless it is the same.

    Notes
    -----
    A bin is a keyed hash (BLAKE2b, the key is the seed) of the number in which a client
    was first seen, so that those who connect later have theirs from the start, too. To
    whoever does not know the seed, bins are then as good as drawn independently; that
    the hash is pseudorandom is the only assumption. Numbers are in the checkpoint, as
    for :class:`CyclicPoissonSampler`: a client that comes back under a new id has a
    second bin.

    Examples
    --------
    >>> sampler = BallsInBinsSampler(num_bins=3, seed=1)
    >>> rounds = [sampler.sample(range(6), 2, t, "train") for t in range(6)]
    >>> rounds[:3] == rounds[3:], sorted(sum(rounds[:3], []))
    (True, [0, 1, 2, 3, 4, 5])
    """

    def __init__(
        self,
        num_bins: int,
        seed: int | None = None,
        *,
        same_for_evaluation: bool = False,
    ) -> None:
        super().__init__(seed, same_for_evaluation=same_for_evaluation)
        self.num_bins = whole("num_bins", num_bins, 1)
        # The bins of those seen so far, by number, and the seed that they are from.
        self._bins: tuple[int, list[int]] = (-1, [])

    def sample(
        self, clients: Sequence[int], size: int, server_round: int, purpose: Purpose
    ) -> list[int]:
        """Return the clients in the bin whose turn it is."""
        numbers = self._registry.number(clients)
        if purpose == "evaluate" and not self.same_for_evaluation:
            draws = self.generator(server_round, purpose).random(len(clients))
            chosen = (draws * len(clients) < size).tolist()
        else:
            turn, bins = server_round % self.num_bins, self._known_bins()
            chosen = [bins[numbers[client]] == turn for client in clients]
        return [client for client, take in zip(clients, chosen, strict=True) if take]

    def _known_bins(self) -> list[int]:
        """Return the bins of all clients that were seen, by number."""
        seed = self._own_seed()
        if self._bins[0] != seed:  # drawn, or loaded, since
            self._bins = seed, []
        bins = self._bins[1]
        # The key of BLAKE2b is at most 64 bytes; seeds of any size are hashed to it.
        key = hashlib.blake2b(str(seed).encode()).digest()
        for number in range(len(bins), self.num_known):
            digest = hashlib.blake2b(str(number).encode(), key=key, digest_size=16)
            bins.append(int.from_bytes(digest.digest(), "big") % self.num_bins)
        return bins

    def guarantee(self) -> Guarantee:
        """Return that bins are drawn once, and how rare turns are."""
        return Guarantee(
            kind="balls-in-bins", min_separation=self.num_bins, can_be_secret=True
        )

    def expected_size(self, size: int, population: int) -> float:
        """Return a bin's share of the population."""
        return population / self.num_bins

    def settings(self) -> dict[str, str | int | float]:
        """Add the number of bins."""
        return {**super().settings(), "num-bins": self.num_bins}
