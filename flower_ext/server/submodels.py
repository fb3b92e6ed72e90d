"""Strategies whose clients train models of different widths."""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Unpack, cast

import numpy as np
import numpy.typing as npt

from flower_ext.core.arrays import Arrays
from flower_ext.core.errors import probability, refuse
from flower_ext.core.protocol import Metrics, Payload, Reply, Round, weighted_mean
from flower_ext.core.submodels import (
    WIDTH,
    SliceMap,
    require_slices,
    shapes_of,
)
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.options import AdditiveOptions


class Submodels(AdditiveStrategy):
    """Clients of several widths, each of which is sent a model of its own.

    The base of strategies with a half derived from
    :class:`~flower_ext.client.submodels.SubmodelClient`. A client's width is the same
    in training and in evaluation; by default it is sent the first units of every layer.

    Parameters
    ----------
    model : callable
        ``width -> model``, a torch module, or arrays by name, of which only the shapes
        are looked at; those of the initial arrays are shapes of the largest model.
    widths : sequence of float
        In (0, 1]: the share of the units that the clients of each tier hold.
    width_of : callable, optional
        ``client -> width``, one of ``widths``, of the client at that place; by default
        clients have them in turns, ``widths[client % len(widths)]``.
    *flowers, **options
        See :class:`~flower_ext.server.options.AdditiveOptions`.

    Notes
    -----
    Evaluations report every metric of the clients for each width as well, such as
    ``accuracy-width-0.5``, weighted by their examples.
    """

    def __init__(
        self,
        *flowers: object,
        model: Callable[[float], object],
        widths: Sequence[float],
        width_of: Callable[[int], float] | None = None,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(*flowers, **options)
        if not callable(model):
            cause = "lambda width: Net(width)"
            refuse("model", model, "a function of the width", cause)
        if isinstance(widths, str) or not isinstance(widths, Sequence) or not widths:
            refuse("widths", widths, "a sequence of at least one number")
        self.widths = tuple(probability("widths", float(width)) for width in widths)
        if len(set(self.widths)) < len(self.widths):
            refuse("widths", widths, "different", "width_of says who has which")
        if width_of is not None and not callable(width_of):
            refuse("width_of", width_of, "a function of the client's place, or None")
        self.width_of = width_of
        # Of the small models; those of the large one are in the initial arrays.
        self.shapes = {width: shapes_of(model(width)) for width in self.widths}

    def tier(self, client: int) -> int:
        """Return the tier of a client: which of the widths it has.

        Raises
        ------
        ValueError
            If ``width_of`` says another width than those.
        """
        if self.width_of is None:
            return client % len(self.widths)
        width = self.width_of(client)
        if width not in self.widths:
            refuse(f"width_of({client})", width, f"one of widths={self.widths}")
        return self.widths.index(width)

    def slices(self, tier: int, sent: Arrays) -> SliceMap:
        """Return the map of a model to a tier's slices."""
        width = self.widths[tier]
        small = require_slices(self.shapes[width], sent, width)
        return SliceMap(small, shapes_of(sent))

    def submodel(self, tier: int, round: Round) -> Arrays:
        """Return the model that a tier's clients are sent, by default its slices."""
        return self.slices(tier, round.sent).down(round.sent)

    def shares(self, population: int) -> npt.NDArray[np.float64]:
        """Return the share of all clients that each tier has."""
        tiers = [self.tier(client) for client in range(population)]
        return np.bincount(tiers, minlength=len(self.widths)) / population

    def variant(self, client: int, round: Round) -> Hashable:
        """Return the tier of a client."""
        return self.tier(client)

    def payload(self, variant: Hashable, round: Round) -> Payload:
        """Send the clients of a tier their model and its width."""
        tier = cast(int, variant)
        config = {WIDTH: self.widths[tier]}
        return Payload(self.submodel(tier, round), config)

    def report_evaluate(self, replies: Sequence[Reply], round: Round) -> Metrics:
        """Return the mean of every metric at each width."""
        found: Metrics = {}
        for tier, width in enumerate(self.widths):
            own = [reply for reply in replies if self.tier(reply.client) == tier]
            for key in _keys(own, self.weighted_by_key):
                mean = weighted_mean(own, key, self.weighted_by_key)
                if mean is not None and math.isfinite(mean):
                    found[f"{key}-width-{width:g}"] = mean
        return found

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        return {"Widths": self.widths, **super().settings()}


def _keys(replies: Iterable[Reply], weight: str) -> list[str]:
    keys = dict.fromkeys(key for reply in replies for key in reply.numbers())
    return [key for key in keys if key != weight]
