"""What noisy sums have said of single examples: an account that stays in the silo.

A worst-case guarantee is for any example there could be. What was released of one that
is there depends on its gradients and on those of the others, and is less. That number
is made of the data without noise: nobody but the silo may see it.
"""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flower_ext.core.errors import open_unit, refuse
from flower_ext.core.typing import Floats
from flower_ext.privacy.bounded import (
    ORDERS,
    BoundedGaussian,
    epsilon_of_divergences,
)
from flower_ext.privacy.silo_account import ledger_path

FORMAT = 1
GAUSSIAN = BoundedGaussian(-math.inf, math.inf)


@dataclass(frozen=True)
class InstanceReport:
    """Which examples of a silo are looked at, and where what is found is written.

    Parameters
    ----------
    folder : path
        Of the silo's own, absolute or under ``~``, and there already. Each client
        writes ``instances-<number>.json``, to which all its rounds and runs add up. It
        says what the noise hides: keep it like the data.
    examples : sequence of int
        Their places in the silo's training data.
    """

    folder: str | os.PathLike[str]
    examples: tuple[int, ...]

    def __post_init__(self) -> None:
        found = self.examples
        whole = all(isinstance(i, int) and not isinstance(i, bool) for i in found)
        if not found or not whole or min(found) < 0 or len(set(found)) < len(found):
            refuse("examples", found, "different places in the training data, from 0")
        object.__setattr__(self, "examples", tuple(found))
        self.path(0)

    def path(self, client: int) -> Path:
        """Return the file of a client."""
        path = ledger_path(Path(self.folder) / f"instances-{client}.json")
        if not path.parent.is_dir():
            refuse("folder", str(self.folder), "a folder that is there")
        return path


@dataclass
class InstanceAccount:
    r"""What releases have said of some examples, summed over coordinates and steps.

    Of an example with the clipped gradient :math:`g_i`, a step that has drawn it
    releases a bounded Gaussian around the sum :math:`\theta_1`, and would without it
    around :math:`\theta_2 = \theta_1 - g_i`. A step that has not drawn it says nothing
    of it. Poisson sampling hides which those were; no bound on what that gains is known
    for single coordinates, and none is taken off.

    Attributes
    ----------
    examples : tuple of int
        Their places in the training data.
    steps : int
        Steps so far, whether they drew one of them or not.
    fisher : ndarray
        :math:`\sum_t \sum_j g_{ij}^2 I(\theta_{1j})`, of shape ``(examples,)``.
    divergences : ndarray
        Renyi divergences of :data:`~flower_ext.privacy.bounded.ORDERS`, towards the sum
        without the example and from it, of shape ``(2, examples, orders)``.
    shifts : ndarray
        :math:`\sum_t \|g_i\|^2 / s^2`, of shape ``(examples,)``: all that counts where
        the noise is a Gaussian without bounds.

    Notes
    -----
    Neither is a guarantee. Per-instance differential privacy (Wang 2019) is what an
    adversary who knows all other examples learns of this one in the steps that were
    taken; both numbers are themselves made of the data.

    Each step's divergence is that given the releases before it. Their sum is along the
    one run that there was: it bounds the divergence of whole runs only where no other
    run could have had a larger one, since later steps depend on earlier noise (Feldman
    and Zrnic 2021, arXiv 2008.11193, stop at a bound that is set before). With the
    Gaussian's worst-case epsilon nothing of that is needed.

    The paper takes the Fisher information about an example's features. Here it is that
    about its weight in the sum: whoever estimates without bias how much of an example
    is in it, does so with a variance of at least ``1 / loss**2``.

    Examples
    --------
    >>> account = InstanceAccount((0,))
    >>> account.add(0, with_it=np.array([0.5]), own=np.array([0.5]), deviation=1.0)
    >>> float(account.fisher_information_loss(0))
    0.5
    """

    examples: tuple[int, ...]
    steps: int = 0
    fisher: Floats = field(default_factory=lambda: np.zeros(0))
    divergences: Floats = field(default_factory=lambda: np.zeros(0))
    shifts: Floats = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        if not self.fisher.size:
            self.fisher, self.shifts = np.zeros((2, len(self.examples)))
            self.divergences = np.zeros((2, len(self.examples), len(ORDERS)))

    def add(
        self,
        example: int,
        *,
        with_it: Floats,
        own: Floats,
        deviation: float,
        noise: BoundedGaussian = GAUSSIAN,
    ) -> None:
        """Add the release of one step that has drawn an example.

        Parameters
        ----------
        example : int
            Its place in the training data.
        with_it, own : ndarray
            The sum that was released, and what of it is the example's.
        deviation : float
            Standard deviation of the noise.
        noise : BoundedGaussian
            Its bounds, in the units of the sum.
        """
        place = self.examples.index(example)
        mine = own != 0  # a coordinate that is the same tells nothing
        one, g = with_it[mine], own[mine]
        information = noise.fisher_information(one, deviation)
        self.fisher[place] += np.sum(g**2 * information)
        self.shifts[place] += np.sum(g**2) / deviation**2
        for i, order in enumerate(ORDERS):
            for way, (x, y) in enumerate(((one, one - g), (one - g, one))):
                found = noise.renyi_divergence(order, x, y, deviation)
                self.divergences[way, place, i] += found.sum()

    def epsilon(self, example: int, delta: float) -> float:
        """Return the example's per-instance epsilon, the larger of both directions."""
        open_unit("delta", delta)
        place = self.examples.index(example)
        if not self.divergences[:, place].any():
            return 0.0
        ways = (list(way[place]) for way in self.divergences)
        return max(epsilon_of_divergences(way, delta) for way in ways)

    def unbounded_epsilon(self, example: int, delta: float) -> float:
        """Return what epsilon would be of the same sums, if no noise were cut."""
        shift = float(self.shifts[self.examples.index(example)])
        if not shift:
            return 0.0
        return epsilon_of_divergences([x * shift / 2 for x in ORDERS], delta)

    def fisher_information_loss(self, example: int) -> float:
        """Return the root of the Fisher information about the example's weight."""
        return math.sqrt(self.fisher[self.examples.index(example)])

    @classmethod
    def load(cls, path: Path, examples: tuple[int, ...]) -> "InstanceAccount":
        """Read a client's file; one that is not there has no steps.

        Raises
        ------
        ValueError
            If it is of other examples, or cannot be read.
        """
        if not path.exists():
            return cls(examples)
        try:
            kept = json.loads(path.read_text("utf-8"))
            if kept["format"] != FORMAT or tuple(kept["orders"]) != ORDERS:
                refuse("format", kept["format"], f"{FORMAT}, of the same orders")
            if tuple(kept["examples"]) != examples:
                refuse("examples", examples, f"{kept['examples']}, as in {path}")
            shape = (2, len(examples), len(ORDERS))
            fisher = np.asarray(kept["fisher"], np.float64).reshape(len(examples))
            divergences = np.asarray(kept["divergences"], np.float64).reshape(shape)
            shifts = np.asarray(kept["shifts"], np.float64).reshape(len(examples))
            return cls(examples, int(kept["steps"]), fisher, divergences, shifts)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} cannot be read: {error!r}") from error

    def save(self, path: Path) -> None:
        """Write a client's file, all of it or nothing."""
        kept = {
            "format": FORMAT,
            "examples": self.examples,
            "steps": self.steps,
            "orders": ORDERS,
            "fisher": self.fisher.tolist(),
            "divergences": self.divergences.tolist(),
            "shifts": self.shifts.tolist(),
        }
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(kept, allow_nan=False), "utf-8")
        partial.replace(path)
