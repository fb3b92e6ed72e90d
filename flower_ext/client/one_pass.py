r"""DP-SGD that clips every layer for itself, while the backward pass goes through it.

With flat clipping an example's factor is known after the whole backward pass only, so
that its gradient, or what its layers have seen, is kept until then. With a clipping
norm for each layer,

.. math::
   \sum_{i \in B} \Big( g_i^1 \min(1, C_1 / \|g_i^1\|), \ldots,
   g_i^L \min(1, C_L / \|g_i^L\|) \Big), \qquad \sum_l C_l^2 = C^2,

norm, factor and sum of layer l are computed as soon as the pass has left it, and all
else of it is forgotten.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

from flwr.app import Context
from torch import Tensor, nn

from flower_ext.client.dp_sgd import DPSGD
from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.noisy_steps import NoisePlan, NoisySteps
from flower_ext.client.task import Batch, num_examples
from flower_ext.core.errors import refuse
from flower_ext.privacy.clipping import split_clipping_norm
from flower_ext.privacy.example_gradients import Call, Gradients
from flower_ext.privacy.layer_sums import (
    SINGLE_BATCH,
    SINGLE_SLACK,
    clipped_layer,
)
from flower_ext.privacy.silo_budget import SiloPrivacy

Split = Literal["uniform", "dimension"]


class OnePassClipping(DPSGD):
    r"""Trains by DP-SGD with a clipping norm for each layer, in one backward pass.

    It takes the place of :class:`~flower_ext.client.dp_sgd.DPSGD`, of which it has all
    but the clipping: unit, account, noise, what is withheld and refused, and the halves
    that it serves. ::

        privacy = SiloPrivacy(epsilon=2.0, delta=1e-5, num_rounds=50, clipping_norm=1.0)
        app = client_app(task, trainer=OnePassClipping(privacy))

    It trains another model than flat clipping: what an example says in one layer takes
    no room from what it says in another, and a direction of the whole model is bent.
    Take it where memory or time of flat clipping are what hinders.

    Parameters
    ----------
    privacy : SiloPrivacy or callable
        As of :class:`~flower_ext.client.dp_sgd.DPSGD`. ``clipping_norm`` is that of an
        example's gradient in all layers together.
    split : str (default: "uniform")
        How it is split over L layers: ``uniform`` gives each
        :math:`C_l = C / \sqrt L`; with ``dimension`` the squares are as the numbers of
        trained parameters, :math:`C_l = C \sqrt{d_l / d}`, so that each parameter has
        as much noise for its share of the norm. With one layer both are flat clipping,
        but for the 1 % of the notes.
    release_train_loss, release_evaluation : bool (default: False)
        As of :class:`~flower_ext.client.dp_sgd.DPSGD`.

    Raises
    ------
    ValueError
        As :class:`~flower_ext.client.dp_sgd.DPSGD`; if a layer is used again after the
        backward pass has left it, as by a checkpoint of activations.

    Notes
    -----
    **Layers.** A layer is a module with its trained parameters, weight and bias
    together. Modules that share a parameter are one layer, and one that is used twice
    is clipped as a sum: when the pass has left the last of these uses.

    **Guarantee.** That of :class:`~flower_ext.client.dp_sgd.DPSGD`. An example moves
    the sum by at most :math:`(\sum_l C_l^2)^{1/2} = C`, which is what noise and account
    are for. It holds for every model that a server may send: the norm is that of the
    very gradient that is added, or provably above it, see
    :mod:`flower_ext.privacy.layer_sums`. Norms from float32 Gram matrices, as papers
    have them, would not hold: in their rounding a norm of any size can be lost.

    **Rounding.** Sums are float64, or float32 where that is provably enough: on CPUs,
    for Linear layers that see one vector an example, with expected batches of up to
    :data:`~flower_ext.privacy.layer_sums.SINGLE_BATCH` = 1024. In these layers an
    example is clipped to 99 % of C_l, on any device; float32's rounding has the rest.

    **Deviations from the paper.** FlashDP does norm, factor and sum in one GPU kernel.
    This is portable: layers' gradients are formed for a few examples at a time, in the
    processor's cache, or not at all (Linear layers that see one vector an example, or
    few long ones; embeddings). The gradient of the batch, which the backward pass would
    compute as well, is not computed.

    References
    ----------
    Wang et al. 2025, "FlashDP: Private training large language models with efficient
    DP-SGD", arXiv 2507.01154; McMahan et al. 2018, "Learning differentially private
    recurrent language models", arXiv 1710.06963 (clipping per layer); Li et al. 2022,
    "Large language models can be strong differentially private learners", arXiv
    2110.05679 (norms without gradients).
    """

    def __init__(
        self,
        privacy: SiloPrivacy | Callable[[Context], SiloPrivacy],
        *,
        split: Split = "uniform",
        release_train_loss: bool = False,
        release_evaluation: bool = False,
    ) -> None:
        super().__init__(
            privacy,
            mode="ghost",
            release_train_loss=release_train_loss,
            release_evaluation=release_evaluation,
        )
        if split not in get_args(Split):
            refuse("split", split, f"one of {get_args(Split)}")
        self.split: Split = split

    def steps(
        self, local: Local, half: ClientHalf, plan: NoisePlan, privacy: SiloPrivacy
    ) -> NoisySteps:
        """Return the steps of one training."""
        return OnePassSteps(local, half, plan, self.split)

    def manner(self, data: Batch, privacy: SiloPrivacy) -> Sequence[object]:
        """Return what decides a step's sum beside model, data, settings and plan."""
        return type(self).__name__, self.split, SINGLE_SLACK


@dataclass
class _Layer:
    """What is clipped together, and what a backward pass has shown of it."""

    modules: list[nn.Module]
    parameters: dict[nn.Parameter, None]
    bound: float = math.nan
    calls: list[Call] = field(default_factory=list)
    done: bool = False

    @property
    def awaited(self) -> bool:
        """Whether the pass has not yet come back to all that the model did with it."""
        return any(getattr(module, "activations", ()) for module in self.modules)


class OnePassSteps(NoisySteps):
    """The steps of one training; see :class:`OnePassClipping`.

    Parameters
    ----------
    local, half, plan
        See :class:`~flower_ext.client.noisy_steps.NoisySteps`.
    split : str
        How the clipping norm is split over layers.
    """

    def __init__(
        self, local: Local, half: ClientHalf, plan: NoisePlan, split: Split
    ) -> None:
        super().__init__(local, half, plan, "ghost")
        layers = _layers(self._wrapped.iterate_submodules(local.model))
        weights = {
            str(i): math.sqrt(sum(p.numel() for p in layer.parameters))
            if split == "dimension"
            else 1.0
            for i, layer in enumerate(layers)
        }
        bounds = split_clipping_norm(plan.bound, weights)
        for layer, bound in zip(layers, bounds.values(), strict=True):
            layer.bound = bound
        self._layers = {module: x for x in layers for module in x.modules}
        # By what was planned, not by what was drawn: it decides the clipping norm.
        self._single = plan.rate * plan.drawn_from <= SINGLE_BATCH
        self._sums: Gradients = {}
        self._size = 0

    def summed(self, batch: Batch) -> tuple[float, Gradients]:
        """Return the summed objective, and the sum of gradients clipped by layer."""
        self._size, self._sums = num_examples(batch), {}
        if not self._size:
            return 0.0, {}
        for module, layer in self._layers.items():
            layer.calls, layer.done = [], False
            module.activations = []  # type: ignore[assignment]
        with self._wrapped.handing_over(self._take):
            with self._without_own_gradients():
                losses = self._objective(batch)
            self.backward(losses)
            for layer in self._layers.values():
                if layer.calls:  # of what the model computed, something was not used
                    self._clip(layer)
        return float(losses.detach().sum()), self._sums

    @contextmanager
    def _without_own_gradients(self) -> Iterator[None]:
        """Build a graph that has no gradients of parameters: nobody needs the sum."""
        trained: list[Tensor] = list(self._trained.values())
        for p in trained:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in trained:
                p.requires_grad_(True)

    def _take(self, call: Call) -> None:
        """Take what the pass has left behind, and clip what is complete."""
        layer = self._layers[call.module]
        for value in (call.backprops, *call.inputs):
            self._require_batch(layer.parameters, value, self._size)
        if layer.done:
            raise ValueError(
                f"a {type(call.module).__name__} was used again after its gradients "
                "had been clipped: a model must not compute anew in its backward "
                "pass, as checkpoints of activations do; DPSGD with mode='ghost' "
                "keeps all uses until the end"
            )
        layer.calls.append(call)
        if not layer.awaited:
            self._clip(layer)

    def _clip(self, layer: _Layer) -> None:
        self._sums |= clipped_layer(
            layer.calls, self._opacus.sampler, layer.bound, single=self._single
        )
        layer.calls, layer.done = [], True


def _layers(modules: Iterator[nn.Module]) -> list[_Layer]:
    """Return what is clipped together: modules that share parameters."""
    layers: list[_Layer] = []
    for module in modules:
        own = dict.fromkeys(p for p in module.parameters() if p.requires_grad)
        joined, others = _Layer([module], own), []
        for layer in layers:
            if layer.parameters.keys() & own.keys():
                joined.modules = [*layer.modules, *joined.modules]
                joined.parameters = {**layer.parameters, **joined.parameters}
            else:
                others.append(layer)
        layers = [*others, joined]
    return layers
