r"""DP2: private adaptive optimization whose preconditioner is late, and so less noisy.

A second moment that is estimated from one round's noisy mean is mostly that of the
noise. Here it is estimated from the mean of several rounds, in which the noise averages
out, and used in the rounds that follow (Li, Zaheer, Liu, Reddi, McMahan and Smith 2023,
"Differentially Private Adaptive Optimization with Delayed Preconditioners", ICLR, arXiv
2212.00309).
"""

from collections.abc import Mapping
from typing import Literal, Unpack, cast, get_args

import numpy as np

from flower_ext.core.arrays import Arrays, is_averaged, scale
from flower_ext.core.contribution import DELTA, Contribution, Total
from flower_ext.core.errors import fraction, one_of, positive, refuse, whole
from flower_ext.core.protocol import Metrics, Reply, Round
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.options import AdditiveOptions
from flower_ext.server.preconditioning import inverse_roots, precondition

Moments = Literal["rmsprop", "adagrad"]


class DP2(AdditiveStrategy):
    r"""Federated averaging that alternates between plain and preconditioned rounds.

    Against FedAvg: there are :math:`s_1` plain rounds, those of FedAvg, from whose
    mean :math:`\bar g`, of what was released in them, the second moments become

    .. math::
       v \leftarrow \gamma v + (1 - \gamma)\, \bar g^2 \quad \text{(rmsprop)}, \qquad
       v \leftarrow v + \bar g^2 \quad \text{(adagrad)},

    and then :math:`s_2` adaptive rounds, in which every change is divided before it is
    clipped, to a norm of its own (Algorithm 1):

    .. math::
       w \leftarrow w + \frac{\eta}{m} \Big( \sum_k
       \mathrm{clip}_{C_2}\Big(\frac{\Delta_k}{\sqrt{v} + \tau}\Big)
       + N(0, \sigma^2 C_2^2 I) \Big).

    Nothing is divided after the noise. With ``plain_rounds`` as many as there are it is
    FedAvg. Works with an unmodified client.

    Parameters
    ----------
    plain_rounds : int (default: 5)
        :math:`s_1`, the delay: the longer, the less noise is in :math:`v`, and the
        older it is.
    adaptive_rounds : int (default: 5)
        :math:`s_2`; the paper takes as many.
    adaptive_clipping_norm : float, optional
        :math:`C_2`; by default the mechanism's, :math:`C_1`. Without a mechanism
        nothing is clipped.
    adaptive_rate : float (default: 1.0)
        :math:`\eta`, a factor on the steps of adaptive rounds, beside the server
        optimizer's learning rate. Where most changes are clipped, a step is as long as
        in a plain round times :math:`\eta C_2 / C_1`; without a mechanism it is as long
        as the preconditioner makes it, and 0.01 is a beginning.
    moments : {"rmsprop", "adagrad"} (default: "rmsprop")
        How :math:`v` goes on from its last value, which is 0 at first.
    decay : float (default: 0.9)
        :math:`\gamma` of rmsprop, from 0, the last plain rounds alone, to below 1.
    tau : float (default: 0.001)
        :math:`\tau > 0`, in the unit of a change: the largest factor is
        :math:`1 / \tau`. The larger, the more an adaptive round is a plain one.
    *flowers, **options
        Server optimizer, sampler, mechanism, codecs and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Raises
    ------
    ValueError
        If ``adaptive_clipping_norm`` is given for a mechanism that does not clip.

    Notes
    -----
    **Privacy.** There is one noisy sum in every round, and :math:`v` is made of these:
    epsilon is that of FedAvg under the same mechanism. The mechanism plans with one
    clipping norm for all rounds, which correlated noise needs. In an adaptive round a
    preconditioned change x is therefore contributed as :math:`(C_1 / C_2)\, x`, and the
    released mean is multiplied by :math:`C_2 / C_1`. Since

    .. math::
       \frac{C_2}{C_1} \mathrm{clip}_{C_1}\Big(\frac{C_1}{C_2} x\Big)
       = \frac{C_2}{C_1} \cdot \frac{C_1}{C_2}\, x
       \min\Big(1, \frac{C_1}{(C_1 / C_2) \|x\|}\Big) = \mathrm{clip}_{C_2}(x),

    and noise of :math:`\sigma C_1` becomes noise of :math:`\sigma C_2`, that is the
    algorithm, while the mechanism sees norms of at most :math:`C_1` and nothing else;
    the factors are settings, not data. The same holds by layers. With
    ``AdaptiveClipping`` both norms move together. Correlated noise cancels in full
    within the rounds of one kind; from one kind to the other it is scaled by
    :math:`\eta C_2 / C_1`, and with 1 it cancels throughout.

    Metrics: ``adaptive-round``, 0 or 1; ``clipping-norm`` and ``noise-std`` are those
    of the round's kind, the latter before ``adaptive_rate``. The server keeps two
    arrays of the model's size, in float64. A round in which the model was kept, for
    want of replies, is not counted. Momentum of the server optimizer goes on over both
    kinds. BatchNorm's statistics are never divided.

    **Deviation from the paper.** Its changes are gradients of examples; here they are
    those of clients, by local training.

    Examples
    --------
    >>> strategy = DP2(plain_rounds=10, adaptive_rounds=10, fraction_train=0.1)
    """

    def __init__(
        self,
        *flowers: object,
        plain_rounds: int = 5,
        adaptive_rounds: int = 5,
        adaptive_clipping_norm: float | None = None,
        adaptive_rate: float = 1.0,
        moments: Moments = "rmsprop",
        decay: float = 0.9,
        tau: float = 1e-3,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(*flowers, **options)
        self.plain_rounds = whole("plain_rounds", plain_rounds, 1)
        self.adaptive_rounds = whole("adaptive_rounds", adaptive_rounds, 1)
        self.adaptive_rate = positive("adaptive_rate", adaptive_rate)
        self.moments = one_of("moments", moments, get_args(Moments))
        self.decay = fraction("decay", decay)
        if decay == 1:
            refuse("decay", decay, "< 1", "the second moments would stay 0")
        self.tau = positive("tau", tau, "it bounds the factors where nothing moved")
        self.adaptive_clipping_norm = adaptive_clipping_norm
        #: C_2 / C_1.
        self.norm_ratio = self._ratio(adaptive_clipping_norm)
        #: The factors of this round, by array; empty in a plain one.
        self.preconditioner: Arrays = {}
        self._place = 0  # in the cycle
        self._released: Arrays = {}  # of the directions of the plain rounds
        self._second: Arrays = {}

    def _ratio(self, norm: float | None) -> float:
        if norm is None:
            return 1.0
        positive("adaptive_clipping_norm", norm)
        if self.mechanism is None:
            return 1.0
        ratio = norm / self.mechanism.clipping.clipping_norm
        if not ratio > 0:
            cause = "the mechanism's clipping norm is infinite: nothing is clipped"
            refuse("adaptive_clipping_norm", norm, "left out", cause)
        return ratio

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        """Return the change; in an adaptive round preconditioned, for a norm of C_1."""
        change = reply.delta(round)
        if not self.preconditioner:
            return Contribution({DELTA: change})
        divided = precondition(change, self.preconditioner)
        return Contribution(
            {
                DELTA: {
                    name: scale(x, 1 / self.norm_ratio)
                    if is_averaged(round.sent[name])
                    else x
                    for name, x in divided.items()
                }
            }
        )

    def update(self, total: Total, round: Round) -> Arrays:
        """Return the mean; in an adaptive round back in its own unit."""
        mean = total.mean()
        if not self.preconditioner:
            return mean
        floats, trained = round.floats, round.parameters
        return {
            name: x
            * (self.norm_ratio if name in floats else 1.0)
            * (self.adaptive_rate if name in trained else 1.0)
            for name, x in mean.items()
        }

    def report(self, total: Total, round: Round) -> Metrics:
        """Return the kind of the round, and its own norm and noise."""
        if not self.preconditioner:
            return {"adaptive-round": 0}
        own: Metrics = {"adaptive-round": 1}
        if self.private_sum is not None:
            for key in ("clipping-norm", "noise-std"):
                if key in self.private_sum.metrics():
                    found = cast(float, self.private_sum.metrics()[key])
                    own[key] = found * self.norm_ratio
        return own

    def advance(self, total: Total, round: Round) -> None:
        """Add up what plain rounds have released, and go on in the cycle."""
        if self._place < self.plain_rounds:
            mean = total.mean()
            self._released = {
                n: self._released.get(n, 0.0) + mean[n] for n in round.parameters
            }
        self._place += 1
        if self._place == self.plain_rounds:
            self._second = {n: self._moved(n, x) for n, x in self._released.items()}
            self._released = {}
        self._place %= self.plain_rounds + self.adaptive_rounds
        self._prepare_round()

    def _moved(self, name: str, summed: np.ndarray) -> np.ndarray:
        """Return the second moments of an array after some plain rounds."""
        square = np.square(summed / self.plain_rounds)
        before = self._second.get(name, np.zeros(()))
        if self.moments == "adagrad":
            return np.asarray(before + square)
        return np.asarray(self.decay * before + (1 - self.decay) * square)

    def _prepare_round(self) -> None:
        adaptive = self._place >= self.plain_rounds
        found = inverse_roots(self._second, self.tau) if adaptive else {}
        self.preconditioner = found

    def state_dict(self) -> dict[str, object]:
        """Add the place in the cycle, and what was added up and estimated."""
        own = {
            "place": self._place,
            "sum": self._released,
            "second-moments": self._second,
        }
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on at that place."""
        super().load_state_dict(state)
        self._place = cast(int, state["place"])
        self._released = dict(cast("Arrays", state["sum"]))
        self._second = dict(cast("Arrays", state["second-moments"]))
        self._prepare_round()

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        rounds = f"{self.plain_rounds} plain, {self.adaptive_rounds} adaptive"
        own = {"Rounds": rounds, "Moments": self.moments, "tau": self.tau}
        own |= {"Adaptive norm": self.adaptive_clipping_norm or "the mechanism's"}
        return {**own, "Adaptive rate": self.adaptive_rate, **super().settings()}
