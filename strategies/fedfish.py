r"""FedFish: aggregate the clients' functions, not their parameters.

The model closest to all client models in function space, weighted by :math:`p_k`, is
:math:`\arg\min_\theta \sum_k p_k\, \mathbb{E}\,
\mathrm{KL}(f(x;\theta_k)\,\|\,f(x;\theta))`. To second order, with a diagonal Fisher
:math:`F_k` taken at the client's own solution, it is the elementwise average

.. math::
   \Delta_j = \frac{\sum_k p_k F_{k,j} \Delta_{k,j}}{\sum_k p_k F_{k,j}}

(Dhawan, Mitchell, Charles, Garrett and Dziugaite 2024, "Leveraging Function Space
Aggregation for Federated Learning at Scale", TMLR, arXiv:2311.10291). Not to be
confused with FedFisher (Jhunjhunwala et al. 2024), which is one-shot.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Unpack, get_args

import numpy as np
from torch import nn
from torch.optim import Optimizer

from flower_ext.client.fisher import SquaredGradients
from flower_ext.client.fisher_half import (
    ESTIMATOR_KEY,
    FISHER_KEY,
    Estimator,
    FisherHalf,
    read_fisher,
)
from flower_ext.client.half import Local
from flower_ext.client.task import num_examples
from flower_ext.client.tensors import Tensors
from flower_ext.core.arrays import (
    Arrays,
    Term,
    is_averaged,
    multiply,
    scale,
    zeros_like,
)
from flower_ext.core.contribution import DELTA, Contribution, Total
from flower_ext.core.errors import at_least, one_of, yes_or_no
from flower_ext.core.protocol import Config, Metrics, Reply, Round, weighted_mean
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.drop_in import DropIn
from flower_ext.server.options import AdditiveOptions

FISHER_DELTA = "fisher-delta"
BARRIER_KEY = "fedfish-barrier"
BARRIER = "barrier"
BARRIER_EXAMPLES = "barrier-examples"

Normalization = Literal["client", "none"]


def function_space_mean(
    fisher_delta: Arrays,
    fisher: Arrays,
    delta: Arrays,
    weight: float,
    damping: float,
) -> Arrays:
    r"""Return the aggregated direction from the sums over clients.

    .. math::
       \frac{\sum p F \Delta + \lambda \bar F \sum p \Delta}
            {\sum p F + \lambda \bar F \sum p}

    where :math:`\bar F` is the mean of :math:`\sum p F / \sum p` over all coordinates.
    A coordinate of which no client knows anything (0/0), and arrays without a Fisher
    (buffers, frozen parameters), are averaged plainly.

    Parameters
    ----------
    fisher_delta, fisher, delta : dict[str, ndarray]
        :math:`\sum p F \Delta`, :math:`\sum p F`, :math:`\sum p \Delta`; the first two
        may lack arrays of the third.
    weight : float
        :math:`\sum p`.
    damping : float
        :math:`\lambda \ge 0`; 0 is the undamped minimiser, infinity plain averaging.

    Examples
    --------
    Two clients that know one coordinate each, and share the third:

    >>> function_space_mean(
    ...     {"w": np.array([2.0, 0.0, 3.0])}, {"w": np.array([1.0, 0.0, 2.0])},
    ...     {"w": np.array([2.0, 8.0, 3.0])}, weight=2.0, damping=0.0)
    {'w': array([2. , 4. , 1.5])}
    """
    plain = {name: x / weight for name, x in delta.items()}
    if math.isinf(damping):
        return plain
    # The mean is that of sum(p F): it has the factor sum(p) of the denominator in it.
    extra = damping * _mean(fisher)
    direction = dict(plain)
    for name, information in fisher.items():
        known = information + extra
        direction[name] = np.divide(
            fisher_delta[name] + extra * plain[name],
            known,
            out=np.array(plain[name]),  # stays where nobody knows anything
            where=known > 0,
        )
    return direction


def normalized(fisher: Arrays, size: int) -> dict[str, Term]:
    r"""Return a client's Fisher divided by its own mean, and by the model's size.

    Clients then count by their examples alone, not by how large their gradients are.
    The size is common to all and cancels; with it no Fisher has an l2 norm above 1,
    whatever a client sends. One that is zero throughout stays so.

    Parameters
    ----------
    fisher : dict[str, ndarray]
        Squares, >= 0, of some or all of the model's arrays.
    size : int
        Number of coordinates of the model.

    Examples
    --------
    >>> found = normalized({"w": np.array([1.0, 3.0]), "b": np.array([5.0])}, size=3)
    >>> {name: x.numpy().round(3).tolist() for name, x in found.items()}
    {'w': [0.111, 0.333], 'b': [0.556]}
    """
    mean = _mean(fisher)
    if mean == 0:
        return dict(fisher)
    return {name: scale(x, 1 / mean / size) for name, x in fisher.items()}


def _mean(arrays: Arrays) -> float:
    size = sum(x.size for x in arrays.values())
    total = sum(float(np.sum(x, dtype=np.float64)) for x in arrays.values())
    return total / max(size, 1)


class FedFishClient(FisherHalf):
    r"""Collects the diagonal Fisher while the client trains.

    With the strategy's ``barrier=True`` it also keeps the loss of its trained model on
    its training data, :math:`L(\theta_k; D_k)`, as personal state, and at an
    evaluation in the same round reports how much more the aggregate loses there.
    """

    name = "fedfish"

    def records(self, local: Local) -> tuple[Mapping[str, Tensors], Metrics]:
        """Return the Fisher; keep the loss for the barrier."""
        if local.config.get(BARRIER_KEY, False):
            self.keep_loss(local)
        return {FISHER_KEY: self.fisher(local)}, {}

    def keep_loss(self, local: Local) -> None:
        """Keep the loss of the trained model until this round's evaluation."""
        loss = local.mean_loss(local.train)
        local.personal.save(barrier={"round": local.server_round, "loss": loss})

    def evaluate(self, local: Local) -> Metrics:
        """Return the client's term of the Client-Server Barrier, if it trained."""
        # A loss that was kept in an earlier round is that of another model.
        kept = local.personal.numbers("barrier")
        if kept.get("round") != local.server_round:
            return {}
        lost = local.mean_loss(local.train) - kept["loss"]
        return {BARRIER: lost, BARRIER_EXAMPLES: num_examples(local.train)}


def watch_fisher(
    model: nn.Module,
    batches_per_epoch: int | None = None,
    *,
    optimizer: Optimizer | None = None,
    batch_size: int | None = None,
) -> SquaredGradients:
    """Collect the Fisher in a training loop of one's own.

    Two lines turn a stock client into one of FedFish: one before the training, and
    ``"fisher": fisher.record()`` in the reply.

    Parameters
    ----------
    model : torch.nn.Module
        Before training, with the received weights: what the loop calls, or what is in
        it (of ``torch.compile``, ``DataParallel``, Opacus).
    batches_per_epoch : int, optional
        Collect the last epoch's: its number of optimizer steps, usually
        ``len(trainloader)``, less where gradients are accumulated. All steps count
        without it.
    optimizer, batch_size
        Whose steps count, and how many examples a step has, where that cannot be seen:
        see :meth:`flower_ext.client.fisher.SquaredGradients.watch`.

    Returns
    -------
    SquaredGradients
        Its :meth:`~flower_ext.client.fisher.SquaredGradients.record` goes into the
        reply, under the names of the reply's arrays.

    Notes
    -----
    Gradients are taken when a torch optimizer steps with them: right with gradient
    scaling, accumulation and closures, and after clipping, if the loop clips. Under
    Opacus they are those that its optimizer releases. The loss must be a mean over the
    batch.
    """
    fisher = SquaredGradients(model, batches_per_epoch)
    return fisher.watch(optimizer, batch_size)


class FedFish(AdditiveStrategy):
    r"""Federated averaging weighted by what each client knows of each parameter.

    Against FedAvg, a client sends the diagonal Fisher of its trained model beside the
    model (twice the upload), and every parameter is averaged with these as weights: a
    client that never saw a class does not dilute what others learned about it. The
    gain grows with the number of local epochs. Works with the client half
    :class:`FedFishClient`, or with :func:`watch_fisher` in a loop of one's own.

    Parameters
    ----------
    damping : float (default: 0.1)
        Adds this share of the mean Fisher to each, see :func:`function_space_mean`. 0
        trusts the estimates fully; infinity is FedAvg.
    estimator : str (default: "last-epoch")
        ``last-epoch``, squared minibatch gradients of the last local epoch, no extra
        pass; ``all-epochs``, of the whole local training; ``per-example``, the textbook
        empirical Fisher, one extra pass at the trained model; ``sampled``, the same
        with labels drawn from the model, the true Fisher (needs
        ``Task.sample_labels``). The first two weigh squares by batch size, see
        :class:`~flower_ext.client.fisher.SquaredGradients`. :func:`watch_fisher`
        chooses for itself.
    normalization : str (default: "none")
        ``client`` divides each client's Fisher by its own mean, so that clients count
        by their examples and not by how large their gradients are; see
        :func:`normalized`. ``none`` leaves them as they are: a client that its data
        still surprises weighs more.
    barrier : bool (default: False)
        Report the Client-Server Barrier, at the price of one more pass over each
        client's data in training and one in evaluation, see :class:`FedFishClient`.
    *flowers, **options
        Server optimizer, sampler, mechanism and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Notes
    -----
    Train metric ``fisher-mean`` is :math:`\bar F`, of normalised Fishers one over the
    number of coordinates; evaluation metric
    ``client-server-barrier`` is :math:`\sum_k p_k [L(\theta; D_k) - L(\theta_k; D_k)]`
    over clients that trained and evaluated in the same round, with :math:`D_k` and
    :math:`p_k` of their training data.

    The paper does not say (in the parts available to us) over which epochs the Fisher
    is collected, nor whether it is damped or normalised; these are options here. A
    Fisher reveals more of a client's data than its model alone.

    Under a mechanism, change, Fisher and their product are clipped together; Fishers
    are squares of gradients and often tiny beside the change: ``scales={"fisher": s,
    "fisher-delta": s}`` of the mechanism brings them to its size. Normalised ones have
    an l2 norm of at most 1, whatever the gradients.

    Examples
    --------
    >>> strategy = FedFish(fraction_train=0.1, damping=0.1)
    """

    client_half = FedFishClient
    other_arrays = (FISHER_KEY,)
    drop_in = DropIn(
        imports="from flower_ext.strategies.fedfish import watch_fisher",
        before="fisher = watch_fisher({model}, batches_per_epoch=len({loader}))",
        records={"fisher": "fisher.record()"},
    )
    consumed_metrics = (BARRIER, BARRIER_EXAMPLES)

    def __init__(
        self,
        *flowers: object,
        damping: float = 0.1,
        estimator: Estimator = "last-epoch",
        normalization: Normalization = "none",
        barrier: bool = False,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(*flowers, **options)
        cause = "infinity is FedAvg, 0 no damping"
        self.damping = at_least("damping", damping, 0, cause, allow_inf=True)
        choices = get_args(Normalization)
        self.normalization = one_of("normalization", normalization, choices)
        self.estimator = one_of("estimator", estimator, get_args(Estimator))
        self.barrier = yes_or_no("barrier", barrier)

    def tell(self, round: Round) -> Config:
        """Tell clients which Fisher to send."""
        return {ESTIMATOR_KEY: self.estimator, BARRIER_KEY: self.barrier}

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        r"""Return :math:`\Delta_k`, :math:`F_k` and their product, weighted by n_k."""
        sent, delta = round.sent, reply.delta(round)
        fisher = read_fisher(reply, round)
        terms: dict[str, Term] = dict(fisher)
        if self.normalization == "client":
            terms = normalized(fisher, sum(x.size for x in sent.values()))
        # Lazily, block by block while it is added: F Delta is never held as a whole.
        product = {name: multiply(f, delta[name]) for name, f in terms.items()}
        return Contribution({DELTA: delta, FISHER_KEY: terms, FISHER_DELTA: product})

    def zero(self, sent: Arrays) -> Contribution:
        """Return no change that nobody knows anything of."""
        zeros = zeros_like(sent)
        known = {name: x for name, x in zeros.items() if is_averaged(x)}
        return Contribution({DELTA: zeros, FISHER_KEY: known, FISHER_DELTA: known})

    def update(self, total: Total, round: Round) -> Arrays:
        """Return the mean in function space."""
        fisher = total.take(FISHER_KEY)
        if floor := total.noise.get(FISHER_KEY):  # below it, sums may be negative
            fisher = {name: np.maximum(f, floor, out=f) for name, f in fisher.items()}
        product, delta = total.take(FISHER_DELTA), total.take(DELTA)
        return function_space_mean(product, fisher, delta, total.weight, self.damping)

    def report(self, total: Total, round: Round) -> Metrics:
        """Return the mean Fisher of the cohort."""
        fisher = _mean(dict(total.arrays[FISHER_KEY]))
        return {"fisher-mean": fisher / total.weight} if total.weight else {}

    def report_evaluate(self, replies: Sequence[Reply], round: Round) -> Metrics:
        """Return the Client-Server Barrier over the clients that know theirs."""
        lost = weighted_mean(replies, BARRIER, BARRIER_EXAMPLES)
        return {} if lost is None else {"client-server-barrier": lost}

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        return {
            "Damping": self.damping,
            "Fisher": self.estimator,
            "Normalization": self.normalization,
            "Client-Server Barrier": self.barrier,
            **super().settings(),
        }
