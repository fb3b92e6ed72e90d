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

import math
from collections.abc import Callable, Sequence
from typing import get_args

from flwr.app import Context, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from flower_ext.client.bounded_steps import BoundedSteps
from flower_ext.client.half import ClientHalf, Local, LocalSettings
from flower_ext.client.noisy_steps import (
    GradSampleMode,
    NoisePlan,
    NoisySteps,
    PrivateSteps,
)
from flower_ext.client.private_session import SPENT, PrivateSession
from flower_ext.client.task import Batch, num_examples
from flower_ext.client.trainer import Trainer
from flower_ext.client.users import keep_per_user, user_column
from flower_ext.core.errors import refuse
from flower_ext.privacy.bounded import BoundedGaussian
from flower_ext.privacy.instances import InstanceReport
from flower_ext.privacy.silo_budget import SiloPrivacy

# Hooks of which each alone sends nothing: the one sees data, which are clipped, the
# others add to a step after its noise. Together they could hand over what was seen.
_SEES_BATCHES = {"objective"}
_AFTER_NOISE = {"regularizer", "after_backward"}
_HARMLESS = _SEES_BATCHES | _AFTER_NOISE
# Hooks that know only what the server says.
_BEFORE_DATA = {"make_model"}


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
        KNNPer's and Ensemble's do, is refused in it. ``SiloPrivacy(evaluation=...)``
        answers with noise instead.
    noise : BoundedGaussian, optional
        Of kind ``rectified``, with bounds in clipping norms: every coordinate of a
        noisy sum is cut to them. It is made of the noisy sum alone, and costs and saves
        no epsilon; what is gained is in the accounts of single examples.
    instances : InstanceReport, optional
        Keeps in a file of the silo's an account of what was released of single
        examples, see :class:`~flower_ext.privacy.instances.InstanceAccount`. Nothing of
        it is in a reply, or changes one.

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
    class of error; the test data of exact evaluations and ``train-loss``, where they
    are released; anything that ``Task`` itself does with the data, such as
    standardising it. Momentum, weight decay and other optimizers (``Task.optimizer``)
    are post-processing and free.

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

    *Evaluations*, with ``SiloPrivacy(evaluation=...)``: loss and metrics of each test
    example are clipped to their bounds and centred, so that an example moves the sum by
    a norm of at most 1, and a user by the examples of it that count. The sum has
    Gaussian noise and is divided by the number of test examples, which is public. Each
    is charged before it is released, as a step without sampling, with training and test
    data as one; the noise of the training is sought for what is left. Assumed, beside
    what is said above: that a metric of an example depends on no other.

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
        noise: BoundedGaussian | None = None,
        instances: InstanceReport | None = None,
    ) -> None:
        if not isinstance(privacy, SiloPrivacy) and not callable(privacy):
            refuse("privacy", privacy, "a SiloPrivacy, or a function that returns one")
        if mode not in get_args(GradSampleMode):
            refuse("mode", mode, f"one of {get_args(GradSampleMode)}")
        self._of_silo = privacy
        self.mode = mode
        self.release_train_loss = release_train_loss
        self.release_evaluation = release_evaluation
        self.noise = _require_rectified(noise)
        if instances is not None and not isinstance(instances, InstanceReport):
            refuse("instances", instances, "an InstanceReport, or None")
        self.instances = instances
        own = type(self).steps is not DPSGD.steps
        for name in ("noise", "instances") if own else ():
            if getattr(self, name) is not None:
                cause = "it takes other steps than DPSGD, which do not know of it"
                refuse(name, getattr(self, name), f"None for {self._name}", cause)

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
                f"{half.__name__}.batches cannot be served by {self._name}: batches "
                "must be Poisson samples of all examples, which it draws itself"
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
                    f"{half.__name__} cannot be served by {self._name}: "
                    f"{kind.__name__} overrides {hooks}, which see the client's data, "
                    "and what they say would leave without noise. If all that it sends "
                    "and keeps is made of trained models and of what the server sent, "
                    "its class says so: post_processing = True"
                )

    def session(self, local: Local, half: ClientHalf) -> PrivateSession:
        """Return what trains for one message, and charges it to the silo's account."""
        self.admit(type(half))
        if hooks := sorted(vars(half).keys() & (_HOOKS | _HARMLESS)):
            cause = "an object's own would be called in the place of its class's"
            refuse(f"{type(half).__name__}'s hooks", hooks, "methods of a class", cause)
        return PrivateSession(self, local, half.num_trainings, self.planned_steps(half))

    # What the session asks of its trainer; one that clips or draws something else than
    # examples answers differently.

    def sensitivity(self, privacy: SiloPrivacy) -> int:
        """Return how many clipping norms a unit moves the sum of a step by, at most."""
        return privacy.group_size

    def always(self, privacy: SiloPrivacy, expected: float) -> float:
        """Return how many clipping norms a unit moves a sum by that it is not in.

        What is kept from step to step may do so; for batches of an expected size, see
        :meth:`~flower_ext.privacy.silo_budget.StepLedger.add`.
        """
        return 0.0

    def admitted(self, data: Batch, privacy: SiloPrivacy) -> Batch:
        """Return the data that are trained on: at most G examples of every user."""
        if not privacy.unit:
            return data
        kept = keep_per_user(user_column(data, privacy.user), privacy.group_size)
        return {name: column[kept] for name, column in data.items()}

    def num_drawn(self, data: Batch, privacy: SiloPrivacy) -> int:
        """Return the number of those that a step draws from: the examples."""
        return num_examples(data)

    def rate(self, local: Local, privacy: SiloPrivacy) -> float:
        """Return the probability with which a step draws each of them."""
        size = max(self.num_drawn(local.train, privacy), 1)
        return min(1.0, local.settings.batch_size / size)

    def planned_steps(self, half: ClientHalf) -> Callable[[Local], int | None]:
        """Return what a half says of the steps of all trainings of a message."""
        return half.planned_steps

    def num_releases(self, local: Local) -> int:
        """Return the noisy sums of one training: its steps."""
        return local.num_steps

    def refuse_settings(self, settings: LocalSettings) -> None:
        """Refuse settings that make no sense beside clipping."""
        if settings.max_gradient_norm != math.inf:
            refuse(
                "max-gradient-norm",
                settings.max_gradient_norm,
                "left out",
                "clipping_norm bounds the gradient of every example",
            )

    def steps(
        self, local: Local, half: ClientHalf, plan: NoisePlan, privacy: SiloPrivacy
    ) -> PrivateSteps:
        """Return the steps of one training."""
        if self.noise is None and self.instances is None:
            return NoisySteps(local, half, plan, self.mode)
        if self.instances is not None and privacy.unit:
            cause = "the account is of examples, not of users"
            refuse(
                "instances", self.instances, "None with max_examples_per_user", cause
            )
        return BoundedSteps(local, half, plan, self.mode, self.noise, self.instances)

    def manner(self, data: Batch, privacy: SiloPrivacy) -> Sequence[object]:
        """Return what else than model, data, settings and plan decides a step's sum.

        With a ``seed`` the noise of one manner must not come again in another.
        """
        return () if self.noise is None else (self.noise,)

    @property
    def _name(self) -> str:
        return type(self).__name__


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


def _require_rectified(noise: BoundedGaussian | None) -> BoundedGaussian | None:
    if noise is None:
        return None
    if not isinstance(noise, BoundedGaussian):
        refuse("noise", noise, "a BoundedGaussian, or None")
    if not noise.is_post_processing:
        cause = (
            "how likely a truncated Gaussian is inside depends on the data, so that "
            "epsilon of the Gaussian does not hold for it"
        )
        refuse("noise", noise, 'of kind="rectified"', cause)
    if not noise.lower < 0 < noise.upper:
        refuse("noise", noise, "around 0", "a sum without examples is noise around 0")
    return noise


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
