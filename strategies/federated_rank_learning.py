r"""FRL: clients vote with rankings for the edges of a random network.

No weight is trained. All are random constants of one size, and each has a score; the
network is the edges of the highest scores in each layer. Client k trains scores, and
sends for each layer the place :math:`r_k(e)` of every edge when edges are ordered by
their scores. The server adds the places up, and orders the edges by the sums, a Borda
count:

.. math:: r(e) = \mathrm{place\ of}\ e\ \mathrm{by}\ \sum_{k \in P} r_k(e)

(Mozaffari, Shejwalkar and Houmansadr 2023, "Every vote counts: ranking-based training
of federated learning to resist poisoning attacks", USENIX Security, arXiv 2110.04350,
algorithms 1 and 2. Scores are trained as by Ramanujan, Wortsman, Kembhavi, Farhadi and
Rastegari 2020, "What's hidden in a randomly weighted neural network?", CVPR,
arXiv 1911.13299: "edge-popup".)
"""

import math
from collections.abc import Hashable, Mapping
from typing import TypeVar, Unpack, cast
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, UserConfig
from flwr.common import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.task import Task
from flower_ext.client.tensors import Tensors
from flower_ext.core.arrays import Arrays, all_finite, is_averaged, zeros_like
from flower_ext.core.contribution import Contribution, Total
from flower_ext.core.errors import open_unit, refuse, whole
from flower_ext.core.protocol import Config, Metrics, Payload, Reply, Round, told
from flower_ext.core.replies import MalformedReply, array_key
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.drop_in import DropIn
from flower_ext.server.options import AdditiveOptions
from flower_ext.wire.permutation import Permutation, even_steps, is_permutation

RANKING = "ranking"
DENSITY_KEY = "frl-density"
SEED_KEY = "frl-seed"
PLACES = "places"  # a client's, of all edges

Places = npt.NDArray[np.int64]
M = TypeVar("M", bound=nn.Module)


# Rankings -------------------------------------------------------------------------


def places_of(values: NDArray) -> Places:
    """Return the place of each number in increasing order, from 0.

    Of equal numbers the one that comes first has the lower place: it is less important.

    Parameters
    ----------
    values : ndarray
        Scores, or sums of places; of any shape.

    Examples
    --------
    >>> places_of(np.array([0.3, -1.0, 0.3]))
    array([1, 0, 2])
    """
    places = np.empty(values.size, np.int64)
    places[np.argsort(values, axis=None, kind="stable")] = np.arange(values.size)
    return places.reshape(values.shape)


def scores_at(places: Places, dtype: np.dtype) -> NDArray:
    r"""Return the scores of edges at these places, of a layer's shape.

    They are even steps from :math:`-1/\sqrt{f}` to :math:`1/\sqrt{f}`, with f the
    number of edges into a unit: the quantiles of the distribution that scores are drawn
    from in edge-popup.
    """
    bound = float(dtype.type(1 / math.sqrt(places[0].size)))
    return even_steps(places.reshape(-1), -bound, bound, dtype).reshape(places.shape)


def ranked(arrays: Mapping[str, NDArray]) -> Arrays:
    """Return the arrays whose entries have scores: reals of two axes and more."""
    return {
        name: x
        for name, x in arrays.items()
        if is_averaged(x) and x.ndim > 1 and x.size > 1
    }


# The network ----------------------------------------------------------------------


class _Masked(nn.Module):
    """A layer whose parameter ``weight`` is scores, and whose weight the top edges."""

    signed_constants: Tensor
    edges: int

    @property
    def weight(self) -> Tensor:
        scores = _scores(self)
        fixed = scores.detach()
        least = fixed.flatten().kthvalue(fixed.numel() - self.edges + 1).values
        kept = (fixed >= least).to(fixed.dtype)
        # As numbers they are `kept`; the gradient is that of the scores, "straight
        # through", of edges that are left out, too.
        return self.signed_constants * (kept + (scores - fixed))


def _scores(layer: nn.Module) -> nn.Parameter:
    """Return the parameter, which the property above hides."""
    return dict(layer.named_parameters(recurse=False))["weight"]


class _BatchStatistics(nn.Module):
    """A BatchNorm that always normalises by the batch; what it has kept stays."""

    running_mean = running_var = None


# The classes of layers so changed, of which there is one of a kind.
_CHANGED: dict[tuple[object, object], type[nn.Module]] = {}


def _become(behaviour: type[nn.Module], layer: nn.Module) -> None:
    kind = type(layer)
    if not issubclass(kind, behaviour):
        name = behaviour.__name__.strip("_") + kind.__name__
        new = type(name, (behaviour, kind), {})
        layer.__class__ = _CHANGED.setdefault((behaviour, kind), new)


def supermask(model: M, density: float = 0.5, seed: int = 0) -> M:
    r"""Turn a model into the network of the edges with the highest scores, in place.

    The parameters ``weight`` of linear and convolutional layers become scores, under
    the names and in the shapes that they have; the weights are :math:`\pm\sqrt{2/f}`,
    with signs drawn from the seed and f the number of edges into a unit. All other
    parameters, such as biases, are no longer trained, and BatchNorm normalises by the
    batch, in evaluation, too.

    Parameters
    ----------
    model : torch.nn.Module
        Its arrays of two axes and more must be weights of such layers.
    density : float (default: 0.5)
        Share of the edges of each layer that are kept, between 0 and 1; at least one
        is. Edges that score as the last of these are kept, too.
    seed : int (default: 0)
        Of the signs, with the layer's name.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    ValueError
        If the model has other arrays of two axes and more, or none.

    Examples
    --------
    >>> model = supermask(nn.Linear(4, 1, bias=False), density=0.5)
    >>> scores = torch.tensor([[0.1, 0.4, -0.2, 0.3]])
    >>> _ = model.load_state_dict({"weight": scores})
    >>> model.weight.abs()
    tensor([[0.0000, 0.7071, 0.0000, 0.7071]], grad_fn=<AbsBackward0>)
    """
    open_unit("density", density)
    whole("seed", seed, 0)
    layers = {
        name: x
        for name, x in model.named_modules()
        if isinstance(x, nn.Linear | _ConvNd)
    }
    own = {f"{name}.weight".strip(".") for name in layers}
    if not own or (others := ranked(_numpy(model)).keys() - own):
        refuse(
            "model",
            sorted(others)[:5] if own else type(model).__name__,
            "one whose arrays of two axes and more are weights of linear and "
            "convolutional layers",
            "nothing else is ranked; buffers may be persistent=False",
        )
    model.requires_grad_(False)
    for name, layer in layers.items():
        scores = _scores(layer)
        draws = np.random.default_rng([seed, crc32(name.encode())])
        signs = draws.integers(0, 2, scores.shape, np.int8) * 2 - 1
        constants = torch.from_numpy(signs).to(scores)
        constants *= math.sqrt(2 / scores[0].numel())
        layer.register_buffer("signed_constants", constants, persistent=False)
        _become(_Masked, layer)
        cast(_Masked, layer).edges = max(1, round(density * scores.numel()))
        scores.requires_grad_()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            _become(_BatchStatistics, module)
            module.track_running_stats = False
    return model


def _numpy(model: nn.Module) -> Arrays:
    state = model.state_dict()
    return {name: x.detach().cpu().numpy() for name, x in state.items()}


# What clients do ------------------------------------------------------------------


def masked(model: M, message: Message) -> M:
    """Turn a model into that of the strategy that sent a message, in place.

    For a training loop of one's own, in training and in evaluation; see
    :func:`supermask`.
    """
    return _as_told(model, told(message.content))


def _as_told(model: M, config: ConfigRecord) -> M:
    density, seed = cast(float, config[DENSITY_KEY]), cast(int, config[SEED_KEY])
    return supermask(model, density, seed)


def ranking(model: nn.Module) -> ArrayRecord:
    """Return the places of a trained model's edges, for the reply's ``"ranking"``.

    Raises
    ------
    ValueError
        If scores are not finite: training has diverged.
    """
    scores = ranked(_numpy(model))
    if not all_finite(scores.values()):
        refuse("scores", "NaN or inf", "finite", "choose a lower learning rate")
    places = {name: places_of(x).astype(np.int32) for name, x in scores.items()}
    return Permutation().encode(places)


class FederatedRankLearningClient(ClientHalf):
    """Trains scores in the place of weights, and sends how they rank the edges."""

    name = "frl"

    def make_model(
        self, task: Task, run_config: UserConfig, config: ConfigRecord
    ) -> nn.Module:
        """Return the task's model with scores, as the server says."""
        return _as_told(super().make_model(task, run_config, config), config)

    def model_to_send(self, local: Local) -> Tensors:
        """Send no array."""
        return {}

    def records(self, local: Local) -> tuple[Mapping[str, ArrayRecord], Metrics]:
        """Return the ranking."""
        return {RANKING: ranking(local.model)}, {}


# The server -----------------------------------------------------------------------


class FederatedRankLearning(AdditiveStrategy):
    r"""Federated votes on which edges of a random network are kept.

    Against FedAvg: arrays of two axes and more hold scores in the place of weights,
    clients send rankings of them, all clients that trained weigh the same, and the
    server orders the edges by the sums of their places. Works with the client half
    :class:`FederatedRankLearningClient`, or with :func:`masked` and :func:`ranking` in
    a training loop of one's own.

    Parameters
    ----------
    density : float (default: 0.5)
        Share of the edges of each layer that are kept, between 0 and 1. There is no
        value that gives FedAvg.
    seed : int (default: 0)
        Of the weights' signs. With the density it makes the network of the scores.
    *flowers, **options
        Sampler, download codec and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Raises
    ------
    ValueError
        If there is a mechanism, a server optimizer, or a codec of uploads; before the
        first round, if the initial arrays have none to rank.

    Notes
    -----
    The run's arrays have the names and shapes of the plain model's, and may start from
    ``Net().state_dict()``, of which scores take only the order. :meth:`model` turns a
    ``Net()`` into the network to load them into, at the server, too.

    A ranking travels up in :math:`\lceil \log_2 d \rceil` bits for each of a layer's d
    edges. ``download=Permutation()`` of :mod:`flower_ext.wire` sends the scores in as
    few. Arrays of one axis, such as biases, stay as they start, for ever.

    **Robustness.** A client moves the sum of an edge by at most d - 1, whatever it
    trains or makes up: a reply that is no ranking is left out. A minority that sends
    the reverse of its ranking takes back the votes of as many others, no more. That
    does not protect against an attacker who is sampled as many clients, nor against
    backdoors for which few edges suffice.

    **Privacy.** Rankings are not noised, and no mechanism is taken. A vote on d edges
    has an l2 norm of about :math:`d^{1.5} / \sqrt 3`, whatever it says: noise of this
    size at every edge drowns the votes of fewer than about :math:`\sqrt{d / 3}`
    clients. DPSGD refuses the client half, whose layers have no gradient per example.

    Deviations from the paper's code: scores are even steps, the same in every round and
    layer of a shape, and not the sorted draws of one start; they are ranked by value
    and not by magnitude in the forward pass as well, so that the lowest place is an
    edge that is left out; equal sums are ordered by position and not by the sort's
    chance.

    Examples
    --------
    >>> strategy = FederatedRankLearning(density=0.5, fraction_train=0.1)
    """

    client_half = FederatedRankLearningClient
    drop_in = DropIn(
        imports="from flower_ext.strategies.federated_rank_learning "
        "import masked, ranking",
        before="masked({model}, {message})",
        records={RANKING: "ranking({model})"},
    )
    needs_rounds = "a vote is on the ranking of its round, and each counts as one"
    equal_weights = True
    other_arrays = (RANKING,)

    def __init__(
        self,
        *flowers: object,
        density: float = 0.5,
        seed: int = 0,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        for name, cause in _REFUSED.items():
            if (value := cast(Mapping[str, object], options).get(name)) is not None:
                refuse(name, value, "left out", cause)
        super().__init__(*flowers, **options)
        self.density = open_unit("density", density)
        self.seed = whole("seed", seed, 0)

    def model(self, model: M) -> M:
        """Turn a plain model into the network of a run's arrays, in place."""
        return supermask(model, self.density, self.seed)

    def tell(self, round: Round) -> Config:
        """Tell clients of which network the scores are."""
        if not ranked(round.sent):
            bound = "with an array of two axes or more"
            refuse("initial_arrays", list(round.sent)[:5], bound, "nothing to rank")
        return {DENSITY_KEY: self.density, SEED_KEY: self.seed}

    def payload(self, variant: Hashable, round: Round) -> Payload:
        """Return the scores of the ranking, whatever numbers it started with."""
        scores = {
            n: scores_at(places_of(x), x.dtype) for n, x in ranked(round.sent).items()
        }
        return Payload({**round.sent, **scores})

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        """Return the client's places, each edge at one and each place taken once."""
        records = reply.content.array_records
        if RANKING not in records:
            raise MalformedReply(f"no ArrayRecord {RANKING!r} in the reply")
        # A loop of one's own may send its model along, which is not looked at.
        key = array_key(reply.content, reply.keys.arrays, reply.keys.others)
        reply.arrays(key, round.sent if records.get(key) else {})
        places = Permutation().decode(records[RANKING], _no_places(round.sent))
        for name, x in places.items():
            if not is_permutation(x):
                raise MalformedReply(f"the places of {name!r} are not a ranking")
        return Contribution({PLACES: places})

    def zero(self, sent: Arrays) -> Contribution:
        """Return the lowest place for all."""
        return Contribution({PLACES: _no_places(sent)})

    def update(self, total: Total, round: Round) -> Arrays:
        """Return the way to the scores of the edges' order by the sums."""
        direction: Arrays = {}
        for name, sums in total.arrays[PLACES].items():
            sent = round.sent[name]
            new = scores_at(places_of(sums), sent.dtype)
            direction[name] = np.subtract(new, sent, dtype=np.float64)
        return direction

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        return {"Density": self.density, "Seed": self.seed, **super().settings()}


def _no_places(sent: Arrays) -> Arrays:
    return zeros_like({n: np.empty(x.shape, np.int32) for n, x in ranked(sent).items()})


_REFUSED = {
    "mechanism": "noise that hides one ranking hides those of all",
    "server_optimizer": "a ranking is put in place, and not moved towards",
    "upload": "rankings travel as permutations, in few bits",
}
