"""Cohort samplers: which of the available clients take part in a round.

How many is Flower's own option (``fraction_train``, ``min_train_nodes``); how they are
drawn is the sampler. Each draws from a generator of its own, derived from its seed,
the round and the purpose, so that a cohort depends on nothing else: not on earlier
rounds, not on the global random state, not on whether the run was resumed.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from logging import INFO
from typing import Literal

import numpy as np
from flwr.serverapp import Grid

from flower_ext._flower import log
from flower_ext.errors import whole

Purpose = Literal["train", "evaluate"]
_STREAM: dict[Purpose, int] = {"train": 0, "evaluate": 1}


class Sampler(ABC):
    """Draws the cohort of a round.

    Parameters
    ----------
    seed : int (default: 0)
        Same seed, same clients: same cohorts.
    same_for_evaluation : bool (default: False)
        Draw the evaluation's cohort as the training's of the same round: with equal
        fractions, the clients that trained evaluate.
    """

    def __init__(self, seed: int = 0, *, same_for_evaluation: bool = False) -> None:
        self.seed = whole("seed", seed, 0)
        self.same_for_evaluation = same_for_evaluation

    @abstractmethod
    def sample(
        self, clients: Sequence[int], size: int, server_round: int, purpose: Purpose
    ) -> list[int]:
        """Draw about ``size`` of ``clients`` and return them in their given order."""

    def generator(self, server_round: int, purpose: Purpose) -> np.random.Generator:
        """Return the random stream of one round and purpose."""
        stream = 0 if self.same_for_evaluation else _STREAM[purpose]
        return np.random.default_rng([self.seed, server_round, stream])

    def state_dict(self) -> dict[str, str | int]:
        """Return what identifies the random streams; they hold no other state."""
        return {
            "kind": type(self).__name__,
            "seed": self.seed,
            "same-for-evaluation": self.same_for_evaluation,
        }

    def load_state_dict(self, state: object) -> None:
        """Check that a saved run drew its cohorts as this sampler does."""
        if state != self.state_dict():
            raise ValueError(
                f"the saved run sampled with {state}, this one with "
                f"{self.state_dict()}: a resumed run needs the same sampler"
            )


class UniformSampler(Sampler):
    """Exactly ``size`` clients, uniformly without replacement."""

    def sample(
        self, clients: Sequence[int], size: int, server_round: int, purpose: Purpose
    ) -> list[int]:
        """Draw ``size`` clients."""
        chosen = self.generator(server_round, purpose).choice(
            len(clients), size, replace=False
        )
        return [clients[i] for i in sorted(chosen.tolist())]


class PoissonSampler(Sampler):
    """Every client on its own with probability ``size / len(clients)``.

    The cohort varies in size and may be empty; a round of nobody keeps the model.
    This is the sampling that privacy amplification by Poisson sampling assumes.
    """

    def sample(
        self, clients: Sequence[int], size: int, server_round: int, purpose: Purpose
    ) -> list[int]:
        """Toss one coin per client."""
        draws = self.generator(server_round, purpose).random(len(clients))
        chosen = draws * len(clients) < size
        return [client for client, take in zip(clients, chosen, strict=True) if take]


class AllClients(Sampler):
    """Every available client, whatever the size asked for."""

    def sample(
        self, clients: Sequence[int], size: int, server_round: int, purpose: Purpose
    ) -> list[int]:
        """Return all clients."""
        return list(clients)


def ordered_nodes(grid: Grid) -> list[int]:
    """Return the node ids in the order in which the nodes registered.

    Node ids are random numbers, new in every run. In a simulation nodes register in
    the order of their partitions, so this order is that of ``partition-id``, and a
    seeded cohort names the same partitions in every run.
    """
    nodes = sorted(
        grid.get_nodes(), key=lambda node: (node.registered_at, node.node_id)
    )
    return [node.node_id for node in nodes]


def wait_for_nodes(grid: Grid, at_least: int) -> list[int]:
    """Return the nodes in order, once there are ``at_least`` so many."""
    while len(nodes := ordered_nodes(grid)) < at_least:
        log(
            INFO,
            "Waiting for nodes to connect: %d connected (minimum required: %d).",
            len(nodes),
            at_least,
        )
        time.sleep(1)
    return nodes
