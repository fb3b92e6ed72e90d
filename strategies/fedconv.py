r"""FedConv: small models that are learned from the large one, by convolutions.

HeteroFL hands a small client the first units of every layer, whatever these are. In
FedConv the server compresses the large model for each class of clients, by
convolutions over its parameters, which it learns on a small public data set so that
the small model is good. What clients have changed comes back through transposed
convolutions, and is averaged with weights, both learned on the same data (Shen, Yang,
Cui, Zheng, Wei, Liu and Han 2024, "FedConv: a learning-on-model paradigm for
heterogeneous federated clients", MobiSys, arXiv 2502.20639).
"""

from collections.abc import Callable, Mapping, Sequence
from logging import WARNING
from typing import NamedTuple, Unpack, cast

import torch
from flwr.app import UserConfig
from torch import Tensor, nn

from flower_ext._flower import log
from flower_ext.client.submodels import SubmodelClient
from flower_ext.client.task import Batch, Task, num_examples
from flower_ext.core.arrays import Arrays, is_parameter, zeros_like
from flower_ext.core.contribution import DELTA, Contribution, Total
from flower_ext.core.errors import at_least, refuse, whole
from flower_ext.core.protocol import Metrics, Reply, Round
from flower_ext.core.submodels import WIDTH, block, require_slices, shapes_of
from flower_ext.server.drop_in import DropIn
from flower_ext.server.learned_maps import (
    ConvolutionMap,
    PublicLoss,
    arrays_of,
    fit,
    put,
    tensors_of,
)
from flower_ext.server.options import AdditiveOptions
from flower_ext.server.submodels import Submodels

# With fewer public examples, what is learned of them is learned by heart.
_FEW = 10


class FedConvClient(SubmodelClient):
    """Trains a model of the width that the server says, and sends it."""

    name = "fedconv"


class FedConv(Submodels):
    r"""Federated averaging of models that a convolution has made smaller.

    Against HeteroFL: the small model of a tier t is :math:`C_t(\theta)`, convolutions
    over the large one along every axis that shrinks, and the mean change of its clients
    comes back by transposed ones, :math:`U_t`. With :math:`n_t` the examples of a tier,
    :math:`h_{t, i}` whether its slice has number i, and learned :math:`a_t > 0`,

    .. math::
       \theta_i \leftarrow \theta_i + \frac{\sum_t a_t n_t\, U_t(\bar\Delta_t)_i}
       {\sum_t a_t n_t h_{t, i}},

    where a number in no slice is divided by :math:`\sum_t a_t n_t`. Before each round
    :math:`C_t` is trained so that the small model does well on the public data; with
    the replies, :math:`U_t` and :math:`a_t`, so that the new large model does. Of all
    steps the best is kept, the start included. With ``server_steps=0`` all maps are
    slices, and it is HeteroFL; with one width of 1 nothing is to be learned, and it is
    FedAvg. Works with the client half :class:`FedConvClient`, for which ``Task.model``
    reads ``run_config["width"]``.

    Parameters
    ----------
    task : Task
        The clients' own: its model of every width, and its loss.
    public : dict[str, Tensor]
        The public data, at least one example; columns as the task's. They are read as
        one batch in every step: a few hundred examples.
    widths, width_of
        As of :class:`~flower_ext.strategies.heterofl.HeteroFL`.
    server_steps : int (default: 20)
        Steps of Adam for each map and each round; 0 is HeteroFL.
    server_learning_rate : float (default: 0.0003)
        Of Adam, which moves each number of a kernel by about so much in a step. A
        kernel begins as a 1 and many zeros, and should stay near: what clients have
        learned is handed on as far as the ways there and back are each other's inverse.
    run_config : dict, optional
        What ``task.model`` is called with, beside the width.
    *flowers, **options
        Server optimizer, sampler, mechanism, codecs and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Raises
    ------
    ValueError
        If there is no public example; before a round, if a small model has no slices of
        the initial arrays, or if further axes than two shrink.

    Notes
    -----
    Train metrics: ``public-loss`` of the new large model, and ``public-loss-start`` of
    that which the maps as they were would have made. With fewer than 10 public examples
    a warning says that the maps learn these by heart; one is survived. The server
    computes in float64, and each map is as large as the sides of the arrays. Numbers
    whose kernels cancel may come to lie outside of what the clients sent.

    **Deviation from the paper.** Its authors' code learns one kernel over both axes of
    a filter, after a pointwise layer and before an activation, a transposed map for
    each client, and weights for each; and it trains the large model itself on the
    public data before each round. Here kernels are one for each axis, linear, and start
    from the slice; maps and weights are of a tier, so that sums suffice; what comes
    back is a change and not a model; and the public data train maps and weights only,
    never the model. The formula above is ours, so that slices give HeteroFL.

    **Privacy.** The maps are made of public data and of sums. Under a mechanism each
    tier has a sum of its own, with its own noise: the more tiers, the more noise.

    Examples
    --------
    >>> task = Task(
    ...     model=lambda config: nn.Linear(int(8 * config.get("width", 1.0)), 1),
    ...     data=lambda context: ({}, {}),
    ...     loss=lambda model, batch: model(batch["x"]).square().mean(1),
    ... )
    >>> public = {"x": torch.ones(16, 8)}
    >>> strategy = FedConv(task=task, public=public, widths=(1.0, 0.5))
    """

    client_half = FedConvClient
    needs_rounds = "what a client was sent is made by maps that change every round"
    drop_in = DropIn(
        fill_in="make Net(width) of the width in the message's configuration, and\n"
        "not the whole one; on the server: FedConv(task=..., public=..., widths=...)",
        written="task=..., public=..., widths=(1.0, 0.5)",
    )

    def __init__(
        self,
        *flowers: object,
        task: Task,
        public: Batch,
        widths: Sequence[float],
        width_of: Callable[[int], float] | None = None,
        server_steps: int = 20,
        server_learning_rate: float = 0.0003,
        run_config: UserConfig | None = None,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        if not isinstance(task, Task):
            refuse("task", task, "a Task", "Task(model, data, loss), as the clients'")
        if not isinstance(public, Mapping) or not public or not num_examples(public):
            refuse("public", public, "columns with at least one example")
        if num_examples(public) < _FEW:
            text = "public has %s examples: the maps learn these by heart"
            log(WARNING, text, num_examples(public))

        def model(width: float) -> nn.Module:
            return task.model({**(run_config or {}), WIDTH: width})

        with torch.random.fork_rng(devices=[]):  # models begin at random
            super().__init__(
                *flowers, model=model, widths=widths, width_of=width_of, **options
            )
            losses = [
                PublicLoss(task, model(width), public) for width in (1.0, *self.widths)
            ]
        self.server_steps = whole("server_steps", server_steps, 0)
        rate = at_least("server_learning_rate", server_learning_rate, 0)
        self.server_learning_rate = rate
        #: What the clients of each tier were sent in this round.
        self.sent_models: dict[int, Arrays] = {}
        # Of the server alone: a task need not be picklable.
        self._large, *self._small = losses
        self._maps: dict[int, ConvolutionMap] = {}
        self._saved: Mapping[str, Arrays] = {}
        self._logs = torch.zeros(len(self.widths)).double()  # of the weights a_t
        self._learned: _Learned | None = None

    def map_of(self, tier: int, sent: Arrays) -> ConvolutionMap:
        """Return a tier's map, as it is now."""
        if tier not in self._maps:
            trained = [name for name, x in sent.items() if is_parameter(name, x)]
            found = ConvolutionMap(self.slices(tier, sent), trained)
            for key, x in self._saved.get(str(tier), {}).items():
                found.kernels[key] = torch.tensor(x)
            self._maps[tier] = found
        return self._maps[tier]

    def submodel(self, tier: int, round: Round) -> Arrays:
        """Return a tier's small model, for training of a map that is learned anew."""
        found = self.map_of(tier, round.sent)
        if round.phase == "evaluate":
            return found.down(round.sent)
        own = shapes_of(self._large.model)
        if require_slices(own, round.sent, 1.0) != shapes_of(round.sent):
            refuse("initial_arrays", shapes_of(round.sent), "of task.model, of width 1")
        sent = tensors_of(round.sent)
        self._fit(
            lambda: self._small[tier].of(found.apply("down", sent)), found.of("down")
        )
        self.sent_models = {**self.sent_models, tier: found.down(round.sent)}
        return self.sent_models[tier]

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        """Return the change of the small model, as a part of its own."""
        tier = self.tier(reply.client)
        change = reply.change(round, start=self.sent_models[tier]).arrays
        weights = {} if round.private else {part(tier): reply.num_examples}
        return Contribution({part(tier): change}, weights=weights)

    def zero(self, sent: Arrays) -> Contribution:
        """Return no change of any tier."""
        tiers = range(len(self.widths))
        small = [self.slices(tier, sent).down(sent) for tier in tiers]
        weights = {} if self.mechanism else {part(tier): 0.0 for tier in tiers}
        parts = {part(tier): zeros_like(small[tier]) for tier in tiers}
        return Contribution(parts, weights=weights)

    def report(self, total: Total, round: Round) -> Metrics:
        """Return the public loss of the new model."""
        return self._learn(total, round).metrics

    def update(self, total: Total, round: Round) -> Arrays:
        """Return the weighted mean of what came back."""
        return self._learn(total, round).direction

    def advance(self, total: Total, round: Round) -> None:
        """Keep the ways back and the weights that were learned."""
        learned = self._learn(total, round)
        put(self._ways(round.sent), learned.values)
        self._learned = None

    def _ways(self, sent: Arrays) -> list[Tensor]:
        """Return what is learned of replies: all ways back, and the weights."""
        tiers = range(len(self.widths))
        return [*(x for t in tiers for x in self.map_of(t, sent).of("up")), self._logs]

    def _learn(self, total: Total, round: Round) -> "_Learned":
        """Learn from a sum, once, without keeping it; return what comes of it."""
        if self._learned is None or self._learned.total is not total:
            ways = self._ways(round.sent)
            before = [x.clone() for x in ways]
            mean = _Mean(self, self._logs, total, round)
            fitted = ways if sum(n > 0 for n in mean.weights) > 1 else ways[:-1]
            start, end = self._fit(lambda: self._large.of(mean.model()), fitted)
            direction = {name: x.numpy() for name, x in mean.direction().items()}
            metrics: Metrics = {"public-loss-start": start, "public-loss": end}
            values = [x.clone() for x in ways]
            self._learned = _Learned(total, direction, metrics, values)
            put(ways, before)
        return self._learned

    def _fit(
        self, loss: Callable[[], Tensor], parameters: list[Tensor]
    ) -> tuple[float, float]:
        steps = self.server_steps if parameters else 0
        return fit(loss, parameters, steps, self.server_learning_rate)

    def state_dict(self) -> dict[str, object]:
        """Add all maps and the weights."""
        maps = {str(tier): arrays_of(x.kernels) for tier, x in self._maps.items()}
        own = {"maps": {**self._saved, **maps}, "weights": self._logs.numpy()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over the maps."""
        super().load_state_dict(state)
        self._saved = cast("Mapping[str, Arrays]", state["maps"])
        self._maps = {}
        self._logs = torch.tensor(cast("Arrays", state)["weights"])

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        steps = f"{self.server_steps} at {self.server_learning_rate:g}"
        return {"Server steps": steps, **super().settings()}


class _Learned(NamedTuple):
    """What was made of a sum."""

    total: Total
    direction: Arrays
    metrics: Metrics
    values: list[Tensor]


class _Mean:
    """The weighted mean of what came back, as a function of maps and weights."""

    def __init__(
        self, strategy: FedConv, logs: Tensor, total: Total, round: Round
    ) -> None:
        tiers = range(len(strategy.widths))
        self.sent = tensors_of(round.sent)
        self.maps = [strategy.map_of(tier, round.sent) for tier in tiers]
        self.sums = [tensors_of(total.arrays[part(tier)]) for tier in tiers]
        self.weights = [total.weights.get(part(tier), 0.0) for tier in tiers]
        if round.private:  # those planned, which are no secret
            self.weights = list(total.weight * strategy.shares(round.population))
        self.logs = logs

    def direction(self) -> dict[str, Tensor]:
        """Return the mean, in float64."""
        factors = self.logs.exp()
        weights = factors * torch.tensor(self.weights, dtype=torch.float64)
        ways = [m.up(x) for m, x in zip(self.maps, self.sums, strict=True)]
        found = {}
        for name, x in self.sent.items():
            held = torch.zeros(x.shape).double()
            for weight, m in zip(weights, self.maps, strict=True):
                held[block(m.slices.small[name])] += weight
            total = sum(a * way[name] for a, way in zip(factors, ways, strict=True))
            divisor = torch.where(held > 0, held, weights.sum())
            found[name] = torch.where(divisor > 0, total / divisor, 0.0)
        return found

    def model(self) -> dict[str, Tensor]:
        """Return the new large model; counters and flags stay."""
        moved = self.direction()
        return {
            name: x.double() + moved[name] if x.is_floating_point() else x
            for name, x in self.sent.items()
        }


def part(tier: int) -> str:
    """Return the name of a tier's part in the sum."""
    return f"{DELTA}-{tier}"
