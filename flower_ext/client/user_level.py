r"""User-level differential privacy inside a silo, as trainers.

A silo holds the examples of many users, and protects each user with all of them. The
trainers differ in what a step draws and clips, and so in what the noise has to hide:

====================  ==============  ==========================  ======================
trainer               a step draws    clipped to C                a user moves a sum by
====================  ==============  ==========================  ======================
:class:`ELS`          examples        an example's gradient       k C, k examples drawn
:class:`ULS`          users           a user's mean gradient      C
:class:`UserUpdates`  users           what a user's own training  C
                                      changes
====================  ==============  ==========================  ======================
"""

import warnings
from collections.abc import Callable, Sequence

from flwr.app import Context

from flower_ext.client.dp_sgd import DPSGD
from flower_ext.client.half import ClientHalf, Local, LocalSettings
from flower_ext.client.noisy_steps import NoisePlan, PrivateSteps
from flower_ext.client.task import Batch
from flower_ext.client.user_steps import UpdateSteps, UserSteps
from flower_ext.client.users import num_users, side_by_side
from flower_ext.core.errors import refuse, whole
from flower_ext.privacy.silo_budget import SiloPrivacy


class ELS(DPSGD):
    r"""Example-level sampling: DP-SGD on at most G examples of every user.

    It is :class:`~flower_ext.client.dp_sgd.DPSGD` with
    ``SiloPrivacy(max_examples_per_user=G)``, and sees that G is given. A step draws
    examples, each with probability q, and clips the gradient of each. Of one user's
    examples k are in a batch, where k is binomial, and they move the sum by up to
    :math:`k C`: every step is charged as the mixture of Gaussians

    .. math::
       \sum_{k=0}^{G} \binom{G}{k} q^k (1 - q)^{G - k} \, \mathcal N(k, \sigma^2)
       \quad \text{against} \quad \mathcal N(0, \sigma^2),

    which is tight, where group privacy would count G steps of one example. ::

        privacy = SiloPrivacy(
            epsilon=2.0, delta=1e-5, num_rounds=50, clipping_norm=1.0,
            max_examples_per_user=4,
        )
        app = client_app(task, trainer=ELS(privacy))

    Parameters
    ----------
    privacy, mode, release_train_loss, release_evaluation
        See :class:`~flower_ext.client.dp_sgd.DPSGD`. ``max_examples_per_user`` is G, 1
        or more; a rule for it is :func:`~flower_ext.client.group_size.els_group_size`.
        With 1, it is DP-SGD on one example of every user.

    Raises
    ------
    ValueError
        Without ``max_examples_per_user``.

    Notes
    -----
    **Guarantee.** As of :class:`~flower_ext.client.dp_sgd.DPSGD`, for one user with all
    examples in this silo.

    References
    ----------
    Charles et al. 2024, "Fine-tuning large language models with user-level differential
    privacy", arXiv 2407.07737.
    """

    def privacy(self, context: Context) -> SiloPrivacy:
        """Return what the silo of a context promises its users."""
        found = super().privacy(context)
        if not found.unit:
            refuse(
                "max_examples_per_user",
                None,
                "given",
                f"{self._name} protects users: SiloPrivacy(..., "
                "max_examples_per_user=4, user='user')",
            )
        return found


class ULS(ELS):
    r"""User-level sampling: DP-SGD whose steps draw and clip users.

    Every one of N users is in a step's batch B independently with probability q, and
    adds the mean gradient of at most G examples, clipped as one:

    .. math::
       \frac{1}{q N} \Big( \sum_{u \in B} \bar g_u \min(1, C / \|\bar g_u\|)
       + \mathcal N(0, \sigma^2 C^2 I) \Big), \qquad
       \bar g_u = \frac{1}{n_u} \sum_{i=1}^{n_u} g_{ui}, \quad n_u \le G .

    A user moves the sum by at most C, however many examples there are, so that a step
    costs what one of DP-SGD costs an example: more examples of a user make its gradient
    better, and the noise no larger. With one example of each user it is
    :class:`ELS`, and DP-SGD, to the bit. ::

        app = client_app(task, trainer=ULS(privacy))

    ``batch-size`` counts users: :math:`q = \min(1, \text{batch-size} / N)`, and an
    epoch is :math:`\lceil N / \text{batch-size} \rceil` steps. A silo that has fewer
    users than that takes all of them in each step; sampling hides nobody then, which a
    warning says.

    Parameters
    ----------
    privacy, mode, release_train_loss, release_evaluation
        See :class:`~flower_ext.client.dp_sgd.DPSGD`. ``max_examples_per_user`` is G, a
        bound on a step's work; a rule for it is
        :func:`~flower_ext.client.group_size.uls_group_size`.

    Raises
    ------
    ValueError
        Without ``max_examples_per_user``, and as of
        :class:`~flower_ext.client.dp_sgd.DPSGD`.

    Notes
    -----
    **Guarantee.** As of :class:`~flower_ext.client.dp_sgd.DPSGD`, with users in the
    place of examples. *Unit*: one user with all examples in this silo. *Neighbours*:
    the user's examples contribute zero; N and the number of examples, after the cap,
    are public. *Accounting*: of the Poisson-sampled Gaussian over users, tight.
    *Clipping*: the mean over a user's examples is formed first, in float64, and its
    norm is that of the very numbers that are added up.

    A ledger counts the steps of ELS and of ULS for the same users, whatever their G.

    *Assumed*, beside what DP-SGD assumes: that a row's user is who it says. Somebody
    under two names is protected as two.

    A user's examples are the first G in the order of the data, as in :class:`ELS`, so
    that both train on the same ones.

    References
    ----------
    Charles et al. 2024, arXiv 2407.07737.
    """

    def sensitivity(self, privacy: SiloPrivacy) -> int:
        """Return 1: a user is clipped as one, whatever its number of examples."""
        return 1

    def admitted(self, data: Batch, privacy: SiloPrivacy) -> Batch:
        """Return at most G examples of every user, side by side."""
        kept = super().admitted(data, privacy)
        order = side_by_side(kept[privacy.user])
        return {name: column[order] for name, column in kept.items()}

    def num_drawn(self, data: Batch, privacy: SiloPrivacy) -> int:
        """Return the number of users."""
        return num_users(data, privacy.user)

    def rate(self, local: Local, privacy: SiloPrivacy) -> float:
        """Return the probability with which a step draws each user."""
        users = self.num_drawn(local.train, privacy)
        return _rate("batch-size", local.settings.batch_size, users)

    def steps(
        self, local: Local, half: ClientHalf, plan: NoisePlan, privacy: SiloPrivacy
    ) -> PrivateSteps:
        """Return the steps of one training."""
        return UserSteps(local, half, plan, self.mode, privacy.user)


class UserUpdates(ULS):
    r"""Local training of every drawn user, clipped and noised: DP-FedAvg in a silo.

    A message is one noisy step. Each of the silo's N users is drawn with probability
    :math:`q = M / N`, starts from the received model w, and trains as a client of plain
    federated averaging would that has this user's examples alone, with an optimizer of
    its own. The silo sends

    .. math::
       w + \frac{1}{M} \Big( \sum_{u \in B} \Delta_u \min(1, C / \|\Delta_u\|)
       + \mathcal N(0, \sigma^2 C^2 I) \Big), \qquad \Delta_u = w_u - w .

    Users are what PFL-DocVQA calls providers: whose invoices they are. One pass over
    them, M = 50 and C = 0.5 are the settings of its baseline. Frozen parameters stay as
    they are, without noise. With one user, no clipping and no noise, a silo is a client
    of federated averaging. ::

        app = client_app(task, trainer=UserUpdates(privacy, users_per_round=50))

    Learning rate, ``batch-size``, ``local-epochs`` or ``local-steps`` of the message
    are those of one user's training; ``max-gradient-norm`` is allowed in it.

    Parameters
    ----------
    privacy, release_train_loss, release_evaluation
        See :class:`~flower_ext.client.dp_sgd.DPSGD`. ``clipping_norm`` bounds a user's
        change, over all trained parameters. ``max_examples_per_user`` bounds its work.
    users_per_round : int
        M, the expected number of users in a round, at least 1. A silo that has fewer
        takes all, which a warning says.

    Raises
    ------
    ValueError
        As of :class:`ULS`; if the model has a BatchNorm in training, if
        ``Task.optimizer`` is a :class:`~flower_ext.client.task.LocalOptimizer`, and,
        when the ClientApp is made, for halves with an ``optimizer`` or
        ``after_backward`` of their own, which would be shown one user's gradients.

    Notes
    -----
    **Guarantee.** As of :class:`ULS`; each training of a message costs one step. A
    half's ``objective`` and ``regularizer`` are part of each user's training, and
    clipped with its change; its ``after_step`` comes after the noise, so that a mask
    or a projection holds for what is sent. Buffers are as received after every user.

    *Assumed*: one user's training leaves nothing for the next but in parameters and
    buffers of the model; ``objective`` and the task's loss keep nothing of a batch.

    **Deviations.** The competition's baseline draws exactly 50 providers without
    replacement. Here each is drawn by itself: the sum is then divided by the planned
    number, and the guarantee is the tight one of Poisson sampling, for a user that
    contributes nothing, not for one that is exchanged.

    References
    ----------
    Tobaben et al. 2024, "NeurIPS 2023 competition: privacy preserving federated
    learning document VQA", arXiv 2411.03730 (track 2); McMahan et al. 2018, "Learning
    differentially private recurrent language models", arXiv 1710.06963 (DP-FedAvg).
    """

    def __init__(
        self,
        privacy: SiloPrivacy | Callable[[Context], SiloPrivacy],
        *,
        users_per_round: int,
        release_train_loss: bool = False,
        release_evaluation: bool = False,
    ) -> None:
        super().__init__(
            privacy,
            release_train_loss=release_train_loss,
            release_evaluation=release_evaluation,
        )
        self.users_per_round = whole("users_per_round", users_per_round, 1)

    def admit(self, half: type[ClientHalf]) -> None:
        """Refuse a half that would be shown gradients without noise."""
        super().admit(half)
        self._refuse_hooks(half)

    def _refuse_hooks(self, half: type[ClientHalf]) -> None:
        for name in ("optimizer", "after_backward"):
            if getattr(half, name) is not getattr(ClientHalf, name):
                raise ValueError(
                    f"{half.__name__} cannot be served by {self._name}: its {name} "
                    "would be given one user's gradients, without noise, and what it "
                    "keeps of them could leave with the next model; ULS gives it noisy "
                    "ones"
                )

    def planned_steps(self, half: ClientHalf) -> Callable[[Local], int | None]:
        """Plan one release for each training, however long it is."""
        return lambda local: None

    def num_releases(self, local: Local) -> int:
        """Return 1, or 0 where nobody takes a step."""
        return min(1, local.num_steps)

    def rate(self, local: Local, privacy: SiloPrivacy) -> float:
        """Return the probability with which a round draws each user."""
        users = self.num_drawn(local.train, privacy)
        return _rate("users_per_round", self.users_per_round, users)

    def refuse_settings(self, settings: LocalSettings) -> None:
        """Refuse nothing: a user trains as it would without privacy."""

    def steps(
        self, local: Local, half: ClientHalf, plan: NoisePlan, privacy: SiloPrivacy
    ) -> PrivateSteps:
        """Return the step of one training."""
        # Also of a half that another one has trained, which nobody has admitted.
        self._refuse_hooks(type(half))
        return UpdateSteps(local, half, plan, privacy.user)

    def manner(self, data: Batch, privacy: SiloPrivacy) -> Sequence[object]:
        """Tell it from steps by gradients."""
        return ("updates",)


def _rate(name: str, wanted: int, users: int) -> float:
    if wanted > users > 0:
        warnings.warn(
            f"{name}={wanted} > users={users} of the silo: all are in every step, and "
            "sampling hides nobody",
            stacklevel=4,
        )
    return min(1.0, wanted / max(users, 1))
