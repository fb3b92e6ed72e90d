r"""AdaDPS: private adaptive optimization with side information.

A diagonal preconditioner, from public data or from what is known of the inputs, brings
all coordinates of a client's change to one size before it is clipped and noised (Li,
Zaheer, Reddi and Smith 2022, "Private Adaptive Optimization with Side Information",
ICML, arXiv 2202.05963).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from logging import WARNING
from typing import Unpack, cast

import numpy as np
import torch
from flwr.app import UserConfig
from flwr.common import NDArray
from torch import Tensor

from flower_ext._flower import log
from flower_ext.client.task import Batch, Task, batches, num_examples
from flower_ext.core.arrays import Arrays, all_finite, is_parameter, none_below_zero
from flower_ext.core.contribution import DELTA, Contribution
from flower_ext.core.errors import at_least, fraction, refuse, whole
from flower_ext.core.protocol import Config, Reply, Round
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.drop_in import DropIn
from flower_ext.server.learned_maps import PublicLoss, tensors_of
from flower_ext.server.options import AdditiveOptions
from flower_ext.server.preconditioning import inverse_roots, precondition


class PublicStatistics(ABC):
    """Second moments of coordinates that say nothing of any client's data.

    Epsilon does not cover them: whoever makes one states that its data are public.
    Nothing can check that.
    """

    @abstractmethod
    def second_moments(self, sent: Arrays, before: Arrays) -> Arrays:
        """Return A of a round.

        Parameters
        ----------
        sent : dict[str, ndarray]
            The model of the round.
        before : dict[str, ndarray]
            A of the round before; empty in the first.

        Raises
        ------
        ValueError
            If it does not fit this model.
        """


class PublicMoments(PublicStatistics):
    """Second moments that are known before the run, and stay.

    Parameters
    ----------
    second_moments : dict[str, ndarray]
        A, finite and >= 0, by array of the model, and such as NumPy broadcasts to its
        shape: of inputs ``(inputs,)`` for ``nn.Linear``, ``(inputs, 1)`` for
        ``nn.Embedding``. Arrays without an entry are not preconditioned; with none at
        all the strategy is FedAvg.

    Examples
    --------
    >>> PublicMoments({"weight": np.array([4.0, 1.0])})
    PublicMoments(['weight'])
    """

    def __init__(self, second_moments: Mapping[str, NDArray]) -> None:
        self._moments = _checked("second_moments", second_moments)

    @classmethod
    def of_frequencies(
        cls, frequencies: Mapping[str, NDArray], most: float = 100.0
    ) -> "PublicMoments":
        r"""Make them of how frequent inputs are, such as the words of a vocabulary.

        The gradient of a weight of an input that few examples have is small. With
        ``tau=0`` an input is multiplied by :math:`\min(m, \max_j f_j / f_i)`: the most
        frequent one by 1, and one that never occurs by :math:`m`. The frequencies must
        be public, as those of a language are, or of a public corpus.

        Parameters
        ----------
        frequencies : dict[str, ndarray]
            :math:`f \ge 0`, in any unit, of the inputs of each array; shaped as above.
        most : float (default: 100)
            :math:`m \ge 1`, the largest factor; 1 is FedAvg.

        Examples
        --------
        >>> words = {"weight": np.array([50.0, 5.0, 0.0])}
        >>> PublicMoments.of_frequencies(words, most=20).second_moments(
        ...     {"weight": np.ones((1, 3))}, {})
        {'weight': array([[1.    , 0.01  , 0.0025]])}
        """
        at_least("most", most, 1)
        known = _checked("frequencies", frequencies)
        for name, x in known.items():
            if not x.max() > 0:
                refuse(f"frequencies[{name!r}]", x, "> 0 for some input")
        roots = {n: np.maximum(x / x.max(), 1 / most) for n, x in known.items()}
        return cls({name: np.square(x) for name, x in roots.items()})

    def second_moments(self, sent: Arrays, before: Arrays) -> Arrays:
        """Return what was given, in the shapes of the model."""
        known = [name for name, x in sent.items() if is_parameter(name, x)]
        if unknown := sorted(self._moments.keys() - set(known)):
            refuse("public_statistics", unknown, f"of trained arrays: {known}")
        return {n: _as_shape(n, x, sent[n].shape) for n, x in self._moments.items()}

    def __repr__(self) -> str:
        """Name the arrays."""
        return f"PublicMoments({sorted(self._moments)})"


def _checked(kind: str, given: Mapping[str, NDArray]) -> Arrays:
    """Return arrays of numbers >= 0, in float64."""
    if not isinstance(given, Mapping):
        refuse(kind, given, "a dict of arrays, by name")
    arrays = {name: np.asarray(x, np.float64) for name, x in given.items()}
    for name, x in arrays.items():
        if not x.size or not all_finite([x]) or not none_below_zero([x]):
            refuse(f"{kind}[{name!r}]", x, "finite and >= 0, and not empty")
    return arrays


def _as_shape(name: str, x: NDArray, shape: tuple[int, ...]) -> NDArray:
    try:
        return np.array(np.broadcast_to(x, shape))
    except ValueError:
        refuse(f"shape of public_statistics[{name!r}]", x.shape, f"as {shape} of it")


class PublicGradients(PublicStatistics):
    r"""Second moments of gradients on public data, at the model of each round.

    With :math:`g_{t, b}` the gradient on public batch b of B at the model of round t,

    .. math::
       A_t = \beta A_{t-1} + (1 - \beta) \frac{1}{B} \sum_b g_{t, b}^2, \qquad
       A_1 = \frac{1}{B} \sum_b g_{1, b}^2.

    Parameters
    ----------
    task : Task
        The clients' own: its model and its loss.
    public : dict[str, Tensor]
        The public data, at least one example; columns as the task's. All are read in
        every round, in their order: a few hundred examples.
    decay : float (default: 0.9)
        :math:`\beta` from 0, this round's alone, to 1, the first round's alone.
    batch_size : int (default: 32)
        Examples in a batch; the smaller, the more of the gradients' spread is in A.
    run_config : dict, optional
        What ``task.model`` is called with.
    """

    def __init__(
        self,
        task: Task,
        public: Batch,
        *,
        decay: float = 0.9,
        batch_size: int = 32,
        run_config: UserConfig | None = None,
    ) -> None:
        if not isinstance(task, Task):
            refuse("task", task, "a Task", "Task(model, data, loss), as the clients'")
        if not isinstance(public, Mapping) or not public or not num_examples(public):
            refuse("public", public, "columns with at least one example")
        self.decay = fraction("decay", decay)
        whole("batch_size", batch_size, 1)
        with torch.random.fork_rng(devices=[]):  # models begin at random
            model = task.model(run_config or {})
        self._trained = [n for n, x in model.named_parameters() if x.requires_grad]
        self._losses = [PublicLoss(task, model, x) for x in batches(public, batch_size)]

    def second_moments(self, sent: Arrays, before: Arrays) -> Arrays:
        """Return the moving mean; that of before where this round's is not finite."""
        if unknown := sorted(set(self._trained) - sent.keys()):
            refuse("task", unknown, "a model of the names of initial_arrays")
        squares = self._squares(tensors_of(sent))
        new = {name: x.double().numpy() for name, x in squares.items()}
        if not all_finite(new.values()):
            if not before:
                cause = "the gradients at the initial model are not finite"
                refuse("public", len(self._losses), "other data", cause)
            log(WARNING, "gradients on public data are not finite: the old ones stay")
            return before
        if not before:
            return new
        beta = self.decay
        return {n: beta * before[n] + (1 - beta) * x for n, x in new.items()}

    def _squares(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean square of the batches' gradients."""
        squares = {name: torch.zeros_like(tensors[name]) for name in self._trained}
        with torch.enable_grad():
            trained = [tensors[name].requires_grad_() for name in self._trained]
            for loss in self._losses:
                found = torch.autograd.grad(
                    loss.of(tensors), trained, allow_unused=True
                )
                for name, gradient in zip(self._trained, found, strict=True):
                    if gradient is not None:
                        squares[name] += gradient.square() / len(self._losses)
        return squares

    def __repr__(self) -> str:
        """Name the settings."""
        return f"PublicGradients({len(self._losses)} batches, decay={self.decay:g})"


class AdaDPS(AdditiveStrategy):
    r"""Federated averaging of changes that are preconditioned by public statistics.

    Against FedAvg, every change is divided before it is clipped, and the step is taken
    in these coordinates (Algorithm 1, with a client's change in the place of an
    example's gradient):

    .. math::
       w \leftarrow w + \frac{1}{m} \Big( \sum_k
       \mathrm{clip}_C\Big(\frac{\Delta_k}{\sqrt{A} + \tau}\Big)
       + N(0, \sigma^2 C^2 I) \Big).

    Nothing is divided after the noise, which is as large in every coordinate of the
    model. With :math:`A = 1` and :math:`\tau = 0` it is FedAvg. Works with an
    unmodified client.

    Parameters
    ----------
    public_statistics : PublicStatistics
        :math:`A`: :class:`PublicGradients`, of public data in every round, or
        :class:`PublicMoments`, which are known before the run. They are not made
        private: **they must not be made of clients' data.**
    tau : float (default: 0.001)
        :math:`\tau \ge 0`, in the unit of :math:`\sqrt{A}`: the largest factor is
        :math:`1 / \tau`. The larger, the more it is FedAvg of a smaller rate. 0 only
        with :class:`PublicMoments` that are all > 0.
    *flowers, **options
        Server optimizer, sampler, mechanism, codecs and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Raises
    ------
    ValueError
        Before the first round, if the statistics do not fit the model.

    Notes
    -----
    What is clipped is the preconditioned change: the clipping norm is for its length,
    and the server's learning rate for steps in its unit. Without a mechanism
    nothing is clipped, and a step is as long as the preconditioner makes it.

    **Privacy.** That of the mechanism, with the same epsilon as without a
    preconditioner: it is the same for all clients, and made of public data and of
    released models. Statistics of clients' own data would tell of them, without noise,
    and no argument of this class can see that they are.

    **Deviation from the paper.** It preconditions gradients of examples, and its
    authors' code for clients those of local training; here the change of a client is
    preconditioned, on the server, so that clients and codecs stay as they are.

    Examples
    --------
    >>> words = PublicMoments.of_frequencies({"weight": np.array([50.0, 5.0, 0.5])})
    >>> strategy = AdaDPS(public_statistics=words, tau=0)
    """

    drop_in = DropIn(
        arguments=lambda cohort: {"public_statistics": PublicMoments({})},
        written="public_statistics=...",
        explained="of flower_ext.strategies.adadps, PublicGradients(task, public) of\n"
        "public examples, or PublicMoments of numbers that are known",
    )

    def __init__(
        self,
        *flowers: object,
        public_statistics: PublicStatistics,
        tau: float = 1e-3,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(*flowers, **options)
        if not isinstance(public_statistics, PublicStatistics):
            refuse(
                "public_statistics",
                public_statistics,
                "PublicGradients(task, public) or PublicMoments(second_moments)",
                "epsilon does not cover them: say that they are public by making one",
            )
        self.tau = at_least("tau", tau, 0)
        if tau == 0 and not isinstance(public_statistics, PublicMoments):
            cause = "a gradient that is 0 in some later round would end the run"
            refuse("tau", tau, "> 0 but with PublicMoments", cause)
        #: The factors of this round, by array.
        self.preconditioner: Arrays = {}
        # Of the server alone: a task need not be picklable.
        self._public = public_statistics
        self._moments: Arrays = {}

    def tell(self, round: Round) -> Config:
        """Look at the statistics before a round of training; clients are told nothing.

        It does not depend on who is asked, or whether anybody is.
        """
        if round.phase == "train":
            found = self._public.second_moments(round.sent, self._moments)
            self.preconditioner = inverse_roots(found, self.tau)
            self._moments = found
        return {}

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        """Return the preconditioned change."""
        change = precondition(reply.delta(round), self.preconditioner)
        return Contribution({DELTA: change})

    def state_dict(self) -> dict[str, object]:
        """Add the second moments."""
        return {**super().state_dict(), "second-moments": self._moments}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over the second moments."""
        super().load_state_dict(state)
        self._moments = dict(cast("Arrays", state["second-moments"]))

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        own = {"Public statistics": self._public, "tau": self.tau}
        return {**own, **super().settings()}
