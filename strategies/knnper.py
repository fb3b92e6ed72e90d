r"""KNNPer: the shared model's prediction, mixed with that of similar local examples.

Nothing but federated averaging's model travels. Where it is used, a client looks up
which of its own examples are the nearest in the model's representation :math:`\phi`,
and mixes their labels into the prediction:

.. math::
   p_k(y \mid x) = a_k \frac{\sum_{i \in N(x)} e^{-d_i} 1[y_i = y]}
   {\sum_{i \in N(x)} e^{-d_i}} + (1 - a_k)\, p(y \mid x),
   \qquad d_i = \|\phi(x) - \phi(x_i)\| / s,

over the :math:`|N(x)|` nearest of the client's training examples (Marfoq, Neglia,
Kameni and Vidal 2022, "Personalized federated learning through local memorization",
ICML, arXiv 2111.09360).
"""

from collections.abc import Callable
from typing import NamedTuple, Unpack

import torch
from torch import Tensor, nn

from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.personalization import hold_out
from flower_ext.client.task import Batch, batches, evaluate, num_examples
from flower_ext.core.errors import fraction, open_unit, positive, refuse, whole
from flower_ext.core.protocol import Config, Metrics, Round
from flower_ext.server.drop_in import DropIn
from flower_ext.server.options import AdditiveOptions
from flower_ext.server.personal import PersonalStrategy

NEIGHBOURS_KEY = "knn-neighbours"
SCALE_KEY = "knn-scale"
WEIGHT_KEY = "knn-weight"
WEIGHT = "knn-weight"

# The column of the labels, or how they are made of a batch.
Labels = str | Callable[[Batch], Tensor]

# The weights of the neighbours that a client tries on its held-out examples.
WEIGHTS = tuple(step / 10 for step in range(11))
# Rows of distances at a time: for 100,000 examples 200 MB.
_ROWS = 256


def knn_probabilities(
    queries: Tensor,
    stored: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    k: int = 10,
    scale: float = 1.0,
) -> Tensor:
    r"""Return the label probabilities of the nearest stored examples.

    Parameters
    ----------
    queries : Tensor
        Representations, of shape ``(queries, features)``.
    stored : Tensor
        Of shape ``(examples, features)``, at least one.
    labels : Tensor
        Their labels, integers of shape ``(examples,)``.
    num_classes : int
        Labels are below it.
    k : int (default: 10)
        Neighbours; all examples where there are no more.
    scale : float (default: 1.0)
        s; the larger, the more alike neighbours count.

    Returns
    -------
    Tensor
        Of shape ``(queries, num_classes)``.

    Examples
    --------
    >>> stored, labels = torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([1, 0, 0])
    >>> found = knn_probabilities(torch.tensor([[0.0]]), stored, labels, 2, k=2)
    >>> [round(p, 4) for p in found[0].tolist()]
    [0.2689, 0.7311]
    """
    found = []
    for rows in torch.split(queries.double(), _ROWS):
        # Not by a matrix product: it would round the distance of equal points off 0.
        gaps = torch.cdist(
            rows, stored.double(), compute_mode="donot_use_mm_for_euclid_dist"
        )
        near, which = gaps.topk(min(k, len(stored)), largest=False)
        shares = (-near / scale).softmax(1)
        chances = torch.zeros(len(rows), num_classes, dtype=shares.dtype)
        chances = chances.to(shares.device)
        found.append(chances.scatter_add_(1, labels.long()[which], shares))
    return torch.cat(found) if found else torch.zeros(0, num_classes)


def mixed(model_chances: Tensor, knn_chances: Tensor, weight: float) -> Tensor:
    """Return the logarithm of ``weight * knn + (1 - weight) * model``.

    Examples
    --------
    >>> mixed(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]), 0.5).exp().tolist()
    [0.75, 0.25]
    """
    chances = weight * knn_chances + (1 - weight) * model_chances
    # Of a chance of 0 the logarithm would be infinite, and the mean loss with it.
    tiny = torch.finfo(torch.float32).tiny
    return chances.clamp_min(tiny).log()


class _Memory:
    """Hooks on a model: they keep its representations, and mix into its answers."""

    def __init__(self, local: Local, layer: nn.Module, label: Labels) -> None:
        self.model, self.task, self.label = local.model, local.task, label
        self.k = int(local.number(NEIGHBOURS_KEY, 10))
        self.scale = local.number(SCALE_KEY, 1.0)
        self.stored: Seen | None = None
        self.weight = 0.0
        self._hooks = (
            layer.register_forward_pre_hook(self._keep),
            self.model.register_forward_hook(self._answer),
        )

    def end(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _keep(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._represented = inputs[0].detach()

    def _answer(
        self, model: nn.Module, inputs: object, answers: object
    ) -> Tensor | None:
        shape = tuple(answers.shape) if isinstance(answers, Tensor) else ()
        if not isinstance(answers, Tensor) or answers.ndim < 2:
            shown = shape or type(answers).__name__
            refuse("the model's output", shown, "logits of shape (batch, ..., classes)")
        asked, came = shape[:-1], tuple(self._represented.shape)
        if came[: len(asked)] != asked:
            cause = "it must have the model's answers' batch, and time, first"
            refuse("layer's input", came, f"of shape {asked} and features", cause)
        # Each answer of a sequence has neighbours of its own.
        self._represented = self._represented.flatten(0, len(asked) - 1).flatten(1)
        self._chances = answers.detach().softmax(-1).flatten(0, -2)
        if not self.weight:
            return None
        near = self.neighbours(self._represented)
        return mixed(self._chances, near, self.weight).view(shape)

    def neighbours(self, represented: Tensor) -> Tensor:
        """Return the labels' probabilities among the neighbours in store."""
        assert self.stored is not None
        stored, classes = self.stored, self._chances.shape[1]
        return knn_probabilities(
            represented,
            stored.represented,
            stored.labels,
            classes,
            k=self.k,
            scale=self.scale,
        )

    @torch.no_grad()
    def look_at(self, data: Batch) -> "Seen":
        """Return what the model, without the store, makes of examples."""
        self.weight, parts = 0.0, []
        self.model.eval()
        for batch in batches(data, 256):
            self.task.loss(self.model, batch)
            label = self.label
            labels = batch[label] if isinstance(label, str) else label(batch)
            if labels.numel() != len(self._chances):
                cause = "one for each answer of the model"
                refuse(
                    "label", tuple(labels.shape), f"{len(self._chances)} labels", cause
                )
            parts.append((self._represented, self._chances, labels.flatten()))
        return Seen(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


class Seen(NamedTuple):
    """What a model makes of some examples."""

    represented: Tensor
    chances: Tensor
    labels: Tensor


class KNNPerClient(ClientHalf):
    """Trains as with FedAvg; mixes neighbours into what it evaluates.

    Parameters
    ----------
    layer : str, optional
        Name of the module whose input is the representation; by default the last
        ``torch.nn.Linear`` of the model.
    label : str or callable (default: "y")
        Column of the data with the class, an integer; or ``batch -> classes``, of the
        shape of the model's answers, such as the characters that come next.
    holdout : float (default: 0.2)
        Share of the training examples, in (0, 1), on which the weight of the neighbours
        is found, where the strategy gives none. The others are the neighbours then; in
        the evaluation all are.

    Notes
    -----
    The task must be classification: the model returns logits of shape ``(batch,
    classes)``, or ``(batch, time, classes)`` for a sequence, of which each answer has
    neighbours of its own. Loss and metrics must be made of what it returns, as those of
    cross entropy and accuracy are. They are then given logarithms of the mixed
    probabilities.
    """

    name = "knnper"
    post_processing = True  # what the neighbours say stays in the evaluation
    compares = True

    def __init__(
        self, layer: str | None = None, label: Labels = "y", holdout: float = 0.2
    ) -> None:
        self._layer, self._label = layer, label
        self._holdout = open_unit("holdout", holdout)

    def evaluate(self, local: Local) -> Metrics:
        """Return loss and metrics of the mixed predictions, and their weight."""
        if isinstance(self._label, str) and self._label not in local.train:
            refuse("label", self._label, f"one of the columns {sorted(local.train)}")
        if not num_examples(local.train):
            return {WEIGHT: 0.0}
        if local.number(WEIGHT_KEY, 1.0):
            local.session.measures()  # what is told quotes training data
        memory = _Memory(local, self._represents(local.model), self._label)
        try:
            if WEIGHT_KEY in local.config:
                weight = local.number(WEIGHT_KEY, 0.0)
            else:
                weight = self._tuned(local, memory)
            found: Metrics = {WEIGHT: weight}
            if weight:
                memory.stored = memory.look_at(local.train)
                memory.weight = weight
                found |= evaluate(local.task, local.model, local.test)
            return found
        finally:
            memory.end()

    def _tuned(self, local: Local, memory: _Memory) -> float:
        """Return the weight of the least loss on held-out examples.

        Of equal ones it is the first. The examples are the same in every round.
        """
        rest, held = hold_out(local, self._holdout)
        if not num_examples(held):  # nothing to tune on
            return 0.0
        memory.stored = memory.look_at(rest)
        asked = memory.look_at(held)
        near, rows = memory.neighbours(asked.represented), asked.labels.long()[:, None]
        return min(
            WEIGHTS,
            key=lambda a: -float(mixed(asked.chances, near, a).gather(1, rows).mean()),
        )

    def _represents(self, model: nn.Module) -> nn.Module:
        named: dict[str, nn.Module] = dict(model.named_modules())
        if self._layer is not None:
            if self._layer not in named:
                refuse("layer", self._layer, f"one of {[n for n in named if n]}")
            return named[self._layer]
        linear = [name for name, x in named.items() if isinstance(x, nn.Linear)]
        if not linear:
            cause = "the model has no torch.nn.Linear"
            refuse("layer", None, "the name of a module", cause)
        # Of a layer with an adapter, as peft makes them: not the adapter's own layers.
        adapted = (name for name, x in named.items() if hasattr(x, "base_layer"))
        last = linear[-1]
        return named[next((n for n in adapted if last.startswith(f"{n}.")), last)]


class KNNPer(PersonalStrategy):
    r"""Federated averaging, and predictions mixed with those of similar local examples.

    Against FedAvg: nothing, as far as the server and the training are concerned. In an
    evaluation a client mixes the labels of its nearest training examples into what the
    model says. Clients that never trained have neighbours, too. Works with the client
    half :class:`KNNPerClient`, or with :func:`knn_probabilities` and :func:`mixed` in a
    loop of one's own.

    Parameters
    ----------
    num_neighbours : int (default: 10)
        :math:`|N(x)|`, at least 1; of fewer examples all are neighbours.
    weight : float, optional
        :math:`a`, from 0 to 1, the same for all clients. 0 is the shared model, 1 the
        neighbours alone. By default each client takes that of 0, 0.1, ..., 1 which
        loses least on a held-out part of its training data.
    scale : float (default: 1.0)
        s > 0, the distance at which a neighbour counts 1/e of one at distance 0. The
        larger, the more alike all neighbours count; it is in the units of the
        representation.
    *flowers, **options
        Server optimizer, sampler, mechanism and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Notes
    -----
    Metric ``knn-weight`` of an evaluation is the mean of :math:`a_k`. What a client
    remembers is made anew in each evaluation, of the model that it receives, and is
    neither kept nor sent.

    *Revealed*: what FedAvg reveals; and the metrics of evaluations are of predictions
    that quote training data. Whoever may ask a client's mixed predictions may read
    labels off them. Under a mechanism the model is private and the metrics are
    withheld; under DPSGD, too.

    Deviations from the paper: the weight is found on a part of the training data and
    from a fixed grid; distances are divided by ``scale`` (1 there); all examples are
    remembered.

    Examples
    --------
    >>> strategy = KNNPer(num_neighbours=5, fraction_train=0.1)
    """

    client_half = KNNPerClient
    drop_in = DropIn(
        fill_in="in the evaluate function: what mixed(...) of knn_probabilities(...),\n"
        "of flower_ext.strategies.knnper, makes of the model's predictions",
        silent=True,
    )

    def __init__(
        self,
        *flowers: object,
        num_neighbours: int = 10,
        weight: float | None = None,
        scale: float = 1.0,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(*flowers, **options)
        self.num_neighbours = whole("num_neighbours", num_neighbours, 1)
        cause = "None lets clients find their own"
        self.weight = None if weight is None else fraction("weight", weight, cause)
        self.scale = positive("scale", scale)

    def tell(self, round: Round) -> Config:
        """Tell clients how to look for neighbours."""
        return {
            NEIGHBOURS_KEY: self.num_neighbours,
            SCALE_KEY: self.scale,
            **({} if self.weight is None else {WEIGHT_KEY: self.weight}),
        }

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        return {
            "Neighbours": self.num_neighbours,
            "Weight": "each client's own" if self.weight is None else self.weight,
            "Scale": self.scale,
            **super().settings(),
        }
