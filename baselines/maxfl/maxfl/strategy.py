"""The strategies that are compared, with the same cohorts and options."""

import numpy as np
from flwr.app import UserConfig

from flower_ext import AdditiveStrategy
from flower_ext.core.arrays import norm, scale
from flower_ext.core.contribution import DELTA, Contribution
from flower_ext.core.protocol import Config, Reply, Round
from flower_ext.core.sampling import HeldOutSampler
from flower_ext.strategies import MaxFL
from maxfl.client_app import LOSS, PROXIMAL_MU


class FedAvg(MaxFL):
    """FedAvg with MaxFL's metrics: the weights are the numbers of examples."""

    contribution = AdditiveStrategy.contribution
    update = AdditiveStrategy.update
    report = AdditiveStrategy.report


class FedProx(FedAvg):
    """FedAvg whose clients stay near the model that they received (Li et al. 2020)."""

    def __init__(self, proximal_mu: float, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.proximal_mu = proximal_mu

    def tell(self, round: Round) -> Config:
        """Tell clients how near."""
        return {**super().tell(round), PROXIMAL_MU: self.proximal_mu}


class QFedAvg(FedAvg):
    r"""q-FedAvg (Li et al. 2020, "Fair Resource Allocation", Algorithm 2).

    With :math:`L = 1/\eta`, :math:`\Delta_k = L (w_k - w)` and the loss :math:`F_k` of
    the received model, the model moves by :math:`\sum F_k^q \Delta_k / \sum h_k`,
    :math:`h_k = q F_k^{q-1} \lVert\Delta_k\rVert^2 + L F_k^q`.
    """

    def __init__(self, q: float, learning_rate: float, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.q = q
        self.lipschitz = 1 / learning_rate

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        """Return the weighted gradient, of which each counts h; 0 without examples."""
        if not reply.num_examples:
            return Contribution({}, 0.0)
        loss = reply.number(LOSS) + 1e-10
        delta = reply.delta(round)
        length = self.lipschitz * norm(delta.values())
        step = self.q * loss ** (self.q - 1) * length**2
        step += self.lipschitz * loss**self.q
        factor = self.lipschitz * loss**self.q
        weighted = {name: scale(x, factor) for name, x in delta.items()}
        counts = dict.fromkeys(delta, np.float64(step))
        return Contribution({DELTA: weighted}, 1.0, counts={DELTA: counts})


def make_strategy(name: str, config: UserConfig) -> MaxFL:
    """Make ``fedavg``, ``fedavg-equal``, ``fedprox``, ``q-fedavg`` or ``maxfl``.

    With equal weights, FedAvg is MaxFL that never ends its rounds of warm-up.
    """
    options = {
        "warmup_steps": int(config["warmup-steps"]),
        "opt_out_from": int(config["opt-out-from"]),
        "temperature": float(config["temperature"]),
        "fraction_train": float(config["fraction-train"]),
        "fraction_evaluate": float(config["fraction-evaluate"]),
        "sampler": HeldOutSampler(
            int(config["seed"]),
            num_training_clients=int(config["num-training-clients"]),
        ),
    }
    if name == "fedprox":
        return FedProx(float(config["proximal-mu"]), **options)
    if name == "q-fedavg":
        return QFedAvg(float(config["q"]), float(config["learning-rate"]), **options)
    if name == "fedavg-equal":
        return MaxFL(warmup_rounds=int(config["num-server-rounds"]), **options)
    if name == "maxfl":
        return MaxFL(warmup_rounds=int(config["warmup-rounds"]), **options)
    if name != "fedavg":
        known = "fedavg, fedavg-equal, fedprox, q-fedavg or maxfl"
        raise ValueError(f"strategies={name!r} must name {known}")
    return FedAvg(**options)
