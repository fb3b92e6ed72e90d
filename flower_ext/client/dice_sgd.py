r"""DiceSGD: what clipping took from the gradients is kept, and fed back, clipped again.

DP-SGD is biased: gradients of examples that are clipped differently no longer add up to
the gradient of the mean loss. DiceSGD keeps the difference, e, in the silo:

.. math::
   v_t &= \frac 1 B \sum_{i \in B_t} \mathrm{clip}(g_i, C_1) + \mathrm{clip}(e_t, C_2)

   w_{t+1} &= w_t - \eta (v_t + \text{noise})

   e_{t+1} &= e_t + \frac 1 B \sum_{i \in B_t} g_i - v_t

(Zhang et al. 2024). B is the expected size of a batch, q n.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from flwr.app import Context

from flower_ext.client.dp_sgd import DPSGD
from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.noisy_steps import (
    GradSampleMode,
    NoisePlan,
    NoisySteps,
    PrivateSteps,
)
from flower_ext.client.private_session import NO_CLIPPING, PrivateSession
from flower_ext.client.task import Batch, num_examples
from flower_ext.core.errors import at_least, refuse
from flower_ext.privacy.clipping import clipping_factor
from flower_ext.privacy.example_gradients import Gradients, clipped_sum
from flower_ext.privacy.silo_budget import SiloPrivacy

#: Name of e with a client's personal state. It is not private, and never sent.
RESIDUAL = "dice-sgd-residual"


class DiceSGD(DPSGD):
    r"""Trains by DP-SGD with feedback of what clipping took; the account is dear.

    It takes the place of :class:`~flower_ext.client.dp_sgd.DPSGD`, of which it has the
    unit, what is withheld and refused, and the halves that it serves, of those that
    train one model. ::

        privacy = SiloPrivacy(noise_multiplier=50, clipping_norm=1.0, delta=1e-5)
        app = client_app(task, trainer=DiceSGD(privacy, feedback_norm=0.01))

    **When not to use it**: at epsilons below the hundreds. The bias of clipping goes,
    but the noise that the proof below asks for is tens to ten thousand times that of
    DP-SGD (``docs/silos.md`` has numbers). It is here to study the method, and for
    training without noise.

    Parameters
    ----------
    privacy : SiloPrivacy or callable
        As of :class:`~flower_ext.client.dp_sgd.DPSGD`; its ``clipping_norm`` is
        :math:`C_1`, and ``noise_multiplier`` is by :math:`C_1` on the sum, as there.
    feedback_norm : float
        :math:`C_2 \ge 0`, on the scale of the mean gradient. 0 is DP-SGD, bit for bit;
        infinity, allowed without noise only, feeds back all. The mean is unbiased where
        :math:`C_2 \ge C_1`; less feedback removes less of the bias.
    mode, release_train_loss, release_evaluation
        As of :class:`~flower_ext.client.dp_sgd.DPSGD`.

    Raises
    ------
    ValueError
        As :class:`~flower_ext.client.dp_sgd.DPSGD`; if a half trains several models,
        and if the residual is that of another model.

    Notes
    -----
    **The residual** e is a sum of unclipped gradients. It stays with the client's
    personal state from round to round, is never sent, and whoever reads the silo's
    state reads private data. The server's average replaces the model between rounds,
    but not e. What a client sends depends on what it kept, which a strategy cannot see:
    a mechanism that counts on secret cohorts of fixed size is not proved for it.

    **Guarantee.** That of :class:`~flower_ext.client.dp_sgd.DPSGD`, by another account.
    Let two silos differ in a unit, and let both have released the same so far. Their
    residuals differ, by unclipped gradients of any size, whether the unit is in the
    batch of this step or not. So the sum that is released differs by up to
    :math:`2 q n C_2` in any case, and by :math:`C_1` more for each of its examples in
    the batch. A step is charged as two releases, among which the variance of the noise
    is split: one of sensitivity :math:`2 q n C_2` *without* amplification by sampling,
    one of sensitivity :math:`C_1` with it. Proof:

    1. Fix the batches of all others, which do not depend on the unit, and the unit's
       own presence in earlier batches. Then both sums before noise are known but for
       the presence in this batch, which is a coin that nothing before depends on. The
       released sum is post-processing (addition) of the pair of releases above: a
       Gaussian with a shift of at most :math:`2 q n C_2`, and a sampled one.
    2. The earlier presence is hidden, so that what is released is a mixture over it,
       with the posterior of the releases so far. The hockey-stick divergence is jointly
       convex: the mixture's is at most that of the worst component, in both directions.
    3. So each step, given all before, is dominated by the same pair of distributions,
       and the run by their product (Zhu, Dong and Wang 2022, arXiv 2106.08567, Theorem
       10); averaging over the batches of the others keeps that, by convexity again.

    Without a bound on gradients it cannot be much better: one large gradient, once in a
    batch, moves every later sum by :math:`q n C_2`.

    **Deviations from the paper.** The paper bounds gradients and counts amplification
    by sampling for the whole of a step, residual and all, in a constant that has not
    been verified here; its theorem is not used. The divisor is the expected size of a
    batch, and batches are Poisson samples. The authors' published code carries over
    another residual where it is larger than :math:`2 C_2`; here it is the algorithm's.

    References
    ----------
    Zhang, Bu, Wu, Hong, "Differentially private SGD without clipping bias: an
    error-feedback approach", ICLR 2024, arXiv 2311.14632.
    """

    def __init__(
        self,
        privacy: SiloPrivacy | Callable[[Context], SiloPrivacy],
        *,
        feedback_norm: float,
        mode: GradSampleMode = "hooks",
        release_train_loss: bool = False,
        release_evaluation: bool = False,
    ) -> None:
        super().__init__(
            privacy,
            mode=mode,
            release_train_loss=release_train_loss,
            release_evaluation=release_evaluation,
        )
        if feedback_norm != math.inf:
            at_least("feedback_norm", feedback_norm, 0)
        self.feedback_norm = float(feedback_norm)

    def session(self, local: Local, half: ClientHalf) -> PrivateSession:
        """Return what trains for one message, and charges it to the silo's account."""
        if half.num_trainings > 1:
            cause = "there is one residual, of one model; DPSGD serves this half"
            refuse("num_trainings", half.num_trainings, "1 under DiceSGD", cause)
        return super().session(local, half)

    def always(self, privacy: SiloPrivacy, expected: float) -> float:
        """Return how many clipping norms a unit moves a sum by that it is not in."""
        if math.isinf(self.feedback_norm) and privacy.noise_multiplier != 0:
            cause = "noise scales with it"
            refuse("feedback_norm", self.feedback_norm, "finite", cause)
        if math.isinf(privacy.clipping_norm):  # which is without noise, too
            return 0.0
        return 2 * expected * self.feedback_norm / privacy.clipping_norm

    def steps(
        self, local: Local, half: ClientHalf, plan: NoisePlan, privacy: SiloPrivacy
    ) -> PrivateSteps:
        """Return the steps of one training."""
        if not self.feedback_norm:
            return super().steps(local, half, plan, privacy)
        return DiceSteps(local, half, plan, self.mode, self.feedback_norm)

    def manner(self, data: Batch, privacy: SiloPrivacy) -> Sequence[object]:
        """Return what decides a step's sum beside model, data, settings and plan."""
        return ("DiceSGD", self.feedback_norm) if self.feedback_norm else ()


class DiceSteps(NoisySteps):
    """The steps of one training; see :class:`DiceSGD`.

    Parameters
    ----------
    local, half, plan, mode
        See :class:`~flower_ext.client.noisy_steps.NoisySteps`.
    feedback_norm : float
        Clipping norm of the residual.
    """

    def __init__(
        self,
        local: Local,
        half: ClientHalf,
        plan: NoisePlan,
        mode: GradSampleMode,
        feedback_norm: float,
    ) -> None:
        super().__init__(local, half, plan, mode)
        self._feedback_norm = feedback_norm
        like = {
            name: torch.zeros_like(p, dtype=torch.float64)
            for name, p in self._trained.items()
        }
        try:
            self._residual = local.personal.arrays(RESIDUAL, like=like)
        except BaseException:
            self.end()
            raise

    def batches(self) -> Iterator[Batch]:
        """Draw every step's batch, and keep the residual after the last."""
        yield from super().batches()
        # An evaluation may keep nothing.
        if self.local.phase == "train":
            self.local.personal.save(**{RESIDUAL: self._residual})

    def summed(self, batch: Batch) -> tuple[float, Gradients]:
        """Return the summed objective, and q n times v, in float64."""
        size, expected = num_examples(batch), self._expected
        total, parts = self._backward(batch) if size else (0.0, [])
        clipped = clipped_sum(parts, size, self.plan.bound)
        whole = clipped_sum(parts, size, NO_CLIPPING)
        norm = math.hypot(*(float(e.norm()) for e in self._residual.values()))
        factor = clipping_factor(norm, self._feedback_norm)
        found: Gradients = {}
        for name, p in self._trained.items():
            e = self._residual[name]
            fed, none = factor * e, torch.zeros_like(e)
            own = clipped.get(p, none)
            found[p] = own + expected * fed
            lost = whole.get(p, none) - own
            self._residual[name] = e - fed + lost / expected
        return total, found
