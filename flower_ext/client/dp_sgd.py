r"""Example-level differential privacy inside every silo: DP-SGD as local training.

Cross-silo federations have few clients with many people's data in each, and what needs
protection is a person, not a hospital. Every silo trains with DP-SGD: a step releases

.. math::
   \frac{1}{q n} \Big( \sum_{i \in B} g_i \min(1, C / \|g_i\|)
   + \mathcal N(0, \sigma^2 C^2 I) \Big),

where every one of the n examples is in the batch B independently with probability q.
What leaves the silo is made of such steps only, so that the server and the other silos
need not be trusted.
"""

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import chain
from typing import cast, get_args

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.noisy_steps import GradSampleMode, NoisePlan, NoisySteps, word
from flower_ext.client.personal import PERSONAL
from flower_ext.client.task import Batch, batches, example_losses, num_examples
from flower_ext.client.tensors import Tensors, read_tensors
from flower_ext.client.trainer import Session, Steps, Trainer
from flower_ext.core.errors import refuse, whole
from flower_ext.core.protocol import Metrics
from flower_ext.core.several import stack
from flower_ext.core.typing import Floats
from flower_ext.privacy.selection import noisy_least
from flower_ext.privacy.silo_account import SiloAccount, ledger_path
from flower_ext.privacy.silo_budget import (
    SiloBudgetExhausted,
    SiloPrivacy,
    StepLedger,
    noise_for_steps,
)

EXAMPLE_EPSILON = "example-epsilon"
EXAMPLE_DELTA = "example-delta"
USER_EPSILON = "user-epsilon"
USER_DELTA = "user-delta"
SPENT = (EXAMPLE_EPSILON, EXAMPLE_DELTA, USER_EPSILON, USER_DELTA)

TRAIN_LOSS = "train-loss"
#: With a client's personal state: that no other trainer has left it there.
PRIVATE = "trained-privately"

# As good as no clipping, and 0 times it is 0.
_NO_CLIPPING = 1e30
# Hooks of which each alone sends nothing: the one sees data, which are clipped, the
# others add to a step after its noise. Together they could hand over what was seen.
_SEES_BATCHES = {"objective"}
_AFTER_NOISE = {"regularizer", "after_backward"}
_HARMLESS = _SEES_BATCHES | _AFTER_NOISE
# Hooks that know only what the server says.
_BEFORE_DATA = {"make_model"}


def keep_per_user(users: Tensor, most: int) -> Tensor:
    """Return the indices of the first ``most`` examples of every user, ascending.

    Parameters
    ----------
    users : Tensor
        Whose example it is, integers of shape ``(n,)``.
    most : int
        G, at least 1.

    Examples
    --------
    >>> keep_per_user(torch.tensor([7, 3, 7, 7, 3]), most=2)
    tensor([0, 1, 2, 4])
    """
    whole("most", most, 1)
    if users.ndim != 1 or users.is_floating_point() or users.is_complex():
        shown = f"{users.dtype} of shape {tuple(users.shape)}"
        refuse("users", shown, "integers of shape (n,)")
    order = torch.argsort(users, stable=True)
    ordered = users[order]
    places = torch.arange(len(users), device=users.device)
    new = torch.ones_like(places, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    first = torch.cummax(torch.where(new, places, 0), 0).values if len(users) else new
    return torch.sort(order[places - first < most]).values if len(users) else order


class DPSGD(Trainer):
    r"""Trains every model of a client by DP-SGD, private for each example of the silo.

    It takes the place of plain steps, whatever strategy asks for them, Flower's own
    too, and whichever client half goes along. ::

        privacy = SiloPrivacy(epsilon=2.0, delta=1e-5, num_rounds=50, clipping_norm=1.0)
        app = client_app(task, trainer=DPSGD(privacy))

    A half's ``objective`` is clipped for every example, its ``regularizer`` added after
    clipping and noise. Each further model that a half trains is charged as the first:
    it says how many there are, ``num_trainings``, so that a round beyond the budget is
    refused before any is trained. A half that trains when it is asked to evaluate, to
    fine-tune the model first, is charged for that as for a round: ``num_rounds`` counts
    both.

    A half that is given the client's data could send what they say. It is refused when
    the ClientApp is made, unless its class says ``post_processing = True``: all that it
    sends and keeps is made of trained models and of what the server sent. FedFish's
    Fisher, MaxFL's and bounded group loss' sums of losses are not.

    Parameters
    ----------
    privacy : SiloPrivacy or callable
        ``Context -> SiloPrivacy`` where silos differ. Take what a silo promises from
        its own ``context.node_config``; run config and messages are the server's.
    mode : str (default: "hooks")
        ``hooks`` keeps every example's gradient (Opacus' ``GradSampleModule``, memory
        batch x parameters); ``ghost`` keeps what each layer has seen (memory of the
        activations), and forms gradients from it when they are needed, a few examples
        of one layer at a time. Both give the same model, up to rounding.
    release_train_loss : bool (default: False)
        Send ``train-loss``, estimated over the batches. It is not private.
    release_evaluation : bool (default: False)
        Answer evaluations with loss and metrics of the silo's test data, not only with
        their number. They are exact, and private for nobody in the test data. Training
        data stay protected: a choice among models is private and charged in evaluations
        then, too, and a half whose evaluation reads training data otherwise, as
        KNNPer's and Ensemble's do, is refused in it.

    Raises
    ------
    SiloBudgetExhausted
        If the round would exceed the budget. Like the errors below it becomes the
        silo's error reply; nothing is trained or spent then.
    ValueError
        If a layer or the loss cannot be trained so (a BatchNorm, a trained parameter
        of half precision, DoRA; it is named), if ``max-gradient-norm`` is set, if the
        user column is missing, if a half trains more models than it says, and if a
        client has personal state that was not trained privately.
    ImportError
        Without Opacus.

    Notes
    -----
    **Guarantee.** Everything a silo sends in all its rounds together, but for what is
    listed below, is (epsilon, delta)-differentially private, by privacy loss
    distributions of the Poisson-sampled Gaussian mechanism, against a server that picks
    each model by what it saw before.

    *Unit*: one example; with ``max_examples_per_user`` one user with all examples in
    this silo (example-level sampling, ELS, of Charles et al.: accounted as a mixture of
    Gaussians). A person in several silos spends the sum of what they spend.

    *Neighbours*: the unit's contributions become zero, Flower's
    ``add-or-remove-one`` with a known number of examples. That number n is public: it
    is sent as ``num-examples`` (after the cap on users), it is in the probability
    :math:`q = \min(1, \text{batch-size} / n)`, and the weights are its.

    *Clipping*: norms and sums are those of the gradients as they were computed, in
    float64, and noise is added before anything is rounded to the parameters' type. So
    an example moves the sum by at most ``clipping_norm``, whatever cancels, overflows
    or vanishes under the weights that the server sends.

    *Sampling*: each step's batch is drawn anew. An empty one is a step too, and
    releases noise. Steps are ``local-steps``, or ``local-epochs`` times
    :math:`\lceil n / \text{batch-size} \rceil`.

    *Not protected*: n; who takes part when, and time; that a silo failed, and in which
    class of error; the test data of evaluations and ``train-loss``, where they are
    released; anything that ``Task`` itself does with the data, such as standardising
    it. Momentum, weight decay and other optimizers (``Task.optimizer``) are
    post-processing and free.

    *Assumed*: a half with ``post_processing`` keeps its word, and ``regularizer`` knows
    no data. The loss of an example, what the half's ``objective`` makes of it, and its
    gradient as it is computed, depend on that example, not on the others of its batch
    or their number. Opacus' validators, the comparison of an example's gradient with
    autograd's, of its loss in two batches, and of the regularizer after some examples,
    at the start of every round, find models, losses and terms that break this, though
    not all that one can think of. Libraries choose
    algorithms by the size of a batch, which changes rounding: what weights that magnify
    it can do is not counted.

    *Randomness*: batches and noise come from ``os.urandom``, or from NumPy's SFC64
    generator, which is not cryptographic, with a ``seed``: then from (seed, client,
    round, steps taken) and a digest of all that was received, of data, model, settings,
    run config and personal state. So a run can be repeated, and gives the same replies
    again, which tells nothing new; on anything else batches and noise are others. Take
    a new seed with every change of the silo's code, ``mode``, device or libraries.
    Opacus' own noise is not used: torch's CPU generator has 32 bits of seed. Dropout
    does draw from torch's, seeded secretly. Floating-point noise has gaps that a strong
    adversary may read (Mironov 2012).

    *Choices*: a half that asks for the best of several models, ``local.best_of``, is
    told the one of the least noisy sum of losses (report noisy min with Gumbel noise,
    which is the exponential mechanism). Each loss is clipped to ``[0, loss_cap]``, the
    scale of the noise is ``loss_cap / selection_epsilon``, times the examples of a
    user: a unit's contributions only ever add to the losses, by at most that cap. It is
    charged before it looks, as a Gaussian that reveals no less, if the training after
    it can be paid for as well; see :mod:`flower_ext.privacy.selection`.

    *Several models*: their steps compose, whichever of the models leaves the silo, with
    batches and noise of their own.

    *Budget*: with ``SiloPrivacy(ledger=...)`` the guarantee is for all runs that name
    the ledger together. Every round is charged to it, under a lock and flushed to the
    disk, before it trains: a crash costs the steps that it kept from being taken.
    Without a ledger the guarantee is for one run. The steps are kept in
    ``context.state``, which Flower keeps as long, and every run starts from 0: whoever
    may start runs decides what is spent. A run that goes on from a checkpoint, and a
    silo that was restarted or joins later than in round 1, are refused then, unless
    this process remembers the run.

    A gradient that is not finite counts as zero. The reply's metrics hold what is spent
    so far, ``example-epsilon`` and ``example-delta``, or ``user-epsilon`` and
    ``user-delta``; an average over silos means nothing, see :func:`worst_silo`.

    References
    ----------
    Abadi et al. 2016, "Deep learning with differential privacy", arXiv 1607.00133
    (DP-SGD); Bu et al. 2022, "Differentially private optimization on large model at
    small cost", arXiv 2210.00038 (gradients from what layers have seen, without a
    second backward pass; its norms of Gram matrices are not used); Charles et al. 2024,
    "Fine-tuning large language models with user-level differential privacy", arXiv
    2407.07737 (ELS); Yousefpour et al. 2021, arXiv 2109.12298 (Opacus).
    """

    discreet = True

    def __init__(
        self,
        privacy: SiloPrivacy | Callable[[Context], SiloPrivacy],
        *,
        mode: GradSampleMode = "hooks",
        release_train_loss: bool = False,
        release_evaluation: bool = False,
    ) -> None:
        if not isinstance(privacy, SiloPrivacy) and not callable(privacy):
            refuse("privacy", privacy, "a SiloPrivacy, or a function that returns one")
        if mode not in get_args(GradSampleMode):
            refuse("mode", mode, f"one of {get_args(GradSampleMode)}")
        self._of_silo = privacy
        self.mode = mode
        self.release_train_loss = release_train_loss
        self.release_evaluation = release_evaluation

    def privacy(self, context: Context) -> SiloPrivacy:
        """Return what the silo of a context promises."""
        found = self._of_silo
        if not isinstance(found, SiloPrivacy):
            found = found(context)
        if not isinstance(found, SiloPrivacy):
            refuse("privacy(context)", found, "a SiloPrivacy")
        return found

    def admit(self, half: type[ClientHalf]) -> None:
        """Refuse a half that may send what the client's data say.

        The class that overrides a hook vouches for it, or one derived from it does;
        what a parent says is not said of its children.
        """
        if half.batches is not ClientHalf.batches:
            raise ValueError(
                f"{half.__name__}.batches cannot be served by DPSGD: batches must be "
                "Poisson samples of all examples, which it draws itself"
            )
        line = half.__mro__[: half.__mro__.index(ClientHalf)]
        vouching = [kind for kind in line if vars(kind).get("post_processing")]
        every = set().union(*map(vars, line))
        together = every & _SEES_BATCHES and every & _AFTER_NOISE
        seeing = _HOOKS | _HARMLESS if together else _HOOKS
        for kind in line:
            if any(issubclass(x, kind) for x in vouching):
                continue
            own = vars(kind)
            hooks = sorted(own.keys() & seeing) or _replaced(kind, vouching)
            if hooks or "post_processing" in own:
                raise ValueError(
                    f"{half.__name__} cannot be served by DPSGD: {kind.__name__} "
                    f"overrides {hooks}, which see the client's data, and what they "
                    "say would leave without noise. If all that it sends and keeps is "
                    "made of trained models and of what the server sent, its class "
                    "says so: post_processing = True"
                )

    def session(self, local: Local, half: ClientHalf) -> "PrivateSession":
        """Return what trains for one message, and charges it to the silo's account."""
        self.admit(type(half))
        if hooks := sorted(vars(half).keys() & (_HOOKS | _HARMLESS)):
            cause = "an object's own would be called in the place of its class's"
            refuse(f"{type(half).__name__}'s hooks", hooks, "methods of a class", cause)
        return PrivateSession(self, local, half.num_trainings, half.planned_steps)


_HOOKS = {
    name
    for name, hook in vars(ClientHalf).items()
    if callable(hook) and name not in _HARMLESS | _BEFORE_DATA
}


def _replaced(kind: type, vouching: Sequence[type]) -> list[str]:
    """Return the methods of classes that vouch for them which a class replaces."""
    known = set().union(*(vars(x) for x in vouching if issubclass(kind, x)))
    return sorted(
        name
        for name, x in vars(kind).items()
        if name in known - _HARMLESS - _BEFORE_DATA
        and not name.startswith("__")
        and (callable(x) or isinstance(x, property))
    )


class PrivateSession(Session):
    """All trainings of one client for one message, charged before the first.

    Parameters
    ----------
    trainer : DPSGD
        What is promised.
    local : Local
        The client; its training data are cut to ``max_examples_per_user``.
    num_trainings : int
        Models that are trained, which are charged together.
    planned_steps : callable, optional
        See :meth:`~flower_ext.client.half.ClientHalf.planned_steps`.
    """

    def __init__(
        self,
        trainer: DPSGD,
        local: Local,
        num_trainings: int,
        planned_steps: Callable[[Local], int | None] = lambda local: None,
    ) -> None:
        self._trainer = trainer
        self._privacy = trainer.privacy(local.context)
        self._trainings = whole("num_trainings", num_trainings, 1)
        local.train = self._capped(local.train)
        self._planned = planned_steps(local)
        # What the server may choose and the half may use, before the half has seen it.
        self._told = b"" if self._privacy.seed is None else _digest_of_told(local)
        # What was kept before: if that is private, what this message keeps is, too.
        self._personal = local.personal
        self._kept = sorted(set(local.personal) - {PRIVATE})
        marked = local.personal.numbers(PRIVATE)
        self._state = local.context.state
        self._before_all = mark_of(self._state)
        self._sound = not self._kept or marked == self._before_all
        # The message's own, which no half can replace by that of another model.
        path = self._privacy.ledger
        self._account = SiloAccount(
            None if path is None else ledger_path(path),
            local.context.state,
            client=local.client,
            server_round=local.server_round,
            run=local.run,
        )
        self._phase = local.phase
        self._choices = 0
        self._plan: NoisePlan | None = None
        self._spent = 0.0
        # Steps of the silo before this message, steps of it, and those still to come.
        self._before, self._taken, self._left = 0, 0, 0

    def steps(self, local: Local, half: ClientHalf) -> Steps:
        """Refuse what cannot be private; charge all trainings before the first."""
        if local.settings.max_gradient_norm != math.inf:
            refuse(
                "max-gradient-norm",
                local.settings.max_gradient_norm,
                "left out",
                "clipping_norm bounds the gradient of every example",
            )
        local.train = self._capped(local.train)
        count = local.num_steps
        found: Steps
        if self._plan is not None:
            found = self._further(local, half, self._plan)
        else:
            with self._account.locked():
                found = self._charged(local, half, self._account)
        self._taken += count
        self._left -= count
        return found

    def _charged(self, local: Local, half: ClientHalf, account: SiloAccount) -> Steps:
        """Plan the message, see that it can be trained, and charge its steps."""
        privacy, size, count = self._privacy, num_examples(local.train), local.num_steps
        kept, ledger = self._known(account)
        if not count:
            self._spent = ledger.epsilon(privacy.delta)
            return _NoSteps(local, half)
        account.require(kept)
        if privacy.delta >= 1 / size:
            warnings.warn(
                f"delta={privacy.delta} should be < 1 / examples={1 / size:.3g}: "
                "publishing one whole example would satisfy it",
                stacklevel=3,
            )
        rate = min(1.0, local.settings.batch_size / size)
        # All models at once: a budget that ends between two of them would leave one
        # that is trained, spent and never sent.
        planned = self._steps_of_message(local)
        noise_multiplier = self._calibrated(kept, planned, rate)
        charged = ledger.add(rate, noise_multiplier, planned)
        spent = self._affordable(local, ledger, charged)
        plan = NoisePlan(
            count, rate, min(privacy.clipping_norm, _NO_CLIPPING), noise_multiplier
        )
        self._before = ledger.total
        found = self._noisy(local, half, plan)
        # Charged before the first step: a training that breaks off has cost its steps.
        account.write(self._record(charged, noise_multiplier))
        self._plan, self._left, self._spent = plan, planned, spent
        return found

    def _steps_of_message(self, local: Local) -> int:
        """Return the steps of all trainings that this message is charged for."""
        # At least its own: what is taken is charged, whatever a half says.
        count = local.num_steps
        return max(count, self._planned or self._trainings * count)

    def _known(self, account: SiloAccount) -> tuple[ConfigRecord | None, StepLedger]:
        """Return the account, and refuse to send what was not kept privately."""
        kept = account.read()
        ledger = StepLedger.read(kept, self._privacy)
        # Also where nothing is trained: a half may send what it has kept.
        if not self._sound:
            refuse(
                "personal state",
                self._kept,
                "kept under DPSGD",
                "what a training that was not private has left would leave the silo "
                "with the next models",
            )
        return kept, ledger

    def _affordable(
        self, local: Local, ledger: StepLedger, charged: StepLedger
    ) -> float:
        """Return epsilon after a charge, or refuse it."""
        privacy = self._privacy
        spent = charged.epsilon(privacy.delta)
        # Not "spent > limit": NaN must count as exceeding.
        if privacy.limit is not None and not spent <= privacy.limit:
            raise SiloBudgetExhausted(
                f"round {local.server_round} would exceed max_epsilon={privacy.limit} "
                f"at delta={privacy.delta}: {ledger.epsilon(privacy.delta):.6g} is "
                f"spent, it would be {spent:.6g}; nothing was trained"
            )
        return spent

    def _record(self, charged: StepLedger, noise_multiplier: float) -> ConfigRecord:
        record = charged.record()
        if target := self._target:
            record["noise-multiplier"] = noise_multiplier
            record["target"] = target
        return record

    def choose(self, local: Local, models: Sequence[Tensors]) -> int:
        """Choose privately, and charge it; see ``SiloPrivacy``.

        An evaluation that is withheld tells nothing of its choice, and chooses without
        noise.
        """
        privacy = self._privacy
        if self._phase == "evaluate" and not self._trainer.release_evaluation:
            return super().choose(local, models)
        if privacy.selection_epsilon is None or privacy.loss_cap is None:
            refuse(
                "selection_epsilon",
                None,
                "given, with loss_cap",
                "a choice among models reads the silo's data: SiloPrivacy(..., "
                "selection_epsilon=0.1, loss_cap=4.0)",
            )
        if not num_examples(local.train):
            return 0
        with self._account.locked():
            self._charge_choice(local, self._account)
        cap = privacy.loss_cap
        scores = [_capped_sum(local, arrays, cap) for arrays in models]
        scale = privacy.group_size * cap / privacy.selection_epsilon
        return noisy_least(scores, scale, self._uniforms(local, models))

    def _charge_choice(self, local: Local, account: SiloAccount) -> None:
        """Charge a choice, if the training after it can be paid for, too."""
        privacy, size = self._privacy, num_examples(local.train)
        kept, ledger = self._known(account)
        account.require(kept)
        self._choices += 1
        planned = self._steps_of_message(local)
        rate = min(1.0, local.settings.batch_size / size)
        assert privacy.choice_noise is not None
        charged = ledger.add(1.0, privacy.choice_noise, 1)
        # That of a round also where an evaluation is the first to ask for it.
        noise_multiplier = self._calibrated(kept, planned, rate)
        coming = planned if self._phase == "train" else 0
        self._affordable(local, ledger, charged.add(rate, noise_multiplier, coming))
        self._before = ledger.total
        account.write(self._record(charged, noise_multiplier))

    def _uniforms(self, local: Local, models: Sequence[Tensors]) -> Floats:
        """Draw secret numbers in (0, 1), one a model."""
        seed, count = self._privacy.seed, len(models)
        if seed is None:
            words = np.frombuffer(os.urandom(8 * count), np.uint64)
        else:
            digest = _digest(
                [self._told, "choice", self._privacy, local.settings],
                chain(stack(models).items(), sorted(local.train.items())),
            )
            sources = [seed, local.client, local.server_round, self._before]
            sequence = np.random.SeedSequence([*sources, self._choices, word(digest)])
            words = sequence.generate_state(count, np.uint64).view(np.uint64)
        # 52 bits and a half: with one bit more, the largest would be rounded to 1.
        return (np.asarray(words >> np.uint64(12), np.float64) + 0.5) * 2.0**-52

    def _further(self, local: Local, half: ClientHalf, plan: NoisePlan) -> Steps:
        """Return the steps of a further model, of those that are charged."""
        count, rate = local.num_steps, plan.rate
        own = min(1.0, local.settings.batch_size / max(num_examples(local.train), 1))
        if count > self._left or (count and own != rate):
            raise ValueError(
                f"a further model of {count} steps at a sampling rate of {own:.3g} is "
                f"not charged: {self._left} at {rate:.3g} are left of the "
                f"num_trainings={self._trainings} that the client half says it trains; "
                "all must have the data and the settings of the first"
            )
        if not count:
            return _NoSteps(local, half)
        return self._noisy(local, half, replace(plan, count=count))

    def _noisy(self, local: Local, half: ClientHalf, plan: NoisePlan) -> Steps:
        steps = NoisySteps(local, half, plan, self._trainer.mode)
        return steps.seeded(self._secret_keys(local, plan))

    @property
    def _target(self) -> list[float] | None:
        """What noise is sought for, if it is."""
        privacy = self._privacy
        if privacy.epsilon is None or privacy.num_rounds is None:
            return None
        target = [privacy.epsilon, privacy.delta, float(privacy.num_rounds)]
        if self._choices:
            target += [float(self._choices), cast(float, privacy.choice_noise)]
        return target

    def _calibrated(
        self, kept: ConfigRecord | None, planned: int, rate: float
    ) -> float:
        """Return the noise multiplier: given, kept, or sought for the target."""
        privacy = self._privacy
        if privacy.noise_multiplier is not None:
            return float(privacy.noise_multiplier)
        if kept is not None and kept.get("target") == self._target:
            return cast(float, kept["noise-multiplier"])
        assert privacy.epsilon is not None and privacy.num_rounds is not None
        choices: tuple[int, float] | tuple[()] = ()
        if self._choices:
            noise = cast(float, privacy.choice_noise)
            choices = privacy.num_rounds * self._choices, noise
        return noise_for_steps(
            privacy.epsilon,
            privacy.delta,
            privacy.num_rounds * max(planned, 1),
            rate,
            privacy.group_size,
            *choices,
        )

    def _secret_keys(self, local: Local, plan: NoisePlan) -> Sequence[int] | None:
        """Return keys of batches, noise and dropout, or None without a seed.

        They depend on whatever decides what the training computes. So the same noise
        comes again in the same reply only, and never on another model or on other data,
        where the difference of two replies would be free of it.
        """
        seed = self._privacy.seed
        if seed is None:
            return None
        digest = _digest(
            [self._told, plan, local.settings, local.branch],
            chain(
                local.model.named_parameters(),
                local.model.named_buffers(),
                sorted(local.train.items()),
            ),
        )
        done = self._before + self._taken
        sources = [seed, local.client, local.server_round, done, word(digest)]
        children = np.random.SeedSequence(sources).spawn(3)
        return [word(child.generate_state(4).tobytes()) for child in children]

    def _capped(self, data: Batch) -> Batch:
        """Return the data with at most G examples of every user."""
        privacy = self._privacy
        if not privacy.max_examples_per_user:
            return data
        if privacy.user not in data:
            refuse("user", privacy.user, f"one of the data's columns {sorted(data)}")
        num_examples(data)  # the columns are as long as each other
        kept = keep_per_user(data[privacy.user], privacy.group_size)
        return {name: column[kept] for name, column in data.items()}

    def measures(self, *, tests: bool = False) -> None:
        """Refuse to show a half a loss, but for what is withheld or of test data."""
        if self._phase == "evaluate":
            if self._trainer.release_evaluation and not tests:
                refuse(
                    "release_evaluation",
                    True,
                    "False with this client half",
                    "its evaluation reads the silo's training data, and the metrics "
                    "would tell what they say, without noise",
                )
        else:
            raise ValueError(
                "loss_of, mean_loss, measure and the gradient of all examples read the "
                "silo's data without noise: under DPSGD a client half may not use them "
                "in training"
            )

    def report(self, metrics: Metrics) -> Metrics:
        """Add what is spent so far; withhold the loss, unless it was asked for."""
        users = self._privacy.max_examples_per_user is not None
        epsilon, delta = (
            (USER_EPSILON, USER_DELTA) if users else (EXAMPLE_EPSILON, EXAMPLE_DELTA)
        )
        kept = {
            name: value
            for name, value in metrics.items()
            if name != TRAIN_LOSS or self._trainer.release_train_loss
        }
        return {**kept, epsilon: self._spent, delta: self._privacy.delta}

    def report_evaluation(self, metrics: Metrics) -> Metrics:
        """Withhold all but the number of examples, unless it was asked for."""
        if self._trainer.release_evaluation:
            return metrics
        return {"num-examples": metrics["num-examples"]}

    def end(self) -> None:
        """Note with the personal state, if there is any, that it was kept here.

        Raises
        ------
        ValueError
            If an evaluation has changed it.
        """
        # What was not private before does not become so by a message that trains
        # nothing. An evaluation may look at losses, since it does not tell them.
        if self._phase == "evaluate" and mark_of(self._state) != self._before_all:
            raise ValueError(
                "under DPSGD an evaluation may not change personal state: what it has "
                "seen of the data would leave the silo with a later round"
            )
        if self._sound and set(self._personal) - {PRIVATE}:
            self._personal.save(**{PRIVATE: mark_of(self._state)})


def mark_of(state: RecordDict) -> dict[str, float]:
    """Return what tells personal state from any other: a digest, in words."""
    own = {k: x for k, x in state.items() if k.startswith(PERSONAL)}
    own.pop(PERSONAL + PRIVATE, None)
    hashed = sha256()
    for key, record in sorted(own.items()):
        if isinstance(record, ArrayRecord):
            for name, array in record.items():
                form = array.dtype, tuple(array.shape)
                hashed.update(repr((key, name, form)).encode())
                hashed.update(sha256(array.data).digest())
        else:
            hashed.update(repr((key, sorted(record.items()))).encode())
    octets = hashed.digest()
    return {f"word-{i}": word(octets[6 * i : 6 * i + 6]) for i in range(5)}


@torch.no_grad()
def _capped_sum(local: Local, arrays: Tensors, cap: float) -> float:
    """Return the sum of a model's losses on the examples, each from 0 to the cap."""
    model = copy.deepcopy(local.model)
    model.load_state_dict(arrays)
    model.eval()
    total = 0.0
    for batch in batches(local.train, 256):
        losses = example_losses(local.task, model, batch).double()
        # One that is not a number must not count for more than one that is bad.
        total += float(losses.nan_to_num(nan=cap).clamp(0.0, cap).sum())
    return total


class _NoSteps(Steps):
    """The steps of a client without examples."""

    def batches(self) -> Iterator[Batch]:
        return iter(())


def _digest_of_told(local: Local) -> bytes:
    """Return a digest of what was received and of what the client has kept."""
    context = local.context
    numbers = {key: {**x} for key, x in sorted(context.state.metric_records.items())}
    groups = {
        "": local.loaded,
        **local.received,
        **{key: read_tensors(x) for key, x in context.state.array_records.items()},
    }
    return _digest(
        [sorted(context.run_config.items()), sorted(local.config.items()), numbers],
        (
            (f"{key}/{name}", tensor)
            for key, group in groups.items()
            for name, tensor in group.items()
        ),
    )


def _digest(values: object, tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    hashed = sha256(repr(values).encode())
    for name, tensor in tensors:
        octets = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        hashed.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        hashed.update(octets.numpy().data)
    return hashed.digest()


def worst_silo(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """Average metrics as Flower does, but report the largest epsilon and delta spent.

    A ``train_metrics_aggr_fn`` for federations with :class:`DPSGD`. It speaks
    of the silos that replied in this round; one that did not has spent what it
    reported last.

    Examples
    --------
    >>> spent = [{"num-examples": 90, "example-epsilon": 1.0},
    ...          {"num-examples": 10, "example-epsilon": 4.0}]
    >>> silos = [RecordDict({"metrics": MetricRecord(m)}) for m in spent]
    >>> worst_silo(silos, "num-examples")["example-epsilon"]
    4.0
    """
    average = FedAvg().train_metrics_aggr_fn
    found = MetricRecord(dict(average(contents, weighted_by_key)))
    for content in contents:
        for record in content.metric_records.values():
            for name in set(SPENT) & set(record):
                found[name] = max(float(record[name]), float(found[name]))  # type: ignore[arg-type]
    return found
