r"""DP-FTRL: federated averaging with differential privacy from correlated noise.

Independent noise in every round adds up in the model: after t rounds its variance is
t times that of one. Noise that is correlated over the rounds, row t of
:math:`C^{-1} Z`, cancels in the sum: with :math:`A = BC` the matrix of prefix sums, the
model sees :math:`B Z`, which is small where :math:`C` is chosen well (Kairouz et al.
2021, "Practical and Private (Deep) Learning without Sampling or Shuffling", ICML,
arXiv 2103.00039; Denisov et al. 2022, arXiv 2202.08312; McMahan, Xu and Zhang 2024,
"A Hassle-free Algorithm for Private Learning in Practice", arXiv 2408.08868). Privacy
comes from limiting how often clients take part instead of from secret sampling.
"""

from typing import Unpack, cast

from flower_ext.core.errors import refuse
from flower_ext.core.sampling import MinSeparationSampler, Sampler
from flower_ext.privacy.factorizations.trees import TreeAggregation
from flower_ext.privacy.factorizations.workload import Workload
from flower_ext.privacy.mechanism import Mechanism, MechanismOptions
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.drop_in import DropIn
from flower_ext.server.optimizers import SGD, ServerOptimizer
from flower_ext.server.options import FedAvgOptions


class DPFTRLOptions(FedAvgOptions, MechanismOptions, total=False):
    """Options of the mechanism, and Flower's own."""


class DPFTRL(AdditiveStrategy):
    r"""The mean of the clients' changes, with user-level differential privacy.

    Against FedAvg: every client's change is clipped to ``clipping`` and weighs the
    same; correlated noise is added to the sum, which is divided by the planned cohort;
    the server moves with momentum; no client takes part more often, or sooner again,
    than the noise is calibrated for. Works with an unmodified client.

    Parameters
    ----------
    num_rounds : int
        Rounds that the noise is planned for.
    num_sampled_clients : int
        Clients per round.
    population_size : int
        Clients that may ever take part.
    min_separation : int (default: 1)
        Least difference of the numbers of two rounds with the same client; the larger,
        the less noise. At most ``population_size / num_sampled_clients``: with more,
        rounds would run short of clients.
    max_participations : int, optional
        Most rounds of a client; by default what the separation allows.
    restart_every : int, optional
        Start a new tree after as many rounds; with ``factorization="tree"`` only. A
        tree that restarts in every round is independent noise.
    sampler : Sampler, optional
        In place of the default, ``MinSeparationSampler(min_separation,
        max_participations)``, for other seeds or for what to do with too few clients.
    server_optimizer : ServerOptimizer, optional
        By default ``SGD(1.0, momentum=0.9)``. Noise is chosen for the momentum of an
        SGD, unless ``workload`` says otherwise.
    **options
        Those of :class:`~flower_ext.privacy.Mechanism`, of which ``noise_multiplier``
        or ``max_epsilon`` must be given, and Flower's own, see
        :class:`~flower_ext.server.options.FedAvgOptions`.

    Notes
    -----
    Guarantee: (``epsilon``, ``target_delta``) for everything that one client ever
    sends, whatever clients send and whenever they drop out, and unless ``amplified``
    even if all cohorts are known; see :class:`~flower_ext.privacy.Mechanism` for its
    limits. Metrics ``epsilon`` and
    ``delta`` say what is spent.

    In the paper the noise is that of a prefix sum from which the model is computed anew
    in each round; here its differences are added to the changes, which is the same for
    SGD, and lets any server optimizer follow. Momentum survives restarts, where in the
    paper's code it is lost.

    Examples
    --------
    >>> strategy = DPFTRL(num_rounds=64, num_sampled_clients=20, population_size=400,
    ...                   min_separation=16, max_epsilon=8.0, target_delta=1e-4)
    >>> strategy.settings()["Mechanism"]
    'BLT(1), 64 rounds, 20 of 400 clients'
    """

    drop_in = DropIn(
        arguments=lambda cohort: {
            "num_rounds": 1,
            "num_sampled_clients": cohort,
            "population_size": cohort,
            "noise_multiplier": 1.0,
        },
        written="num_rounds=..., num_sampled_clients=..., population_size=..., "
        "max_epsilon=..., target_delta=...",
        explained="of the run that is to be private: its rounds, clients in each, and\n"
        "all clients; max_epsilon and target_delta are the promise",
    )

    def __init__(
        self,
        *,
        num_rounds: int,
        num_sampled_clients: int,
        population_size: int,
        min_separation: int = 1,
        max_participations: int | None = None,
        restart_every: int | None = None,
        sampler: Sampler | None = None,
        server_optimizer: ServerOptimizer | None = None,
        **options: Unpack[DPFTRLOptions],
    ) -> None:
        # Instead of secret sampling: how often, and how soon again, a client takes part
        # is what the sensitivity of the noise is computed from (Kairouz et al. 2021).
        limits = MinSeparationSampler(min_separation, max_participations)
        if sampler is None:
            sampler = limits
        elif (min_separation, max_participations) != (1, None):
            refuse(
                "sampler",
                type(sampler).__name__,
                "left out where min_separation or max_participations are given",
                "the sampler has its own",
            )
        if restart_every is not None:
            if options.get("factorization") != "tree":
                refuse("restart_every", restart_every, 'used with factorization="tree"')
            # A new tree changes the noise alone: the server's momentum goes on.
            tree = TreeAggregation(num_rounds, restart_every=restart_every)
            options = {**options, "factorization": tree}
        server_optimizer = server_optimizer or SGD(1.0, momentum=0.9)
        if isinstance(server_optimizer, SGD):
            steps = Workload(server_optimizer.momentum, server_optimizer.nesterov)
            options = {"workload": steps, **options}
        known = MechanismOptions.__annotations__
        private = {name: x for name, x in options.items() if name in known}
        others = {name: x for name, x in options.items() if name not in known}
        super().__init__(
            server_optimizer=server_optimizer,
            sampler=sampler,
            mechanism=Mechanism(
                num_rounds=num_rounds,
                num_sampled_clients=num_sampled_clients,
                population_size=population_size,
                **cast("MechanismOptions", private),
            ),
            **cast("FedAvgOptions", others),
        )
